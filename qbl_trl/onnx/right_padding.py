"""The graph for ONNX Runtime GenAI, which pads the shorter texts of a batch on the right.

A row's next token then stands at the row's own end, over what was padding, and GroupQueryAttention counts row by row:

    seqlens_k = tokens of the row - 1    query_seqlens = those of them that are new    no attention bias

but for a bias that a model has of its own (alibi), which is made once more for a mask that hides nothing. Places of new
tokens that a graph counts from the length of its cache, for learned positions (Bart), are counted by rows as well.

Nothing ever reads padding, so that windows and places count text alone. Over the same weights as the graph it is made
from, which is for padding on the left, and without the choices of `grouped.py`: GenAI's cache does not grow.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.onnx_pb import GraphProto, NodeProto

from qbl_trl.onnx import protos
from qbl_trl.onnx.choices import WHOLE, needed, settled, values_read
from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.layer_caches import STATES
from qbl_trl.onnx.masks import BIASED


def write_right_padded(source: Path, target: Path, provider: str) -> None:
    """Write the graph of a file for texts that are padded on the right; no file where it cannot count them by rows.

    On a CPU it needs the lengths of queries for that. On CUDA it does without: a prompt is then read from the start of
    the cache, and of several texts only single tokens go on.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    nodes = settled(graph, WHOLE)
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    told = [len(node.input) > Input.QUERY_LENGTHS for node in attentions]
    if not attentions or not (all(told) or provider == "cuda"):
        return
    biases = {name for node in attentions for name in node.input[Input.BIAS : Input.BIAS + 1]}
    biased = {name for name in biases if name.startswith(BIASED)}
    for node, is_told in zip(attentions, told, strict=True):
        bias = node.input[Input.BIAS]
        node.input[Input.BIAS] = f"right/{bias}" if bias in biased else ""
        node.input[Input.SEQUENCE_LENGTHS] = "right/seqlens"
        if is_told:
            node.input[Input.QUERY_LENGTHS] = "right/queries"
    _state_sizes(graph)
    nodes = [*_counts(graph), *_without_padding(nodes, biased), *_placed_by_rows(nodes)]
    nodes = needed(nodes, (value.name for value in graph.output))
    read = {name for node in nodes for name in values_read(node)}
    kept = [weight for weight in graph.initializer if weight.name in read]
    for part in (graph.node, graph.initializer, graph.value_info):
        del part[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.save(model, target)


def _state_sizes(graph: GraphProto) -> None:
    """Give caches the sizes they have, which GenAI reads off them: for ORTModelForCausalLM they may be left open."""
    made = {value.name: value.type.tensor_type.shape.dim for value in graph.output}
    for value in graph.input:
        present = made.get(value.name.replace("past_key_values", "present"))
        if value.name.startswith("past_key_values") and present is not None and not value.name.endswith(STATES):
            for axis in (1, 3):
                value.type.tensor_type.shape.dim[axis].CopyFrom(present[axis])


def _without_padding(nodes: list[NodeProto], values: set[str]) -> list[NodeProto]:
    """Nodes that make values as if all of the mask were text; their names begin with right/."""
    made = needed(nodes, values)
    names = {name: f"right/{name}" for node in made for name in node.output} | {"attention_mask": "right/text"}
    copies = [
        protos.node("Shape", ["attention_mask"], "right/shape"),
        protos.node("ConstantOfShape", ["right/shape"], "right/text", value=numpy_helper.from_array(np.array([1]))),
    ]
    for node in made:
        copy = protos.renamed(node, names)
        copy.name = f"right/{node.name}"
        copies.append(copy)
    return copies if values else []


def _placed_by_rows(nodes: list[NodeProto]) -> list[NodeProto]:
    """The nodes, with places (B, S) from the mask where they count (S,) from the length of the cache.

    What is made of places keeps its one axis of them, now B * S long, up to the table that it is read from.
    """
    placed, made, counted = list[NodeProto](), set[str](), set[str]()
    for node in nodes:
        if _counts_on(node, placed, counted):
            placed.append(protos.node("Reshape", ["right/places", "right/flat"], node.output[0]))
            made.add(node.output[0])
            continue
        if node.op_type == "Gather" and node.input[1] in made:
            rows = f"right/{node.output[0]}/rows"
            placed.append(protos.node("Reshape", [node.input[1], "right/rows"], rows))
            node.input[1] = rows
        elif made & set(node.input):
            made.update(node.output)
        if node.op_type == "Range":
            counted.update(node.output)
        placed.append(node)
    return placed


def _counts_on(node: NodeProto, before: list[NodeProto], counted: set[str]) -> bool:
    """Whether a node counts new tokens, (S,), on from the length of the cache: Range(length, ...), Range + length.

    Args:
        counted: outputs of the Ranges before it.
    """
    if node.op_type == "Add":
        first, second = node.input if node.input[0] in counted else reversed(node.input)
        return first in counted and not _reads_cache(needed(before, [first])) and _reads_cache(needed(before, [second]))
    return node.op_type == "Range" and _reads_cache(needed(before, node.input))


def _reads_cache(nodes: list[NodeProto]) -> bool:
    """Whether they ask how long the cache is; what attention made of it is no length."""
    attended = any(node.op_type == "GroupQueryAttention" for node in nodes)
    return not attended and any(name.startswith("past_key_values") for node in nodes for name in node.input)


def _counts(graph: GraphProto) -> list[NodeProto]:
    """From the mask: seqlens_k and query_seqlens, (B,) int32, and the places of new tokens in their rows, (B, S)."""
    for name, value in (("zero", [0]), ("one", 1), ("axis", [1]), ("end", [2**62]), ("flat", [-1])):
        protos.constant(graph, f"right/{name}", np.array(value))
    new = ["right/start", "right/end", "right/axis"]
    return [
        protos.node("ReduceSum", ["attention_mask", "right/axis"], "right/tokens", keepdims=0),
        protos.node("Sub", ["right/tokens", "right/one"], "right/last"),
        protos.node("Cast", ["right/last"], "right/seqlens", to=TensorProto.INT32),
        protos.node("Shape", ["input_ids"], "right/rows"),
        protos.node("Shape", ["input_ids"], "right/length", start=1, end=2),
        protos.node("Sub", ["right/zero", "right/length"], "right/start"),
        protos.node("Slice", ["attention_mask", *new], "right/new"),
        protos.node("ReduceSum", ["right/new", "right/axis"], "right/asked", keepdims=0),
        protos.node("Cast", ["right/asked"], "right/queries", to=TensorProto.INT32),
        protos.node("CumSum", ["attention_mask", "right/one"], "right/counted"),
        protos.node("Slice", ["right/counted", *new], "right/reached"),
        protos.node("Sub", ["right/reached", "right/one"], "right/places"),
    ]
