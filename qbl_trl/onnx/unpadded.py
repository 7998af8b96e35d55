"""Attention without a bias wherever no text of a batch is padded, on CUDA.

    y = If(the mask hides nothing: the graph without padding in its attention, else the graph as it is)

A bias leaves of ONNX Runtime's kernels for GroupQueryAttention there the slowest, which holds the scores of all queries
and keys at once: 2 * 4 * B * H * S * T bytes. A bias that a model has of its own (alibi) stays. Both branches read the
same initializers. ONNX Runtime GenAI, which pads on the right, reads a graph without the choice (`right_padding.py`).

Source: ONNX Runtime 1.31, contrib_ops/cuda/bert/group_query_attention.cc.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx.onnx_pb import NodeProto

from qbl_trl.onnx import protos
from qbl_trl.onnx.choices import as_branch, choose_, made_of_weights, needed
from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.masks import BIASED


def choose_unpadded(path: Path) -> None:
    """Give the graph of a file the choice, in place, where its attention has a bias for padding alone."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    padded = [node for node in attentions if _bias(node) and not _bias(node).startswith(BIASED)]
    if not padded:
        return
    constant = made_of_weights(graph)
    around = {name for node in constant for name in node.output}
    nodes = [node for node in graph.node if not around.issuperset(node.output)]
    whole = as_branch(graph, "padded", nodes, around)
    for node in padded:
        node.input[Input.BIAS] = ""
    text = as_branch(graph, "text", needed(nodes, (value.name for value in graph.output)), around)
    protos.constant(graph, "all_text/one", np.array(1))
    seen = [
        protos.node("ReduceMin", ["attention_mask"], "all_text/least", keepdims=0),
        protos.node("Equal", ["all_text/least", "all_text/one"], "all_text"),
    ]
    choose_(graph, [*constant, *seen], "all_text", text, whole)
    onnx.save(model, path)


def _bias(node: NodeProto) -> str:
    return str(node.input[Input.BIAS]) if len(node.input) > Input.BIAS else ""
