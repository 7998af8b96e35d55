"""What a checkpoint holds, layer by layer, and which adapters fit it: the facts behind `qbl-trl inspect`."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.float_weights import FloatWeights
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.packed import PackedWeight


@dataclass(frozen=True)
class LayerSummary:
    """One packed layer.

    Attributes:
        name, out_features, in_features, bits, group_size, zeros: as stored.
        bytes_per_weight: codes, scales, zeros and delta over out_features * in_features.
        delta: (in_factor, out_factor) of a merged adapter, or None.
        error: relative error against the float weights, ||W - W_q|| / ||W||, if those were given.
        in_factors: those that an exact (quantization-aware) adapter can have here.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    zeros: str
    bytes_per_weight: float
    delta: tuple[int, int] | None
    error: float | None
    in_factors: tuple[int, ...]


def summarize(model: nn.Module, float_folder: str | Path | None = None) -> list[LayerSummary]:
    """Describe every packed layer of a model.

    Args:
        model: any model with GroupQuantLinear layers.
        float_folder: a safetensors folder of the float weights of the same model, read as FloatWeights does.

    Raises:
        CheckpointError: if the model has no packed layer, or the float folder lacks one of its weights.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GroupQuantLinear)}
    if not layers:
        named = getattr(getattr(model, "config", None), "_name_or_path", "") or "the model"
        raise CheckpointError(
            f"{named} holds no group-quantized layer: a {type(model).__name__} in float; `qbl-trl quantize` packs it"
        )
    floats = FloatWeights(float_folder, model) if float_folder else None
    if floats is not None and not floats:
        raise CheckpointError(f"{float_folder} holds no safetensors file with float weights")
    errors = {name: None if floats is None else _error(name, layer, floats) for name, layer in layers.items()}
    return [_summary(name, layer, errors[name]) for name, layer in layers.items()]


def float_parts(model: nn.Module) -> dict[str, int]:
    """Bytes of every parameter that is no packed layer's, by the name of its module; one that is tied counts once."""
    packed = {id(p) for m in model.modules() if isinstance(m, PackedWeight) for p in m.parameters()}
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in packed:
            module = name.rpartition(".")[0]
            found[module] = found.get(module, 0) + parameter.nbytes
    return found


def _summary(name: str, layer: GroupQuantLinear, error: float | None) -> LayerSummary:
    parts = [t for t in (layer.weight, layer.scales, layer.zeros, layer.delta) if t is not None]
    stored = layer.format
    k, n, g = layer.in_features, layer.out_features, layer.group_size
    return LayerSummary(
        name,
        n,
        k,
        layer.bits,
        g,
        stored.zeros,
        sum(t.numel() * t.element_size() for t in parts) / (n * k),
        None if stored.in_factor is None or stored.out_factor is None else (stored.in_factor, stored.out_factor),
        error,
        tuple(p for p in range(g, k + 1, g) if k % p == 0),
    )


def _error(name: str, layer: GroupQuantLinear, floats: FloatWeights) -> float:
    key = f"{name}.weight"
    weight = floats.read(name)
    if weight is None:
        raise CheckpointError(f"the float checkpoint has no tensor {key!r}; it is of another model")
    if not weight.is_floating_point():
        raise CheckpointError(f"{floats.folder} holds codes in {key!r}, not float weights; name the float model")
    found = layer.dequantize()
    if weight.shape != found.shape:
        raise CheckpointError(
            f"{key!r} has shape {tuple(weight.shape)} in the float checkpoint and {tuple(found.shape)} here; it is of "
            "another model"
        )
    return float((found - weight.float()).norm() / weight.float().norm())
