"""A copy of the model's structure, with placeholders where layers have a lowering of their own.

The copy shares no tensor that matters with the model and owns almost none: linear layers, embeddings and norms are
not copied. The caller's model is never touched.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from qbl_trl.errors import ExportError
from qbl_trl.onnx.activations import gelu_form
from qbl_trl.onnx.layers import EmbeddingSource, LinearSource
from qbl_trl.onnx.markers import (
    EmbeddingMarker,
    GatedNormMarker,
    GeluMarker,
    LinearMarker,
    NormMarker,
    RotaryTableMarker,
    TypedTableMarker,
    WholeTableMarker,
    mark_attention,
    mark_one_rotary,
    mark_rotary,
)
from qbl_trl.onnx.norm_modules import Norm, gated_norm, rms_norm
from qbl_trl.onnx.own_attention import calls_torch, own_attention_traced
from qbl_trl.onnx.own_layers import own_tables, said_again
from qbl_trl.onnx.rotary import NoTable, Rotary, by_type, changes_with_length, gives_tables, is_rotary
from qbl_trl.onnx.rotations import ROTATING, pairs_neighbours, rotate_of, takes_one
from qbl_trl.onnx.sources import embedding_source
from qbl_trl.onnx.threads import replaced_here
from qbl_trl.onnx.windows import mask_of_window, window_of
from qbl_trl.quant.modules import plain_forward_
from qbl_trl.quant.stacks import unstack_

TRACED_ATTENTION = "qbl_trl_trace"


class Unfusable(Exception):
    """Why fused attention cannot express this model; the standard operators can.

    A signal between modules of this package: it becomes text of the report, or an ExportError.
    """


@dataclass
class Skeleton:
    """What a trace needs.

    Attributes:
        model: the structure with placeholders, parameters that are left in the trace's dtype.
        linears, embeddings, norms, rotary: what the placeholders stand for, by name.
        caps_scores: the model's attention function honours `softcap`; that of torch ("sdpa") does not.
    """

    model: PreTrainedModel
    linears: dict[str, LinearSource]
    embeddings: dict[str, EmbeddingSource] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    rotary: dict[str, Rotary] = field(default_factory=dict)
    caps_scores: bool = True


def build_skeleton(
    model: PreTrainedModel,
    sources: dict[str, LinearSource],
    dtype: torch.dtype,
    fused_attention: bool,
    spelled_out: bool = False,
) -> Skeleton:
    """Copy the structure of `model` with placeholders.

    Raises:
        Unfusable: if fused attention was asked for and the model's rotary embedding or attention has no fused form.
    """
    if fused_attention and "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise Unfusable(f"{type(model).__name__}: attention in chunks has no fused form")
    made = Skeleton(model, sources)
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        marker = _marker(name, module, made, dtype, fused_attention)
        if marker is not None:
            memo[id(module)] = marker
    if fused_attention:
        made.rotary |= {name: Rotary(table) for name, table in own_tables(model).items()}
    skeleton = plain_forward_(copy.deepcopy(model, memo), placed=False)
    skeleton.eval()
    unstack_(skeleton, untraceable=True)
    tables = [buffer for buffer in skeleton.buffers() if buffer.dim() > 1]  # of positions; others (frequencies) stay
    for tensor in (*skeleton.parameters(), *skeleton.buffers()):  # the inputs of the trace lie on the CPU
        tensor.data = tensor.data.cpu()
    for tensor in (*skeleton.parameters(), *tables):
        tensor.requires_grad_(False)
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    own = str(model.config._attn_implementation)
    # The tracer writes torch's attention with float32 constants: half precision takes the spelled-out one.
    standard = "eager" if own == "eager" or spelled_out else "sdpa"
    if fused_attention and calls_torch(model):  # in its own branch for that
        standard = "sdpa"
    elif fused_attention and not any(said_again(module) is not None for module in model.modules()):
        standard = TRACED_ATTENTION
    skeleton.config._attn_implementation = standard
    skeleton.config._is_quantized = True  # some call layers then that they read the weight of otherwise (Jamba)
    made.model, made.caps_scores = skeleton, own != "sdpa"
    return made


def _marker(name: str, module: nn.Module, made: Skeleton, dtype: torch.dtype, fused: bool) -> nn.Module | None:
    source = made.linears.get(name)
    if source is not None:
        bias = None if source.bias is None else source.bias.read().to(dtype)
        return LinearMarker(name, source.in_features, source.out_features, dtype, bias)
    embedding = embedding_source(name, module)
    if embedding is not None:
        made.embeddings[name] = embedding
        return EmbeddingMarker(name, embedding.num_embeddings, embedding.embedding_dim, dtype, embedding.scale)
    if (norm := rms_norm(module)) is not None:
        made.norms[name] = norm
        return NormMarker(name, dtype)
    if (gated := gated_norm(module)) is not None:
        made.norms[name] = gated.norm
        return GatedNormMarker(name, dtype, gated.activation, gated.gate_first)
    form = gelu_form(module)
    if form is not None:
        return GeluMarker(form)
    if is_rotary(module) and (fused or changes_with_length(module) or _interleaves(module)):
        return _rotary_marker(name, module, made, fused)
    return None


def _interleaves(module: nn.Module) -> bool:
    """Whether its angles alternate between features: how they are repeated, the tracer loses the ranks over."""
    try:
        return any(Rotary(part).repeats != "halves" for part in by_type(module).values())
    except NoTable:
        return False


def _rotary_marker(name: str, module: nn.Module, made: Skeleton, fused: bool) -> nn.Module | None:
    """What stands for a rotary embedding, or None where its own code is traced."""
    parts = by_type(module)
    found = {f"{name}.{kind}".rstrip("."): _rotary(name, part, fused) for kind, part in parts.items()}
    tables = {table: rotary for table, rotary in found.items() if rotary is not None}
    if len(tables) < len(found):
        return None
    made.rotary |= tables
    marker: nn.Module
    if "" in parts:
        marker = (WholeTableMarker if gives_tables(module) else RotaryTableMarker)(name, tables[name].columns)
    else:
        marker = TypedTableMarker(name, {kind: tables[f"{name}.{kind}"].columns for kind in parts})
    if hasattr(module, "config"):  # Granite with windows finds its tables by it
        marker.config = copy.copy(module.config)  # Optimum sets use_cache of every module while it traces
    return marker


def _rotary(name: str, module: nn.Module, fused: bool) -> Rotary | None:
    """What a module's table holds; None: its own code is traced, be it a vision tower's, which no text runs."""
    changes = changes_with_length(module)
    try:
        rotary = Rotary(module)
    except NoTable as error:
        if not changes:
            return None
        raise ExportError(
            f"{name}: {error}, and its angles depend on how long a text is; a graph cannot hold that"
        ) from error
    if fused and rotary.repeats is None:
        if changes:
            raise Unfusable(f"{name}: its table holds no angle twice, in halves or side by side")
        return None
    return rotary


@contextmanager
def fused_attention_traced(skeleton: Skeleton) -> Iterator[None]:
    """While open, attention and rotary embedding of the skeleton's modeling files emit placeholders.

    Raises:
        Unfusable: if a modeling file rotates in another way than the fused operator does.
    """
    AttentionInterface.register(TRACED_ATTENTION, partial(_traced_attention, skeleton.caps_scores))
    AttentionMaskInterface.register(TRACED_ATTENTION, mask_of_window)
    with replaced_here(_rotations(skeleton)), own_attention_traced(skeleton.model):
        yield


def _rotations(skeleton: Skeleton) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Functions of modeling files that rotate, and what stands for them."""
    if not skeleton.rotary:
        return
    files = {type(module).__module__ for module in skeleton.model.modules()}
    apart = {type(module).__module__ for module in skeleton.model.modules() if said_again(module) is not None}
    for file, name in product(sorted(files - apart), ROTATING):
        original = rotate_of(file, name)
        if original is not None:
            mark = mark_one_rotary if takes_one(original) else mark_rotary
            yield sys.modules[file], name, partial(mark, interleaved=_interleaved(file, original, skeleton))


def _interleaved(file: str, rotate: Callable[..., Any], skeleton: Skeleton) -> bool:
    """Whether a modeling file rotates pairs of neighbours."""
    repeats = {rotary.repeats for rotary in skeleton.rotary.values()}
    pairs = pairs_neighbours(rotate, str(repeats.pop()) if len(repeats) == 1 else "halves")
    if pairs is None:
        raise Unfusable(f"{file}: its rotary embedding pairs features in another way than the fused operator")
    return pairs


def _traced_attention(
    caps_scores: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    where = type(module).__name__
    extra = sorted(name for name, given in others.items() if given is not None and name in _MEANINGFUL)
    if extra or not getattr(module, "is_causal", True):
        raise Unfusable(f"{where}: attention with {', '.join(extra) or 'is_causal=False'} has no fused form")
    window = sliding_window or 0
    if attention_mask is not None and getattr(module.config, "model_type", None) not in _CAUSAL_MASKS:
        masked = window_of(attention_mask)
        if masked is None:
            raise Unfusable(f"{where}: attention with a mask of its own has no fused form")
        window = masked
    cap = float(softcap or 0) if caps_scores else 0.0
    scale = int(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    return mark_attention(query, key, value, scale, window, cap, sink=s_aux), None


# They make the causal mask themselves, whatever the attention; nothing else is in it.
_CAUSAL_MASKS = (
    "bart",
    "biogpt",
    "blenderbot",
    "blenderbot-small",
    "granitemoe",
    "granitemoeshared",
    "marian",
    "mbart",
    "opt",
    "pegasus",
    "persimmon",
)
# Arguments of attention functions that change the result; the others (position_ids, cache_position, ...) do not.
_MEANINGFUL = ("head_mask", "position_bias", "relative_position", "block_bias", "alibi")
