"""The check before the first step: does a merged layer compute what the trained layer computes, on this very model?

One layer of every kind (name, shape, factors, base) is copied over its real codes and scales, given random adapter
weights, and asked twice: as trained, and with the change where deployment will have it. Takes seconds at most, draws
from a generator of its own and never touches the model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.arithmetic import plain_arithmetic
from qbl_trl.errors import MergeError
from qbl_trl.trl.layers import active, base_of
from qbl_trl.trl.shadow import shadow

_ROWS = 4
# Two evaluations of one sum of K products differ by rounding only; a wrong fold differs in the first digit.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def probe(layers: dict[str, BalancedLinear]) -> dict[str, float]:
    """Compare trained and merged form of one layer of each kind.

    Args:
        layers: every adapted layer by full name. Layers that are not here (meta, partitioned) are passed over.

    Returns:
        Largest difference over largest output, by full name of the layer asked.

    Raises:
        MergeError: if a layer's two forms disagree; the message names it.
    """
    errors: dict[str, float] = {}
    seen: set[Any] = set()
    for name, layer in layers.items():
        key = _kind(name, layer)
        if key in seen or not _is_here(layer):
            continue
        seen.add(key)
        error, tolerance = _difference(layer)
        if not error <= tolerance:
            raise MergeError(
                f"{name}: before training, the trained and the merged form of this layer differ by {error:.1e} of its "
                f"largest output (allowed: {tolerance:.0e}). Training would not learn what deployment computes; "
                "please report the model, its quantization and the adapter's factors"
            )
        errors[name] = error
    return errors


def _kind(name: str, layer: BalancedLinear) -> tuple[Any, ...]:
    factors = [(layer.in_factor[a], layer.out_factor[a]) for a in active(layer)]
    return name.rpartition(".")[2], layer.base, tuple(factors)


def _is_here(layer: BalancedLinear) -> bool:
    """False for what another process holds: meta tensors, and parameters DeepSpeed has partitioned away."""
    return not any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in layer.parameters())


def _difference(layer: BalancedLinear) -> tuple[float, float]:
    """The two forms' largest difference, relative to the largest output, and what is allowed."""
    twin = shadow(layer)
    twin.requires_grad_(False)
    twin.train()  # in eval mode bitsandbytes may repack its codes for the processor, and they are the model's own
    generator = torch.Generator("cpu").manual_seed(0)
    for name, weight in twin.named_parameters():
        if name.startswith("lora_"):
            weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") / weight.shape[1] ** 0.5)
    for dropout in (m for m in twin.modules() if isinstance(m, nn.Dropout)):
        dropout.eval()
    base = base_of(twin)
    stored = base.weight
    dtype = stored.dtype if isinstance(stored, Tensor) and stored.is_floating_point() else torch.float32
    x = torch.randn(_ROWS, layer.base.in_features, generator=generator, device="cpu")
    x = x.to(stored.device, dtype)  # type: ignore[arg-type]
    with torch.no_grad(), plain_arithmetic(x.device.type):
        trained = twin(x).float()
        merged = _merged(twin, base, x)
    error = float((trained - merged).abs().max() / trained.abs().max().clamp_min(1e-30))
    return error, max(_TOLERANCE.get(computed, 5e-2) for computed in {dtype, *_adapter_dtypes(twin)})


def _adapter_dtypes(layer: BalancedLinear) -> set[torch.dtype]:
    """TRL trains adapters over a bitsandbytes base in bfloat16, whatever the base computes in."""
    return {p.dtype for name, p in layer.named_parameters() if name.startswith("lora_")}


def _merged(twin: BalancedLinear, base: nn.Module, x: Tensor) -> Tensor:
    if twin.merges_exactly():
        twin.merge(safe_merge=True)
        return base(x).float()  # type: ignore[no-any-return]
    # No exact merge: the export keeps the adapter beside the base, so the sum of both is what deployment computes.
    output: Tensor = base(x).float()
    for name in active(twin):
        weight = twin.get_delta_weight(name)
        output = output + x.float() @ (weight if twin.base.transposed else weight.T)
    return output
