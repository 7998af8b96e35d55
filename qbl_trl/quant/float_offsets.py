"""What formats with a float offset per group are written from: packed layers, with a merged delta in their offsets."""

from torch import nn

from qbl_trl.errors import ConfigError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.blocks import fold
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.packed import PackedWeight


def folded(layer: PackedWeight) -> Affine:
    """Codes and scales as stored, zeros in float32 with the merged delta moved in: z - D / s.

    Returns:
        Affine: codes (N, K) uint8, scales (N, G) as stored, zeros (N, G) float32.

    Raises:
        FoldError: if the delta varies inside a group (in_factor is no multiple of the group size).
    """
    codes, scales, zeros = layer.affine()
    if layer.delta is None:
        return Affine(codes, scales, zeros.float())
    p, e = layer.format.in_factor or 1, layer.format.out_factor or 1
    return Affine(codes, scales, fold(zeros, scales, layer.delta, p, e, layer.group_size))


def packed_layers(model: nn.Module) -> dict[str, GroupQuantLinear]:
    """Full name -> layer.

    Raises:
        ConfigError: if there is none, another packed module (an embedding) is present, or one holds NaN or infinite
            values.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    other = [name for name, module in found.items() if not isinstance(module, GroupQuantLinear)]
    if other:
        raise ConfigError(f"write_checkpoint: {other[0]} is a packed embedding; only linear layers can be written")
    if not found:
        raise ConfigError(
            "write_checkpoint: the model has no group-quantized layer; `qbl-trl quantize`, or loading it with "
            "GroupQuantConfig, packs its layers"
        )
    for name, module in found.items():
        floats = [t for t in (module.scales, module.zeros, module.delta) if t is not None and t.is_floating_point()]
        if not all(bool(values.isfinite().all()) for values in floats):
            raise ConfigError(f"write_checkpoint: {name} holds NaN or infinite values; the model is damaged")
    return {name: module for name, module in found.items() if isinstance(module, GroupQuantLinear)}
