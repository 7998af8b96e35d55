"""Read layers from the real model: GroupQuantLinear, bitsandbytes, float, those of other libraries whose codes can be
taken over, and adapters over any of them."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbl_trl.adapter.bases import BNB4, foreign_kind
from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.errors import CheckpointError, ExportError
from qbl_trl.onnx.layers import (
    BlockDelta,
    Bnb4Base,
    Branch,
    DenseBase,
    EmbeddingSource,
    GroupBase,
    LinearSource,
    LowRank,
    TensorRef,
)
from qbl_trl.quant.embedding import GroupQuantEmbedding, embedding_scale
from qbl_trl.quant.importers.modules import LAYER_KINDS, take_over
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.packed import PackedWeight
from qbl_trl.quant.targets import is_linear, read_elsewhere

Taken = dict[nn.Module, GroupQuantLinear]  # layers of other libraries -> the same as ours


def linear_source(name: str, module: nn.Module, taken: Taken | None = None) -> LinearSource | None:
    """Describe a linear layer, or return None for a module that is none (its own code is then traced).

    Args:
        taken: layers that were taken over before, and where those that are now are kept.

    Raises:
        ExportError: if it is a quantized layer that has no exact lowering.
    """
    if isinstance(module, BalancedLinear):
        inner = linear_source(name, module.get_base_layer(), taken)
        if inner is None:
            raise _unsupported(name, module.get_base_layer())
        if module.disable_adapters or module.merged:
            return inner
        branches = tuple(_branch(module, adapter) for adapter in module.active_adapters if adapter in module.rank)
        return _with_branches(inner, branches)
    if isinstance(module, GroupQuantLinear):
        return _group_source(name, module)
    if (kind := foreign_kind(module)) in LAYER_KINDS:
        taken = {} if taken is None else taken
        if module not in taken:
            try:
                taken[module] = take_over(module, kind, name)
            except CheckpointError as error:
                raise ExportError(str(error)) from error
        return _group_source(name, taken[module])
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return LinearSource(
            name, rows, columns, DenseBase(TensorRef.of(module.weight), True), TensorRef.of(module.bias)
        )
    if foreign_kind(module) == BNB4:
        return _bnb4_source(name, module)
    if isinstance(module, nn.Linear) and is_plain(module):
        dense = DenseBase(TensorRef.of(module.weight))
        return LinearSource(name, module.in_features, module.out_features, dense, _stored(module.bias))
    if _is_foreign_quantized(module):
        raise _unsupported(name, module)
    return None


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer computes W x + b: by its class, or, where that has a forward of its own, by its output."""
    return type(layer).forward is nn.Linear.forward or is_linear(layer)


def embedding_source(name: str, module: nn.Module) -> EmbeddingSource | None:
    """Describe a token embedding, or return None for a module that is none."""
    if isinstance(module, GroupQuantEmbedding):
        if module.delta is not None:
            raise ExportError(
                f"{name}: an embedding with a merged delta has no exact ONNX form here; leave it unadapted"
            )
        return EmbeddingSource(name, module.num_embeddings, module.embedding_dim, group_base(module), module.scale)
    scale = embedding_scale(module)
    if isinstance(module, nn.Embedding) and scale is not None:
        dense = DenseBase(TensorRef.of(module.weight))
        return EmbeddingSource(name, module.num_embeddings, module.embedding_dim, dense, scale)
    return None


def linear_sources(model: nn.Module, taken: Taken | None = None) -> dict[str, LinearSource]:
    """Every linear layer of a model by name; the inside of an adapter layer belongs to the adapter layer.

    Args:
        taken: see `linear_source`.

    Raises:
        ExportError: if a quantized layer has no exact lowering, or single rows of an embedding were trained.
    """
    if any(isinstance(module, TrainableTokensLayer) for module in model.modules()):
        raise ExportError(
            "export_onnx: trainable_token_indices trained single rows of the embedding, which no operator holds; merge "
            "first and export the merged model"
        )
    found: dict[str, LinearSource] = {}
    not_called = tuple("." + name for name in read_elsewhere(model))
    for name, module in _outermost(model):
        read = f".{name}".endswith(not_called) and type(module) is nn.Linear  # a quantized one is called
        source = None if read else linear_source(name, module, taken)
        if source is not None:
            found[name] = source
    return found


def _outermost(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, BalancedLinear):
            inside.append(name + ".")
        yield name, module


def _group_source(name: str, layer: GroupQuantLinear) -> LinearSource:
    source = LinearSource(name, layer.in_features, layer.out_features, group_base(layer), _stored(layer.bias))
    if layer.delta is None:
        return source
    branch = BlockDelta(TensorRef.of(layer.delta), layer.format.in_factor or 1, layer.format.out_factor or 1)
    return _with_branches(source, (branch,))


def group_base(layer: PackedWeight) -> GroupBase:
    """The packed weight of a GroupQuantLinear or GroupQuantEmbedding."""
    stored = layer.format
    weight, scales = TensorRef.of(layer.weight), TensorRef.of(layer.scales)
    return GroupBase(stored.bits, stored.group_size, weight, scales, _stored(layer.zeros))


def _stored(tensor: Tensor | None) -> TensorRef | None:
    return None if tensor is None else TensorRef.of(tensor)


def _with_branches(source: LinearSource, branches: tuple[Branch, ...]) -> LinearSource:
    return replace(source, branches=source.branches + branches)


def _branch(layer: BalancedLinear, adapter: str) -> Branch:
    p, e = layer.in_factor[adapter], layer.out_factor[adapter]
    if adapter in layer.lora_block:
        return BlockDelta(TensorRef.of(layer.block_delta(adapter)), p, e)
    down, up = layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data
    return LowRank(down, up, layer.gain(adapter), p, e)


def _bnb4_source(name: str, module: Any) -> LinearSource:
    state = module.weight.quant_state
    if state is None:
        raise ExportError(f"{name}: a Linear4bit that holds no quantized weight yet; load or move the model first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ExportError(
            f"{name}: bitsandbytes repacked this layer for CPU inference, its codes can no longer be read exactly. "
            "Export before running the model in eval mode, or load it again"
        )
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    rows, columns = state.shape
    codes = module.weight.data.reshape(-1).view(torch.uint8)  # bnb_4bit_quant_storage may name another dtype
    base = Bnb4Base(codes, absmax.float(), state.quant_type, state.blocksize)
    return LinearSource(name, columns, rows, base, _stored(module.bias))


def _is_foreign_quantized(module: nn.Module) -> bool:
    if isinstance(module, (BaseTunerLayer, GroupQuantEmbedding)):
        return False
    quantized = any(parameter.dtype in (torch.uint8, torch.int8, torch.int32) for parameter in module.parameters(False))
    packed = any(key in dict(module.named_buffers(recurse=False)) for key in ("qweight", "W_q", "weight_packed"))
    return quantized or packed


def _unsupported(name: str, module: nn.Module) -> ExportError:
    return ExportError(
        f"{name}: a {type(module).__name__} has no exact ONNX form here. Supported: GroupQuantLinear (load the model "
        "with GroupQuantConfig, or convert the checkpoint with qbl_trl.quant.importers), bitsandbytes Linear4bit, and "
        "float nn.Linear or Conv1D"
    )
