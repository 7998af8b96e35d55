"""From a traced graph with placeholders to the graph that is written."""

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from qbl_trl.errors import ExportError
from qbl_trl.onnx.activations import lower_activations
from qbl_trl.onnx.attention import fuse_attention
from qbl_trl.onnx.branches import choose_branches
from qbl_trl.onnx.caches import accept_guessed_caches, served
from qbl_trl.onnx.embeddings import lower_embeddings
from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute
from qbl_trl.onnx.grouped import add_grouped_steps
from qbl_trl.onnx.joining import join_projections
from qbl_trl.onnx.last import keep_last
from qbl_trl.onnx.linears import LinearLowering, LoweredLayer
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.masks import Masks
from qbl_trl.onnx.norms import RMS_NORM_OPSET, lower_norms
from qbl_trl.onnx.recurrences import lower_recurrences
from qbl_trl.onnx.rotary import lower_rotary_tables
from qbl_trl.onnx.shapes import answer_shapes, join_reshapes
from qbl_trl.onnx.skeleton import Skeleton
from qbl_trl.onnx.unasked import let_unasked_experts_rest
from qbl_trl.onnx.weights import in_smaller_groups

# They count the mask where nobody gives them positions; ORTModelForCausalLM would give places that count padding.
_COUNTS_MASK = ("biogpt",)


@dataclass(frozen=True)
class Options:
    """What a user chose, checked.

    Attributes:
        dtype: float type of the graph.
        lowering: see `linears.py`.
        attention: what the placeholders become, "gqa" or "attention", the first that fits; none: there are none.
        accuracy_level: attribute of MatMulNBits, or None.
        last_logits: write logits of the last position only, (B, 1, V).
        max_length: rows of the rotary tables.
        spelled_out: standard attention as single operators, as half precision needs it; traced so in float32 too, so
            that the graph compared with the model is the one that is written.
        provider: whose kernels run the graph; it is held against them.
        digits: whether block deltas may be written in 8 bits, see `digits.py`.
        prompt_level: accuracy level of prompts, see `prompts.py`; None: the same as `accuracy_level`.
        int8_prompts: prompts read weights of 8 bits instead, see `int8_prompts.py`.
        grouped_steps: let GroupQueryAttention give way where `grouped.py` is faster.
        fused_recurrences: convolutions and recurrences become operators of ONNX Runtime, not standard ones.
        int8_cache: the cache gets 8 bits after the graph is written, and only GroupQueryAttention reads such a one.
    """

    dtype: torch.dtype
    lowering: str
    attention: tuple[str, ...]
    accuracy_level: int | None
    last_logits: bool
    max_length: int
    spelled_out: bool = False
    provider: str = "cpu"
    digits: bool = False
    prompt_level: int | None = None
    int8_prompts: bool = False
    grouped_steps: bool = False
    fused_recurrences: bool = True
    int8_cache: bool = False

    @property
    def levels(self) -> tuple[int, int]:
        """Accuracy levels of steps and of prompts; float32 is 0."""
        steps = self.accuracy_level or 0
        return steps, steps if self.prompt_level is None else self.prompt_level

    @property
    def rounds(self) -> bool:
        """Whether something is rounded that layers multiply: the graph is written first, and edited for it."""
        return any(self.levels) or self.int8_prompts


@dataclass(frozen=True)
class Rewritten:
    """How each layer was written, and attention; with the reason if that is not the first choice."""

    layers: list[LoweredLayer]
    attention: str = "standard"
    reason: str = ""


def rewrite(model: ir.Model, skeleton: Skeleton, options: Options) -> Rewritten:
    """Replace every placeholder of `model`, in place.

    Raises:
        Unfusable: if fused attention does not fit (trace again with standard operators).
        ExportError: if a layer cannot be lowered as asked.
    """
    editor = Editor(model, options.dtype)
    linears, embeddings = skeleton.linears, skeleton.embeddings
    if options.provider == "cuda":
        linears = {name: in_smaller_groups(one, one.in_features) for name, one in linears.items()}
        embeddings = {name: in_smaller_groups(one, one.embedding_dim) for name, one in embeddings.items()}
    answer_shapes(editor, skeleton)
    if skeleton.model.config.model_type in _COUNTS_MASK:
        Masks(editor).answer_positions()
    lower_activations(editor)
    lower_recurrences(editor, options.fused_recurrences, options.provider)
    attention = "standard", ""
    if options.attention:
        attention = fuse_attention(editor, skeleton, options.attention, options.max_length, options.provider)
    else:
        lower_rotary_tables(editor, skeleton.rotary, options.max_length)
    if options.last_logits:
        keep_last(editor)
    lower_norms(editor, skeleton.norms)
    shared = lower_embeddings(editor, embeddings)
    linears = join_projections(editor, choose_branches(linears, options.lowering))
    accept_guessed_caches(editor, served(skeleton.model.config))
    lowering = LinearLowering(
        editor,
        options.lowering,
        shared,
        options.levels,
        options.digits,
        options.provider,
    )
    for node in [node for node in editor.graph if node.domain == TRACE_DOMAIN and node.op_type == "Linear"]:
        lowering.lower(node, linears[attribute(node, "name")])
    if options.grouped_steps:
        add_grouped_steps(editor)
    _finish(model)
    if options.provider == "cpu":
        let_unasked_experts_rest(editor)
    return Rewritten(lowering.layers, *attention)


def _finish(model: ir.Model) -> None:
    left = sorted(
        {
            f"{node.op_type}({node.attributes['name'].value if 'name' in node.attributes else ''})"
            for node in model.graph
            if node.domain == TRACE_DOMAIN
        }
    )
    if left:
        raise ExportError(
            f'placeholders were left in the graph: {", ".join(left)}, a defect of qbl_trl; try attention="standard"'
        )
    join_reshapes(model.graph)
    model.graph.opset_imports[""] = RMS_NORM_OPSET
    model.graph.opset_imports[MS_DOMAIN] = 1
    model.graph.opset_imports.pop(TRACE_DOMAIN, None)
    cleanup = ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.TopologicalSortPass(),
    )
    cleanup(model)
