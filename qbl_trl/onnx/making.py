"""The gate and the graphs of an export: exact and through the gate first, then as they were asked for."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch

from qbl_trl.errors import ConfigError, ExportError, QblError, first_line
from qbl_trl.onnx.companions import Held, causal_lm
from qbl_trl.onnx.files import GENAI_FILE, MODEL_FILE, clear, graph_files, save
from qbl_trl.onnx.gate import Disagreement, Gate, Unrunnable
from qbl_trl.onnx.int8_cache import quantize_caches
from qbl_trl.onnx.int8_weights import Int8Weights
from qbl_trl.onnx.kernels import cuda_fallbacks
from qbl_trl.onnx.linears import LoweredLayer
from qbl_trl.onnx.packed_embeddings import has_packed_head, head_inputs, packed_tables
from qbl_trl.onnx.plan import Plan
from qbl_trl.onnx.prompts import set_levels
from qbl_trl.onnx.ranges import Ranges
from qbl_trl.onnx.reference import float32_reference
from qbl_trl.onnx.retype import float16_to_bfloat16
from qbl_trl.onnx.rewrite import Options, Rewritten, rewrite
from qbl_trl.onnx.right_padding import write_right_padded
from qbl_trl.onnx.skeleton import Unfusable, build_skeleton, fused_attention_traced
from qbl_trl.onnx.threads import TRACING
from qbl_trl.onnx.trace import Untraceable, trace
from qbl_trl.onnx.unpadded import choose_unpadded
from qbl_trl.parity import ParityReport, compare

_DIGITS_SHARE = 2.0  # times what 8-bit activations cost: beyond, a delta stays in float


@dataclass
class Built:
    """What is kept of a graph once it is written: its weights are the model's own.

    `shares`: past and present of its cache may be one buffer.
    """

    layers: list[LoweredLayer]
    operators: dict[str, int]
    fallbacks: tuple[str, ...]
    attention: str
    reason: str = ""
    shares: bool = False


def make_gate(held: Held, embedding_bits: int | None, plan: Plan) -> tuple[Gate, ParityReport | None]:
    """The logits that graphs are held against; with packed embeddings in the model from here on, and what they cost.

    Raises:
        ExportError: if the model does not run, as it is or over packed embeddings.
    """
    vocabulary = held.config.get_text_config().vocab_size
    reference = float32_reference(held.model())
    try:
        gate = Gate.on_noise(reference, vocabulary, plan.readable)
    except ValueError as error:  # as transformers has none for layers that all recur, in some models
        if isinstance(error, QblError):
            raise
        kind = type(held.decoder()).__name__
        raise ExportError(f"a {kind} of these settings does not run in transformers itself: {error}") from error
    if embedding_bits is None:
        return gate, None
    read = None
    if not has_packed_head(held.decoder()):
        read = head_inputs(reference, causal_lm(reference), plan.readable, plan.texts)
    del reference  # it may be a copy in float32
    held.take(packed_tables(held.decoder(), embedding_bits, read))
    try:
        packed = Gate.on_noise(float32_reference(held.model()), vocabulary, plan.readable)
    except (RuntimeError, ConfigError) as error:  # Gemma 4 with its towers reads a row, Mamba 2 the type
        if isinstance(error, ExportError | torch.OutOfMemoryError):
            raise
        raise ExportError(
            f"embedding_bits={embedding_bits}: a {type(held.decoder()).__name__} does not run over a packed "
            f"embedding, whose weight it reads itself ({first_line(error)}); leave it out"
        ) from error
    return packed, compare(gate.reference, packed.reference, packed.mask)


def make_exact(
    held: Held,
    options: Options,
    may_fall_back: bool,
    gate: Gate,
    tolerance: float | None,
    folder: Path,
) -> tuple[Built, tuple[ParityReport, ParityReport]]:
    """The graph in float32, through the gate: with the fused operator, or with standard ones where that is left open.

    Raises:
        ExportError: if none computes what the model computes.
    """
    try:
        built = _build(held, options, folder)
        held.let_go()
        whole, cached, built.shares = gate.pass_(folder, tolerance, buffer=built.attention == "gqa")
        return built, (whole, cached)
    except (Unfusable, Untraceable, Unrunnable, Disagreement) as refusal:
        if not options.attention:
            if (
                isinstance(refusal, Disagreement)
                and options.spelled_out
                and held.config._attn_implementation != "eager"
            ):
                raise ExportError(
                    f"{refusal}. Half precision is written with the model's eager attention, and the model runs "
                    f'{held.config._attn_implementation}; load it with attn_implementation="eager" to see whether it '
                    "is the two that differ"
                ) from None
            raise
        reason = getattr(refusal, "brief", str(refusal))
        if options.int8_cache:
            if not isinstance(refusal, Unfusable):
                raise
            raise ExportError(
                f'kv_cache_dtype="int8" needs GroupQueryAttention, which does not fit this model: {reason}'
            ) from None
        if not may_fall_back:
            raise ExportError(
                f'attention="{options.attention[0]}" does not fit this model: {reason}; "auto" tries the others'
            ) from None
        # A graph that is wrong says nothing of the next operator; one that was not written would fail there too.
        wrong = isinstance(refusal, (Unrunnable, Disagreement))
        left = options.attention[options.attention.index(built.attention) + 1 :] if wrong else ()
    clear(folder)
    built, reports = make_exact(held, replace(options, attention=left), bool(left), gate, tolerance, folder)
    built.reason = "; ".join(filter(None, (reason, built.reason)))
    return built, reports


def finish(
    held: Held,
    exact: Built,
    wanted: Options,
    gate: Gate,
    folder: Path,
    exact_folder: Path,
    cache: tuple[Ranges, Gate] | None,
) -> tuple[Built, ParityReport | None]:
    """The graphs of `folder` as they were asked for, and how far that is from the model where it is not exact.

    Args:
        cache: ranges of a cache of 8 bits, and the gate that looks at it.
    """
    final, lossy = exact, None
    if exact_folder is not folder:
        final, lossy = _as_wanted(held, wanted, gate, folder, exact_folder)
        if not (exact_folder / GENAI_FILE).is_file():  # the gate did not let it through
            (folder / GENAI_FILE).unlink(missing_ok=True)
    elif wanted.rounds:
        _set_levels(folder, wanted)
        lossy = None if cache else gate.look_at(folder)
    if cache is not None:
        ranges, own_text = cache
        for file in graph_files(folder):
            quantize_caches(file, ranges)
        lossy = own_text.look_at(folder, buffer=exact.shares)
        if lossy is None:
            raise ExportError('kv_cache_dtype="int8": ONNX Runtime has no kernel for such a cache on this processor')
    return final, lossy


def _as_wanted(
    held: Held, wanted: Options, gate: Gate, folder: Path, exact_folder: Path
) -> tuple[Built, ParityReport | None]:
    """The graph in the types asked for, and how far it is from the model: with digits only where they cost little.

    That is, where it is as near as the exact graph is once its activations have 8 bits.
    """
    built = _build(held, wanted, folder)
    held.let_go()
    _set_levels(folder, wanted)
    found = gate.look_at(folder)
    if not wanted.digits:
        return built, found
    _set_levels(exact_folder, wanted)
    factored = gate.look_at(exact_folder)
    if found and factored and found.mean_abs_difference <= _DIGITS_SHARE * factored.mean_abs_difference:
        return built, found
    clear(folder)
    return _as_wanted(held, replace(wanted, digits=False), gate, folder, exact_folder)


def _build(held: Held, options: Options, folder: Path) -> Built:
    graph, made = _trace_and_rewrite(held, options)
    save(graph, folder)
    write_right_padded(folder / MODEL_FILE, folder / GENAI_FILE, options.provider)
    if options.provider == "cuda":
        choose_unpadded(folder / MODEL_FILE)
    operators = dict(Counter(node.op_type for node in graph.graph.all_nodes()))
    fallbacks = cuda_fallbacks(graph) if options.provider == "cuda" else ()
    return Built(made.layers, operators, fallbacks, made.attention, made.reason)


def _set_levels(folder: Path, options: Options) -> None:
    if options.rounds:
        weights = Int8Weights(folder) if options.int8_prompts else None
        for file in graph_files(folder):
            set_levels(file, *options.levels, weights)


def _trace_and_rewrite(held: Held, options: Options) -> tuple[ir.Model, Rewritten]:
    model, fused = held.decoder(), bool(options.attention)
    traced = torch.float16 if options.dtype == torch.bfloat16 else options.dtype
    skeleton = build_skeleton(model, held.linears(), traced, fused, options.spelled_out)
    form = (traced, fused, options.spelled_out)
    if form not in held.traces:
        with TRACING, fused_attention_traced(skeleton) if fused else nullcontext():
            held.traces[form] = trace(skeleton, traced)
    graph = held.traces[form].clone()
    if traced != options.dtype:
        float16_to_bfloat16(graph)
    return graph, rewrite(graph, skeleton, options)
