"""Keys and values in 8 bits: a quarter of the cache, and of what every step reads of it.

    k8 = clamp(round(k / s), -128, 127)    s = 1.1 r / 127, one for every feature of every key head

r is the largest |k| that was measured (`ranges.py`). What other texts add has a tenth of room; beyond that, values are
clamped. GroupQueryAttention reads and writes such a cache, its scales constants of the graph.

A text that is read from its beginning attends in float32 and is rounded afterwards, which is both nearer and, for more
than a few hundred tokens, faster than the operator over 8 bits:

    y, k, v = GroupQueryAttention(q, k, v)    present = [k8, past[S:]]

where the rest of the past is that of a buffer as ONNX Runtime GenAI shares it, or nothing. An If chooses by lengths; a
branch that reads single tokens only (`prompts.py`) has no need of it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.onnx_pb import GraphProto, NodeProto

from qbl_trl.onnx import protos
from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.prompts import STEPS
from qbl_trl.onnx.ranges import Ranges

_PAST = slice(Input.PAST_KEY, Input.PAST_VALUE + 1)
_SCALES = slice(Input.KEY_SCALE, Input.VALUE_SCALE + 1)
_HEADROOM = 1.1
_SMALLEST = 1e-20  # of a range: a feature that is always zero


def quantize_caches(path: Path, ranges: Ranges) -> None:
    """Give every GroupQueryAttention of a graph file a cache of 8 bits, in place; weights are not touched.

    The last edit of all: it finds the branch of steps that `set_levels` made, which would not know its choices.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for name, largest in ranges.items():
        scale = np.maximum(largest, _SMALLEST)[None, :, None, :] * (_HEADROOM / 127)
        protos.constant(graph, _scale(name), scale.astype(np.float32))
    for name, place in (("start", 0), ("end", 2**62), ("axis", 2)):
        protos.constant(graph, f"cache/{name}", np.array([place], np.int64))
    protos.constant(graph, "cache/one", np.array(1, np.float32))
    protos.constant(graph, "cache/zero", np.array(0, np.int8))
    for value in [*graph.input, *graph.output]:
        if value.name.replace("present.", "past_key_values.") in ranges:
            value.type.tensor_type.elem_type = TensorProto.INT8
    _rewrite(graph, reads_texts=True)
    onnx.save(model, path)


def _rewrite(graph: GraphProto, reads_texts: bool) -> None:
    """One graph; `reads_texts`: from their beginning, not only steps over a cache."""
    for node in graph.node:
        for branch in protos.subgraphs(node):
            _rewrite(branch, reads_texts and branch.name != STEPS)
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attentions:
        return
    reshaped = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    changed = {name for node in attentions for name in (*node.input[_PAST], *node.output[1:])}
    for value in [value for value in graph.value_info if value.name in changed]:
        graph.value_info.remove(value)
    for value in graph.output:
        if value.name in changed:
            value.type.tensor_type.elem_type = TensorProto.INT8
    prefix = f"{graph.name}/cache"
    nodes = _from_beginning(prefix) if reads_texts else []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            names = [reshaped.get(name, name) for name in node.input[_PAST]]
            nodes.append(_choice(node, names, prefix) if reads_texts else _over_8_bits(node, names))
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _from_beginning(prefix: str) -> list[NodeProto]:
    """Whether the new tokens are all of the text."""
    return [
        protos.node("Shape", ["attention_mask"], f"{prefix}/length", start=1, end=2),
        protos.node("Shape", ["input_ids"], f"{prefix}/tokens", start=1, end=2),
        protos.node("Equal", [f"{prefix}/length", f"{prefix}/tokens"], f"{prefix}/from_beginning"),
    ]


def _choice(node: NodeProto, names: Sequence[str], prefix: str) -> NodeProto:
    over_cache = _over_8_bits(node, names)
    over_cache.output[:] = [f"{name}/cache" for name in node.output]
    text = [f"{node.output[0]}/text", *(f"{name}/joined" for name in node.output[1:])]
    branches = {
        "then_branch": _branch(f"{node.name}/text", _over_text(node, names, f"{prefix}/tokens"), text),
        "else_branch": _branch(f"{node.name}/cache", [over_cache], over_cache.output),
    }
    return helper.make_node("If", [f"{prefix}/from_beginning"], list(node.output), node.name, **branches)


def _branch(name: str, nodes: list[NodeProto], outputs: Sequence[str]) -> GraphProto:
    """A subgraph that gives what attention does: y in float32, keys and values in 8 bits."""
    kinds = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8)
    made = [helper.make_tensor_value_info(*output, None) for output in zip(outputs, kinds, strict=True)]
    return helper.make_graph(nodes, name, [], made)


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
        before.append(protos.node("Slice", [past, *none], f"{present}/nothing"))
        before.append(protos.node("Cast", [f"{present}/nothing"], f"{present}/empty", to=TensorProto.FLOAT))
        after.append(protos.node("Div", [f"{present}/text", _scale(name)], f"{present}/divided"))
        after.append(
            protos.node("QuantizeLinear", [f"{present}/divided", "cache/one", "cache/zero"], f"{present}/rounded")
        )
        after.append(protos.node("Slice", [past, tokens, "cache/end", "cache/axis"], f"{present}/rest"))
        after.append(protos.node("Concat", [f"{present}/rounded", f"{present}/rest"], f"{present}/joined", axis=2))
    return [*before, attention, *after]


def _scale(name: str) -> str:
    return f"{name}.scale"
