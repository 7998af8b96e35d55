"""The graph for ONNX Runtime GenAI, which pads the shorter texts of a batch on the right.

A row's next token then stands at the row's own end, over what was padding, and GroupQueryAttention counts row by row:

    seqlens_k = tokens of the row - 1    query_seqlens = those of them that are new    no attention bias

but for a bias that a model has of its own (alibi), which is made once more for a mask that hides nothing.

Nothing ever reads padding, so that windows and places count text alone. Over the same weights as the graph it is made
from, which is for padding on the left, and without the choices of `grouped.py`: GenAI's cache does not grow.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.onnx_pb import GraphProto, NodeProto

from qbl_trl.onnx import protos
from qbl_trl.onnx.choices import WHOLE, needed, settled
from qbl_trl.onnx.masks import BIASED

_SEQLENS, _BIAS, _QUERIES = 5, 10, 16  # inputs of GroupQueryAttention


def write_right_padded(source: Path, target: Path) -> None:
    """Write the graph of a file for texts that are padded on the right; no file where it cannot count them by rows."""
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    nodes = settled(graph, WHOLE)
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    if not attentions or any(len(node.input) <= _QUERIES for node in attentions):
        return
    biased = {name for node in attentions for name in node.input[_BIAS : _BIAS + 1] if name.startswith(BIASED)}
    for node in attentions:
        bias = f"right/{node.input[_BIAS]}" if node.input[_BIAS] in biased else ""
        node.input[_SEQLENS], node.input[_BIAS], node.input[_QUERIES] = "right/seqlens", bias, "right/queries"
    nodes = [*_counts(graph), *_without_padding(nodes, biased), *nodes]
    nodes = needed(nodes, (value.name for value in graph.output))
    read = {name for node in nodes for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name in read]
    for part in (graph.node, graph.initializer, graph.value_info):
        del part[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.save(model, target)


def _without_padding(nodes: list[NodeProto], values: set[str]) -> list[NodeProto]:
    """Nodes that make values as if all of the mask were text; their names begin with right/."""
    made = needed(nodes, values)
    names = {name: f"right/{name}" for node in made for name in node.output} | {"attention_mask": "right/text"}
    copies = [
        protos.node("Shape", ["attention_mask"], "right/shape"),
        protos.node("ConstantOfShape", ["right/shape"], "right/text", value=numpy_helper.from_array(np.array([1]))),
    ]
    for node in made:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"right/{node.name}"
        copy.input[:], copy.output[:] = ([names.get(name, name) for name in part] for part in (node.input, node.output))
        copies.append(copy)
    return copies if values else []


def _counts(graph: GraphProto) -> list[NodeProto]:
    """seqlens_k and query_seqlens from the mask."""
    for name, value in (("zero", [0]), ("axis", [1]), ("end", [2**62])):
        protos.constant(graph, f"right/{name}", np.array(value))
    protos.constant(graph, "right/one", np.array(1, np.int32))
    new = ["attention_mask", "right/start", "right/end", "right/axis"]
    return [
        protos.node("ReduceSum", ["attention_mask", "right/axis"], "right/tokens", keepdims=0),
        protos.node("Cast", ["right/tokens"], "right/counted", to=TensorProto.INT32),
        protos.node("Sub", ["right/counted", "right/one"], "right/seqlens"),
        protos.node("Shape", ["input_ids"], "right/length", start=1, end=2),
        protos.node("Sub", ["right/zero", "right/length"], "right/start"),
        protos.node("Slice", new, "right/new"),
        protos.node("ReduceSum", ["right/new", "right/axis"], "right/asked", keepdims=0),
        protos.node("Cast", ["right/asked"], "right/queries", to=TensorProto.INT32),
    ]
