"""What kinds of base layer an adapter can sit on, and what each kind allows.

Kinds are told by the classes of libraries that are already imported: a base of a library that was never loaded cannot
be in the model, so nothing is imported here to find out.
"""

import sys
from dataclasses import dataclass
from typing import Any

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from qbl_trl.adapter.bnb_packed import is_repacked, repacked_weight
from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant.importers.hqq import PACKINGS
from qbl_trl.quant.importers.modules import LAYER_KINDS, take_over
from qbl_trl.quant.importers.subclasses import kind_of_weight, sizes
from qbl_trl.quant.linear import GroupQuantLinear

BNB4 = "bitsandbytes 4-bit"


@dataclass(frozen=True)
class Base:
    """One base layer, described.

    Attributes:
        kind: "float", "group_quant", "bitsandbytes 4-bit", "hqq", "torchao", ...
        in_features, out_features: K and N.
        group_size: g of an affine group quantized base, None for every other.
        transposed: the weight is stored (K, N), as GPT-2's Conv1D stores it.
    """

    kind: str
    in_features: int
    out_features: int
    group_size: int | None = None
    transposed: bool = False

    @property
    def mergeable(self) -> bool:
        """A merge into this kind changes stored numbers exactly (float: to rounding)."""
        return self.kind in ("float", "group_quant") or self.holds_codes

    @property
    def holds_codes(self) -> bool:
        """Affine groups of another library, whose codes can become those of a GroupQuantLinear."""
        return self.kind in LAYER_KINDS and self.group_size is not None


def describe(layer: nn.Module, name: str = "") -> Base:
    """Tell what a base layer is.

    Raises:
        ConfigError: if no adapter can sit on it; the message names the layer and what is supported.
    """
    if isinstance(layer, GroupQuantLinear):
        return Base("group_quant", layer.in_features, layer.out_features, layer.group_size)
    if isinstance(layer, Conv1D):
        shape: Any = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return Base("float", int(shape[0]), int(shape[1]), transposed=True)
    kind = foreign_kind(layer)
    if kind is not None:
        foreign: Any = layer
        size = _foreign_group_size(kind, layer)
        if kind == "hqq" and size is None:
            kind = f"hqq with nbits={foreign.meta['nbits']}, axis={foreign.meta['axis']}"
        return Base(kind, foreign.in_features, foreign.out_features, size)
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise ConfigError(
            f"{name or 'target module'}: this layer of an nn.MultiheadAttention is never called, its weight is read: an"
            " adapter on it would do nothing. Leave it out with exclude_modules"
        )
    if isinstance(layer, nn.Linear) and isinstance(getattr(layer, "weight", None), Tensor):
        dtype = layer.weight.dtype
        kind = "float" if dtype.is_floating_point and dtype.itemsize > 1 else str(dtype).removeprefix("torch.")
        return Base(kind, layer.in_features, layer.out_features)
    raise ConfigError(
        f"{name or 'target module'}: {type(layer).__name__} cannot hold a balanced adapter; supported are nn.Linear, "
        "Conv1D of transformers, GroupQuantLinear, and the linear layers of bitsandbytes, HQQ, torchao, quanto, GPTQ "
        "and AWQ. Name the linear layers in target_modules, or leave this one out with exclude_modules"
    )


def foreign_kind(layer: nn.Module) -> str | None:
    """What a linear layer class of another library is called here; None for any other module."""
    for kind, module, classes in _FOREIGN:
        if any(isinstance(layer, found) for found in _loaded(module, classes)):
            return kind
    weight = getattr(layer, "weight", None)  # compressed-tensors takes it away
    return kind_of_weight(weight) if isinstance(layer, nn.Linear) and isinstance(weight, Tensor) else None


def float_weight(layer: nn.Module) -> Tensor:
    """The weight a layer multiplies with, float32, as the layer stores it: (N, K), or (K, N) for Conv1D.

    Raises:
        CheckpointError: if the layer keeps its weight in a layout that only its kernel knows.
    """
    if isinstance(layer, GroupQuantLinear):
        return layer.dequantize()
    kind = describe(layer).kind
    if kind in ("gptq", "awq"):
        return take_over(layer, kind, "layer").dequantize()
    weight: Any = getattr(layer, "qweight", None) if kind == "quanto" else None
    weight = layer.weight if weight is None else weight
    if kind_of_weight(weight):
        return weight.dequantize().detach().float()
    if kind.startswith(("float8", "int", "uint")):
        raise CheckpointError(f"a {kind} weight means nothing without the scales that its own class keeps for it")
    if is_repacked(layer.weight):
        return repacked_weight(layer.weight.data, layer.weight.quant_state)  # type: ignore[arg-type, union-attr]
    return dequantize_module_weight(layer).detach().float()


def quantize_hint() -> str:
    """The line that gives a base with affine groups."""
    return f"from_pretrained(..., quantization_config={GroupQuantConfig.__name__}(bits=4, group_size=32))"


_FOREIGN = (
    (BNB4, "bitsandbytes.nn", ("Linear4bit",)),
    ("bitsandbytes 8-bit", "bitsandbytes.nn", ("Linear8bitLt",)),
    ("hqq", "hqq.core.quantize", ("HQQLinear",)),
    ("awq", "gptqmodel.nn_modules.qlinear", ("AWQuantLinear",)),  # before its parent
    ("gptq", "gptqmodel.nn_modules.qlinear", ("BaseQuantLinear",)),
    ("awq", "awq.modules.linear", ("WQLinear_GEMM", "WQLinear_GEMV")),
    ("awq", "awq.modules.linear.gemm", ("WQLinear_GEMM",)),
    ("quanto", "optimum.quanto.nn.qlinear", ("QLinear",)),  # also before it is frozen, over a float weight
)


def _loaded(module: str, classes: tuple[str, ...]) -> list[type]:
    loaded = sys.modules.get(module)
    found = [getattr(loaded, name, None) for name in classes] if loaded else []
    return [cls for cls in found if isinstance(cls, type)]


def _foreign_group_size(kind: str, layer: nn.Module) -> int | None:
    if kind in ("gptq", "awq"):
        size = int(layer.group_size)  # type: ignore[arg-type]
        return int(layer.in_features) if size == -1 else size  # type: ignore[arg-type]
    if kind == "hqq":
        meta: Any = layer.meta
        taken_over = meta["axis"] == 1 and meta["packing"] in PACKINGS
        return int(meta["group_size"] or layer.in_features) if taken_over else None  # type: ignore[arg-type]
    found = sizes(layer) if isinstance(layer, nn.Linear) else None
    return None if found is None else found.stored
