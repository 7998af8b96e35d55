"""Copies that share the frozen tensors of what they copy: for asking "what would the merged layer compute?" in passing.

Nothing here draws random numbers, and nothing touches the model that is asked about.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from qbl_trl.adapter.layer import BalancedLinear, adapter_layers
from qbl_trl.quant.modules import copied, frozen
from qbl_trl.trl.layers import active, base_of
from qbl_trl.trl.rounding import round_deltas_


def shadow(layer: BalancedLinear) -> BalancedLinear:
    """A second BalancedLinear over the same base tensors, with adapter weights of its own."""
    base = base_of(layer)
    shared = {id(buffer): buffer for buffer in base.buffers()}
    shared |= {id(parameter): frozen(parameter) for parameter in base.parameters()}
    return copied(layer, lambda tensor: shared.get(id(tensor)))


def merged_base(layer: BalancedLinear) -> nn.Module:
    """The base layer as `merge` would leave it, over shared codes and scales.

    Raises:
        MergeError: if this layer cannot take its adapter exactly.
    """
    twin = shadow(layer)
    twin.merge(safe_merge=True, adapter_names=active(twin))
    return base_of(twin)


@contextmanager
def computing_merged(model: nn.Module, stored: str | None = None) -> Iterator[None]:
    """While open, every adapted layer computes by its merged weight; with other adapters, or none, as ever.

    So a loss that switches to others for its reference, or all of them off (DPO, KTO), is measured rightly, too.
    """
    layers, hooks = list(adapter_layers(model).values()), {}
    try:
        for layer in layers:
            merged = merged_base(layer)
            round_deltas_(merged, stored)
            hooks[layer], layer._forward_hooks = layer._forward_hooks, OrderedDict()
            layer.forward = _either(layer, merged)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            layer._forward_hooks = hooks.get(layer, layer._forward_hooks)


def _either(layer: BalancedLinear, merged: nn.Module) -> Any:
    trained = active(layer)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.disable_adapters or active(layer) != trained:
            return type(layer).forward(layer, x, *args, **kwargs)
        return cast(Tensor, merged(x, *args, **kwargs))

    return forward
