"""A packed model made float again, in place: what `model.dequantize()` of transformers does here."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qbl_trl.errors import ConfigError
from qbl_trl.quant.embedding import GroupQuantEmbedding
from qbl_trl.quant.intact import check_present
from qbl_trl.quant.modules import empty_model, replace
from qbl_trl.quant.packed import PackedWeight
from qbl_trl.quant.stacks import check_stackable, stack_again_


def dequantize_model_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every packed layer by the float layer that the model's class has in its place, frozen.

    Which layers are stored transposed (GPT-2's) only the class knows: it is built once more, without memory. What one
    table holds for a tied pair stays one, and experts that the class stacks are stacked again.

    Raises:
        ConfigError: if a packed layer is offloaded, experts that would be stacked have adapters, or transposed layers
            (GPT-2's) adapters of other methods.
    """
    check_present(model, "dequantize")
    check_stackable(model)
    own = dict(empty_model(type(model), model.config).named_modules())
    _check_adapters(model, own)
    _make_float_(model, own, dtype)
    stack_again_(model)
    vars(model).pop("_weight_conversions", None)  # names of packed layers; transformers knows those of its own


def _check_adapters(model: nn.Module, own: dict[str, nn.Module]) -> None:
    """Refuse adapters of other methods on layers that the class stores transposed: they would take them for others.

    Raises:
        ConfigError: naming the first layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, PackedWeight) and isinstance(own.get(name.replace(".base_layer", "")), Conv1D):
            around: Any = model.get_submodule(name.rpartition(".")[0])
            if name.endswith(".base_layer") and not hasattr(around, "rest_on"):
                raise ConfigError(
                    f"dequantize: {name.removesuffix('.base_layer')} has an adapter of another method than QBLoRA, "
                    "which would take a transposed weight for one that is not; unload it, and place it over the float "
                    "model"
                )


def _make_float_(model: PreTrainedModel, own: dict[str, nn.Module], dtype: torch.dtype) -> None:
    """Layer by layer; nothing but the model holds what was made once this has returned."""
    made: dict[tuple[int, int], Tensor] = {}
    instead: dict[int, nn.Module] = {}
    packed = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedWeight)]
    for name, layer in packed:
        one_table = id(layer.weight), id(layer.delta)
        if one_table not in made:
            made[one_table] = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
        dense = _like(own.get(name.replace(".base_layer", "")), layer, made[one_table])
        replace(model, name, dense.train(layer.training))
        instead[id(layer)] = dense
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "rest_on")]
    for module in adapted:
        module.rest_on(module.get_base_layer())
        module.apart_from = tuple(instead.get(id(table), table) for table in module.apart_from)  # of a merged head


def _like(own: nn.Module | None, layer: PackedWeight, weight: Tensor) -> nn.Module:
    sizes = layer.in_features, layer.out_features
    if isinstance(layer, GroupQuantEmbedding):
        table = nn.Embedding(sizes[1], sizes[0], layer.padding_idx, device="meta")
        if layer.scale != 1 and own is not None:  # a class that scales what it looks up
            table = own  # type: ignore[assignment]
            for name, buffer in own.named_buffers():
                own._buffers[name] = torch.full_like(buffer, layer.scale, device=weight.device)
        table.weight = weight  # type: ignore[assignment]
        return table
    transposed = isinstance(own, Conv1D)
    bias = layer.bias
    with torch.device("meta"):
        dense = Conv1D(*reversed(sizes)) if transposed else nn.Linear(*sizes, bias=bias is not None)
    dense.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False) if transposed else weight  # type: ignore[assignment]
    dense.bias = bias  # type: ignore[assignment]
    return dense
