"""Accuracy levels of a graph's MatMulNBits: one for a single new token, and another where more are read at once.

    y = If(one token to each row of input_ids): the graph at the level of steps, else the graph at the level of prompts

Both branches read the same initializers, so the file grows by its nodes alone; a session packs the weights for each
and holds them twice. 8-bit activations are several times faster for one token, whose cost is reading the weights; for
many, unpacking the weights once for a float32 product overtakes them where the processor multiplies floats well
(measured on AVX-512 VNNI: from 24 to 40 tokens on). Codes are the same in both: a delta that was written as digits for
the steps (`digits.py`) is read as digits by prompts too, so their activations are exact and the delta is not. Prompts
may read weights of their own instead (`int8_prompts.py`).

Where layers choose their attention (`grouped.py`), this If chooses for them: a single token over a growing cache is a
step, and everything else a prompt, so that no layer is left with an If of its own. With logits="last" a step cuts
nothing off.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from onnx.onnx_pb import GraphProto, ModelProto, NodeProto

from qbl_trl.onnx import protos
from qbl_trl.onnx.choices import GROUPED, WHOLE, as_branch, choose_, condition, needed, settled
from qbl_trl.onnx.int8_prompts import read_in_8_bits
from qbl_trl.onnx.int8_weights import Int8Weights
from qbl_trl.onnx.last import uncut

STEPS, PROMPTS = "steps", "prompts"  # names of the two branches


def set_levels(path: Path, steps: int, prompts: int, weights: Int8Weights | None = None) -> None:
    """Give every MatMulNBits of a graph file its `accuracy_level`, in place; its weights are not touched.

    Args:
        weights: what prompts read instead, at no level (`int8_prompts.py`); what they go on to read with codes has the
            level of steps then.
    """
    model = onnx.load(path, load_external_data=False)
    if weights is None and not any(node.op_type == "MatMulNBits" for node in model.graph.node):
        return
    if steps == prompts and weights is None:
        _set_level(model.graph.node, steps)
    else:
        _split(model, steps, prompts, weights)
    onnx.save(model, path)


def _split(model: ModelProto, steps: int, prompts: int, weights: Int8Weights | None) -> None:
    graph = model.graph
    chosen = condition(graph)
    first = _one_token(graph) if chosen is None else needed(graph.node, [chosen])
    made = needed(uncut(settled(graph, GROUPED)), (value.name for value in graph.output))
    step, prompt = as_branch(graph, STEPS, made), as_branch(graph, PROMPTS, settled(graph, WHOLE))
    _set_level(step.node, steps)
    _set_level(prompt.node, prompts if weights is None else steps)
    if weights is not None:
        read_in_8_bits(prompt, graph, weights)
    choose_(graph, first, chosen or "one_token", step, prompt)


def _one_token(graph: GraphProto) -> list[NodeProto]:
    protos.constant(graph, "one", np.array([1], np.int64))
    return [
        protos.node("Shape", ["input_ids"], "tokens", start=1, end=2),
        protos.node("Equal", ["tokens", "one"], "one_token"),
    ]


def _set_level(nodes: Iterable[NodeProto], level: int) -> None:
    for node in nodes:
        if node.op_type == "MatMulNBits":
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept + ([helper.make_attribute("accuracy_level", level)] if level else []))
        for inner in protos.subgraphs(node):
            _set_level(inner.node, level)
