"""What is known of shapes when a graph is written is not asked at every step."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qbl_trl import export_onnx
from qbl_trl.onnx.graph import Editor, constant_of
from qbl_trl.onnx.shapes import answer_shapes
from qbl_trl.onnx.skeleton import Skeleton
from tests.onnx.architectures import ARCHITECTURES, build
from tests.onnx.models import merged_llama, operators

ARITHMETIC = ("Shape", "Gather", "Squeeze", "Unsqueeze", "Concat", "Transpose")


@pytest.mark.parametrize("attention", ["attention", "gqa"])
def test_a_layer_adds_no_arithmetic_on_shapes(tmp_path, attention):
    counts = []
    for layers in (2, 4):
        export_onnx(merged_llama(num_hidden_layers=layers), tmp_path / str(layers), attention=attention)
        found = operators(tmp_path / str(layers))
        counts.append([found.count(name) for name in ("Shape", "Gather", "Squeeze", "Transpose")])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "case",
    [
        "qwen3 with its own head size",
        "gemma2 with windows",
        "phi3 with joined projections",
        "starcoder2, which Optimum does not know",
        "gpt_neox with partial rotary",
        "olmo2 with norms behind",
        "gemma3 with norms of heads",
        "stablelm, which calls torch's attention",
        "xglm with positions as sinusoids",
    ],
)
def test_neither_do_layers_whose_heads_the_trace_takes_apart(tmp_path, case):
    kind, settings, _ = ARCHITECTURES[case]
    counts = []
    for layers in (2, 4):
        export_onnx(build(kind, {**settings, "num_hidden_layers": layers}), tmp_path / str(layers))
        found = operators(tmp_path / str(layers))
        counts.append([found.count(name) for name in ARITHMETIC])
    assert counts[0] == counts[1]


def test_a_width_that_the_trace_asked_for_is_written_as_a_number(tmp_path):
    kind, settings, _ = ARCHITECTURES["phi3 with joined projections"]
    export_onnx(build(kind, settings), tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    asked = {node.input[0] for node in graph.node if node.op_type == "Shape"}
    assert not any("gate_up_proj" in name for name in asked)
    assert "GroupQueryAttention" in operators(tmp_path / "out", inner=True)


@pytest.mark.parametrize("last", [False, True])
def test_the_logits_have_the_axes_of_the_token_ids_by_name(tmp_path, last):
    kind, settings, _ = ARCHITECTURES["cohere2 with windows and interleaved angles"]  # scales what its head answers
    export_onnx(build(kind, settings), tmp_path / "out", logits="last" if last else "all")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    (logits,) = [value for value in graph.output if value.name == "logits"]
    batch, length, _ = logits.type.tensor_type.shape.dim
    assert batch.dim_param == "batch_size"
    assert (length.dim_value == 1) if last else (length.dim_param == "sequence_length")


def reshaped(source_of_rows, axis):
    """Reshape(Softmax(x) or Cast(x), [rows of `source_of_rows` along `axis`, -1, 4]) as a tracer writes it."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x, other = (ir.Value(name=name, shape=ir.Shape(["b", "s", 8]), type=kind) for name in ("x", "other"))
    graph = ir.Graph([x, other], [], nodes=[], opset_imports={"": 18})
    editor = Editor(ir.Model(graph, ir_version=10), torch.float32)
    kinds = {"behind a softmax": ("Softmax", {}), "kept": ("Transpose", {"perm": [0, 1, 2]})}
    kinds["moved"] = ("Transpose", {"perm": [0, 2, 1]})
    name, attributes = kinds.get(source_of_rows, ("Cast", {}))
    data = ir.node(name, [x], attributes)
    source = {"another": other}.get(source_of_rows, x)
    shape = ir.node("Shape", [source])
    gather = ir.node("Gather", [shape.outputs[0], editor.constant(axis)])
    rows = ir.node("Unsqueeze", [gather.outputs[0], editor.constant([0])])
    target = ir.node("Concat", [rows.outputs[0], editor.constant([-1]), editor.constant([4])], {"axis": 0})
    result = ir.node("Reshape", [data.outputs[0], target.outputs[0]])
    for node in (data, shape, gather, rows, target, result):
        graph.append(node)
    answer_shapes(editor, Skeleton(torch.nn.Identity(), {}))
    return constant_of(result.inputs[1])


def test_rows_of_what_is_reshaped_are_copied():
    np.testing.assert_array_equal(reshaped("itself", 0), [0, -1, 4])


def test_they_are_copied_behind_what_leaves_the_first_two_axes_where_they_are():
    np.testing.assert_array_equal(reshaped("kept", 0), [0, -1, 4])


@pytest.mark.parametrize(("source", "axis"), [("another", 0), ("behind a softmax", 0), ("itself", 1), ("moved", 0)])
def test_rows_that_may_be_others_are_asked_for(source, axis):
    assert reshaped(source, axis) is None


@pytest.mark.parametrize(
    ("width", "constant", "known"), [(8, (8,), True), (8, (), True), (1, (8,), False), (8, (3, 1, 8), False)]
)
def test_a_product_with_a_constant_has_a_shape_where_the_constant_does_not_widen_it(width, constant, known):
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["b", "s", width]), type=kind)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18})
    editor = Editor(ir.Model(graph, ir_version=10), torch.float32)
    product = ir.node("Mul", [x, editor.constant(np.ones(constant, np.float32), np.float32)])
    graph.append(product)
    answer_shapes(editor, Skeleton(torch.nn.Identity(), {}))
    assert (product.outputs[0].shape is not None) == known
