"""Keys and values in 8 bits: a quarter of the cache, and of what every step reads of it.

    k8 = clamp(round(k / s), -128, 127)    s = 1.1 max|k| / 127, one for every feature of every key head

GroupQueryAttention reads and writes such a cache; its scales are constants of the graph, so the largest values have to
be known beforehand. They are measured on text: the caller's, or what the model writes when it is left to itself, from
random first tokens. Features that the rotary embedding turns into each other share one range, the norm of the pair,
which holds at any position; `text` may therefore be short.

A text that is read from its beginning attends in float32 and is quantized afterwards, which is both nearer and, for
more than a few hundred tokens, faster than the operator over 8 bits:

    y, k, v = GroupQueryAttention(q, k, v)    past' = [quantize(k), past[S:]]

where the rest of `past` is that of a buffer as ONNX Runtime GenAI shares it, or nothing. An If chooses by lengths; a
branch that reads single tokens only (`prompts.py`) has no need of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_pb import GraphProto, NodeProto
from torch import Tensor

from qbl_trl.onnx.choices import WHOLE, subgraphs
from qbl_trl.onnx.prompts import STEPS
from qbl_trl.onnx.session import OnnxLogits

Ranges = Mapping[str, np.ndarray]  # largest absolute values (heads, features) by the name of the cache's input

ROWS, LENGTH = 16, 64  # of the text that a model writes for this
_PAST, _ROTARY, _SCALES = slice(3, 5), 7, slice(12, 14)  # inputs of GroupQueryAttention
_HEADROOM = 1.1
_SMALLEST = 1e-6  # of a range: a feature that is always zero


def write_text(graph: OnnxLogits, vocabulary: int, first: int | None, rows: int, length: int) -> Tensor:
    """Tokens (rows, length) drawn from a model's own distribution; every other row begins with `first`, if a token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (rows, min(2, length)), generator=generator)
    if isinstance(first, int) and 0 <= first < vocabulary:
        tokens[::2, 0] = first
    cache, start = graph.empty_cache(rows), 0
    while tokens.shape[1] < length:
        logits, cache = graph.step(tokens[:, start:], torch.ones_like(tokens), cache)
        start = tokens.shape[1]
        drawn = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
    return tokens


def measure(graph: OnnxLogits, file: Path, texts: Iterable[Tensor]) -> Ranges:
    """The largest keys and values of texts, token ids (B, S) without padding.

    Args:
        graph: of the same file.
    """
    widths = _rotary_widths(onnx.load(file, load_external_data=False).graph)
    found = dict[str, np.ndarray]()
    for ids in texts:
        _, cache = graph.step(ids, torch.ones_like(ids), graph.empty_cache(ids.shape[0]))
        for name, values in cache.items():
            largest = _spread_over_pairs(values.astype(np.float32), widths.get(name, 0)).max((0, 2))
            found[name] = np.maximum(found.get(name, 0.0), largest)
    return found


def _spread_over_pairs(values: np.ndarray, width: int) -> np.ndarray:
    """Absolute values, with the norm of a pair in place of the two features of (..., width) that are rotated."""
    half = width // 2
    norm = np.hypot(values[..., :half], values[..., half:width])
    return np.concatenate([norm, norm, np.abs(values[..., width:])], -1)


def _rotary_widths(graph: GraphProto) -> dict[str, int]:
    """By the name of a cache of keys, how many features of each head are rotated."""
    sizes = {weight.name: weight.dims for weight in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    widths = {}
    for node in _attentions(graph):
        key, cos = node.input[_PAST.start], node.input[_ROTARY]
        if cos:
            widths[sources.get(key, key)] = 2 * sizes[cos][-1]
    return widths


def quantize_caches(path: Path, ranges: Ranges) -> None:
    """Give every GroupQueryAttention of a graph file a cache of 8 bits, in place; weights are not touched."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for name, largest in ranges.items():
        scale = np.maximum(largest, _SMALLEST)[None, :, None, :] * (_HEADROOM / 127)
        _constant(graph, _scale(name), scale.astype(np.float32))
        _constant(graph, _inverse(name), (1 / scale).astype(np.float32))
    for name, value in (("one", np.float32(1)), ("zero", np.int8(0)), ("start", [0]), ("end", [2**62]), ("axis", [2])):
        _constant(graph, f"cache/{name}", np.asarray(value))
    for value in [*graph.input, *graph.output]:
        if value.name in ranges or value.name.startswith("present."):
            value.type.tensor_type.elem_type = TensorProto.INT8
    _rewrite(graph, chosen=True)
    onnx.save(model, path)


def _rewrite(graph: GraphProto, chosen: bool) -> None:
    """One graph; `chosen`: texts from their beginning may be among what it reads."""
    for node in graph.node:
        for branch in subgraphs(node):
            _rewrite(branch, chosen and branch.name != STEPS)
    attentions = _attentions(graph)
    if not attentions:
        return
    reshaped = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    changed = {name for node in attentions for name in (*node.input[_PAST], *node.output[1:])}
    for value in [value for value in graph.value_info if value.name in changed]:
        graph.value_info.remove(value)
    for value in graph.output:
        if value.name in changed:
            value.type.tensor_type.elem_type = TensorProto.INT8
    prefix = f"{graph.name}/cache" if chosen else ""
    nodes = _whole_text(prefix) if chosen else []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            names = [reshaped.get(name, name) for name in node.input[_PAST]]
            nodes.append(_choice(node, names, prefix) if chosen else _over_8_bits(node, names))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _whole_text(prefix: str) -> list[NodeProto]:
    """Whether the new tokens are all of the text."""
    return [
        _node("Shape", ["attention_mask"], f"{prefix}/text", start=1, end=2),
        _node("Shape", ["input_ids"], f"{prefix}/tokens", start=1, end=2),
        _node("Equal", [f"{prefix}/text", f"{prefix}/tokens"], f"{prefix}/whole"),
    ]


def _choice(node: NodeProto, names: Sequence[str], prefix: str) -> NodeProto:
    inner = _over_8_bits(node, names)
    inner.output[:] = [f"{name}/{WHOLE}" for name in node.output]
    branches = {
        "then_branch": _branch(f"{node.name}/text", _over_text(node, names, f"{prefix}/tokens")),
        "else_branch": _branch(f"{node.name}/{WHOLE}", [inner]),
    }
    return helper.make_node("If", [f"{prefix}/whole"], list(node.output), node.name, **branches)


def _branch(name: str, nodes: list[NodeProto]) -> GraphProto:
    """A subgraph that gives what its attention does: y in float32, keys and values in 8 bits."""
    attention = next(node for node in nodes if node.op_type == "GroupQueryAttention")
    caches = [node.output[0] for node in nodes if node.op_type == "Concat"] or attention.output[1:]
    kinds = zip([attention.output[0], *caches], [TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8], strict=True)
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(*kind, None) for kind in kinds])


def _over_8_bits(node: NodeProto, names: Sequence[str]) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    inputs = [*node.input, *[""] * (_SCALES.stop - len(node.input))]
    inputs[_SCALES] = [_scale(name) for name in names]
    made.input[:] = inputs
    made.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    made.attribute.extend(helper.make_attribute(f"{part}_quant_type", "PER_CHANNEL") for part in "kv")
    return made


def _over_text(node: NodeProto, names: Sequence[str], tokens: str) -> list[NodeProto]:
    """Attention over the new tokens alone, and their keys and values before what else the cache holds."""
    attention = NodeProto()
    attention.CopyFrom(node)
    attention.output[:] = [f"{name}/text" for name in node.output]
    attention.input[_PAST] = [f"{present}/empty" for present in node.output[1:]]
    before, after = list[NodeProto](), list[NodeProto]()
    for past, name, present in zip(node.input[_PAST], names, node.output[1:], strict=True):
        none = ["cache/start", "cache/start", "cache/axis"]
        before.append(_node("Slice", [past, *none], f"{present}/nothing"))
        before.append(_node("Cast", [f"{present}/nothing"], f"{present}/empty", to=TensorProto.FLOAT))
        after.append(_node("Mul", [f"{present}/text", _inverse(name)], f"{present}/divided"))
        after.append(_node("QuantizeLinear", [f"{present}/divided", "cache/one", "cache/zero"], f"{present}/rounded"))
        after.append(_node("Slice", [past, tokens, "cache/end", "cache/axis"], f"{present}/rest"))
        after.append(_node("Concat", [f"{present}/rounded", f"{present}/rest"], f"{present}/joined", axis=2))
    return [*before, attention, *after]


def _node(op: str, inputs: Sequence[str], output: str, **attributes: int) -> NodeProto:
    return helper.make_node(op, inputs, [output], output, **attributes)


def _constant(graph: GraphProto, name: str, value: np.ndarray) -> None:
    graph.initializer.append(numpy_helper.from_array(value, name))


def _scale(name: str) -> str:
    return f"{name}.scale"


def _inverse(name: str) -> str:
    return f"{name}.inverse_scale"


def _attentions(graph: GraphProto) -> list[NodeProto]:
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]
