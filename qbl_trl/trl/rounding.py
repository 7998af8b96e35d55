"""Training that sees the block delta as deployment stores it.

    y = W x + B (A h)  becomes  W x + Q(D) h,   D = gain * B A,   h = sum_p(x)

Q rounds to the narrower type (float16, bfloat16, or int8 with one scale per row). Nothing of the layer is replaced: a
forward hook adds (Q(D) - D) h, a constant for autograd, so that A and B get the gradient of the unrounded product
(straight through) and x gets the one of what was computed. Q(D) - D is made anew after every optimizer step, and where
training gives way to an evaluation, or comes back (but for compiled models).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.adapter.products import add_expanded, sum_neighbours
from qbl_trl.errors import ConfigError
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.trl.layers import active, base_of

STORED = ("float16", "bfloat16", "int8")


def round_delta(delta: Tensor, stored: str) -> Tensor:
    """What comes back after a block delta was stored narrowly.

    Args:
        delta: (N / e, K / p) float32, weight units.
        stored: "float16", "bfloat16", or "int8" (symmetric, one float32 scale per row: round(127 d / max|d|)).

    Returns:
        (N / e, K / p) float32.

    Raises:
        ConfigError: if `stored` is none of these.
    """
    if stored == "int8":
        scale = (delta.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)  # no denormal
        return (delta / scale).round() * scale
    if stored not in STORED:
        raise ConfigError(f"stored_delta={stored!r} is not known; allowed: {', '.join(STORED)}")
    return delta.to(getattr(torch, stored)).float()


class DeltaRounding:
    """Adds what rounding changes to the output of every adapted layer, while installed.

    Attributes:
        rounding: whether it is felt; until then nothing is added, in a graph of the same form, so that a compiled model
            need not be compiled again (and would not notice hooks that came later).
    """

    def __init__(self, layers: dict[str, BalancedLinear], stored: str, rounding: bool = True) -> None:
        self.stored = stored
        self.rounding = rounding
        self._sums: list[tuple[Tensor, Tensor]] = []  # of squares, left on the device: each step makes them anew
        self._layers = layers
        self._trained = {name: active(layer) for name, layer in layers.items()}  # a reference may be another adapter
        self._change: dict[str, Tensor] = {}
        self._while_training: dict[str, bool] = {}
        self._handles: list[Any] = []

    @property
    def installed(self) -> bool:
        return bool(self._handles)

    def install(self, anew: bool = True) -> None:
        """Add to every layer from now on.

        Args:
            anew: round the present weights first; every process must then call this under FSDP.
        """
        if not self.installed:
            if anew:
                self.refresh()
            self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()]

    def remove(self) -> None:
        """Compute by the unrounded factors again."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def cost(self) -> float:
        """||Q(D) - D|| / ||D|| over all layers, at the last refresh."""
        lost, total = (sum(float(part[at]) for part in self._sums) for at in (0, 1))
        return (lost / total) ** 0.5 if total else 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the present weights. Under FSDP, every process must call this."""
        self._sums = []
        for name, layer in self._layers.items():
            delta = self._round(name, layer)
            self._sums.append((self._change[name].square().sum(), delta.square().sum()))

    def _round(self, name: str, layer: BalancedLinear) -> Tensor:
        """The present delta of a layer, whose change by rounding is what is added from now on."""
        with torch.inference_mode(False), torch.no_grad():  # an evaluation's tensors may be met in training
            delta = layer.block_delta(self._trained[name][0])
            delta = delta.full_tensor() if isinstance(delta, DTensor) else delta
            self._change[name] = round_delta(delta, self.stored) - delta if self.rounding else torch.zeros_like(delta)
        self._while_training[name] = layer.training
        return delta

    def _hook(self, name: str) -> Any:
        @_marked
        def add(layer: BalancedLinear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer.disable_adapters or layer.merged or active(layer) != self._trained[name]:
                return output
            if not torch.compiler.is_compiling() and layer.training != self._while_training[name]:
                self._round(name, layer)  # optimizers that average have put other weights in place (schedule-free)
            adapter, change = self._trained[name][0], self._change[name]
            pooled = sum_neighbours(inputs[0], layer.in_factor[adapter], change.dtype)
            return add_expanded(output, pooled, change, layer.out_factor[adapter])

        return add


def _marked(hook: Any) -> Any:
    hook.rounds_delta = True
    return hook


def forget_rounding(layers: dict[str, BalancedLinear]) -> None:
    """Take off what a run that was interrupted left on its layers, whose callback may be gone."""
    for layer in layers.values():
        for key in [key for key, hook in layer._forward_hooks.items() if hasattr(hook, "rounds_delta")]:
            del layer._forward_hooks[key]


@contextmanager
def rounded(layers: dict[str, BalancedLinear], stored: str | None) -> Iterator[None]:
    """While open, the layers compute as deployment does; None changes nothing."""
    rounding = DeltaRounding(layers, stored) if stored else None
    try:
        if rounding is not None:
            rounding.install()
        yield
    finally:
        if rounding is not None:
            rounding.remove()


def round_deltas_(model: nn.Module, stored: str | None) -> None:
    """Round every merged delta of a model in place. The tensors stay float32: an artifact narrows them without loss."""
    for layer in model.modules():
        if stored is not None and isinstance(layer, GroupQuantLinear) and layer.delta is not None:
            narrow = round_delta(layer.delta.float(), stored)
            layer.set_delta(narrow, layer.format.in_factor, layer.format.out_factor)


def check_rounding(layers: dict[str, BalancedLinear], stored: str | None) -> None:
    """Refuse rounding where no delta is stored.

    Raises:
        ConfigError: for an unknown type; over a base or with factors that do not keep a block delta.
    """
    if stored is None:
        return
    round_delta(torch.zeros(1, 1), stored)
    for name, layer in layers.items():
        if not isinstance(base_of(layer), GroupQuantLinear) or not layer.merges_exactly() or len(active(layer)) != 1:
            raise ConfigError(
                f"{name}: stored_delta={stored!r} rounds the block delta that a merge over a GroupQuantConfig base "
                "stores, and this layer stores none. Train one adapter with quantization_aware=True, or leave it out"
            )
