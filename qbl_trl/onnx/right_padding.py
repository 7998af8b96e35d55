"""The graph for ONNX Runtime GenAI, which pads the shorter texts of a batch on the right.

A row's next token then stands at the row's own end, over what was padding, and GroupQueryAttention counts row by row:

    seqlens_k = tokens of the row - 1    query_seqlens = those of them that are new    no attention bias

Nothing ever reads padding, so that windows and places count text alone. Over the same weights as the graph it is made
from, which is for padding on the left, and without the choices of `grouped.py`: GenAI's cache does not grow.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from onnx.onnx_pb import GraphProto, NodeProto

from qbl_trl.onnx import protos
from qbl_trl.onnx.choices import WHOLE, needed, settled

_SEQLENS, _BIAS, _QUERIES = 5, 10, 16  # inputs of GroupQueryAttention


def write_right_padded(source: Path, target: Path) -> None:
    """Write the graph of a file for texts that are padded on the right; no file where it cannot count them by rows."""
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    nodes = settled(graph, WHOLE)
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    if not attentions or any(len(node.input) <= _QUERIES for node in attentions):
        return
    for node in attentions:
        node.input[_SEQLENS], node.input[_BIAS], node.input[_QUERIES] = "right/seqlens", "", "right/queries"
    nodes = needed([*_counts(graph), *nodes], (value.name for value in graph.output))
    read = {name for node in nodes for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name in read]
    for part in (graph.node, graph.initializer, graph.value_info):
        del part[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.save(model, target)


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
