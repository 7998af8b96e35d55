"""Weights that torchao and quanto keep inside a subclass of Tensor, under an ordinary linear layer.

| class | codes | scales; zero points | a weight is |
| --- | --- | --- | --- |
| torchao's IntxUnpackedToInt8Tensor, Int8Tensor | (N, K) int8 | (N, G); int8, float, none | (q - zero) scale |
| quanto's WeightQBitsTensor | (N G, g) uint8 | (N G, 1); a shift | (q - shift) scale, of a float one q scale - shift |
| quanto's WeightQBytesTensor | (N, K) int8 | (N, 1) | q scale |

Signed codes and their zero points are stored with half of the range added. Codes of 3, 5, 6 or 7 bits are stored in the
next width there is. A scale of a whole row is repeated for groups of at most 128.

Source: torchao, quantization/quantize_/workflows; optimum-quanto, tensor/weights and tensor/qbits.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbl_trl.allowed import ALLOWED_GROUP_SIZES
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.importers.reader import build, size_within_a_row, stored_bits
from qbl_trl.quant.linear import GroupQuantLinear


class Sizes(NamedTuple):
    """How a weight is kept: bits of a code, the weights that share a scale along K, and those that will."""

    bits: int
    own: int
    stored: int


def kind_of_weight(weight: Tensor) -> str | None:
    """The library whose subclass of Tensor a weight is: "torchao", "quanto"; None for a tensor of torch itself."""
    from torch.distributed.tensor import DTensor

    local = weight.to_local() if isinstance(weight, DTensor) else weight
    cls = type(local.data)
    package = cls.__module__.removeprefix("optimum.").partition(".")[0]
    return None if package == "torch" else package


def sizes(layer: nn.Module) -> Sizes | None:
    """How a layer keeps its weight; None where its codes are no affine groups along K that can be read."""
    weight: Any = layer.weight
    name, columns = _name(weight), weight.shape[-1]
    if weight.dim() != 2 or _reads_other_inputs(layer):
        return None
    if name in ("IntxUnpackedToInt8Tensor", "Int8Tensor"):
        bits = int(str(getattr(weight, "target_dtype", "int8")).rpartition("int")[2])
        if weight.block_size[0] != 1:
            return None
        own = weight.block_size[1]
    elif name == "WeightQBitsTensor" and weight.axis == 0:
        bits, own = weight.qtype.bits, weight._group_size or columns
    elif name == "WeightQBytesTensor" and weight.axis == 0 and not weight.qtype.is_floating_point:
        bits, own = 8, columns
    else:
        return None
    fitting = [size for size in ALLOWED_GROUP_SIZES if own % size == 0]
    if not fitting and own != columns:
        return None
    stored = size_within_a_row(columns) if own == columns else max(fitting)
    return Sizes(stored_bits(bits), own, stored)


def read_layer(layer: nn.Module) -> GroupQuantLinear:
    """The same codes, scales, zero points and bias as a layer of ours.

    Raises:
        CheckpointError: if they are no affine groups along K, or activations are quantized or scaled too.
    """
    if _reads_other_inputs(layer):
        raise CheckpointError("its activations are quantized or scaled too, this package quantizes weights")
    found, weight = sizes(layer), _portable(layer.weight)
    if found is None:
        raise CheckpointError(f"a {type(weight).__name__} keeps no affine groups along the inputs that are read here")
    return build(
        _affine(weight, found.bits),
        bits=found.bits,
        own_size=found.own,
        group_size=found.stored,
        symmetric=False,
        bias=layer.bias if isinstance(layer.bias, Tensor) else None,
    )


def _affine(weight: Any, bits: int) -> Affine:
    rows, columns = weight.shape
    if hasattr(weight, "qdata"):
        scales, zeros = weight.scale.reshape(rows, -1), weight.zero_point
        zeros = torch.zeros_like(scales, dtype=torch.int8) if zeros is None else zeros.reshape(rows, -1)
        return _from_signed(weight.qdata, scales, zeros, bits)
    scales = weight._scale.reshape(rows, -1)
    if not hasattr(weight, "_shift"):
        return _from_signed(weight._data, scales, torch.zeros_like(scales, dtype=torch.int8), bits)
    codes, shift = weight._data.unpack().reshape(rows, columns), weight._shift.reshape(rows, -1)
    if shift.is_floating_point():
        return Affine(codes, scales, shift.float() / scales.float())
    return Affine(codes, scales, shift.to(torch.uint8))


def _from_signed(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Affine:
    half = 1 << (bits - 1)
    zeros = zeros + half if zeros.is_floating_point() else (zeros.short() + half).to(torch.uint8)
    return Affine((codes.short() + half).to(torch.uint8), scales, zeros)


def _reads_other_inputs(layer: nn.Module) -> bool:
    """Whether a layer multiplies with something else than its inputs: rounded or scaled ones."""
    settings = ("activation_quantization", "act_quant_kwargs", "act_pre_scale", "activation_qtype")
    return any(getattr(owner, name, None) is not None for owner in (layer, layer.weight) for name in settings)


def _portable(weight: Any) -> Any:
    """quanto repacks codes for some kernels, under subclasses that know the way back."""
    plain = getattr(weight, "weight_qbits_tensor", None)
    return weight if plain is None or type(weight.data).__name__ == "WeightQBitsTensor" else plain()


def _name(weight: Tensor) -> str:
    cls = type(weight.data)
    return next((base.__name__ for base in cls.__mro__ if base.__name__.startswith("WeightQ")), cls.__name__)
