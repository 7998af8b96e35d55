"""export_onnx: what is written computes the same function, and nothing is written otherwise."""

import json
import random
import re
import shutil

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from peft import get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, merge, verify
from qbl_trl.errors import ExportError
from qbl_trl.onnx.gate import Gate
from qbl_trl.onnx.kernels import cuda_fallbacks, cuda_table
from qbl_trl.onnx.linears import LinearLowering
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import ParityReport
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.onnx.architectures import ARCHITECTURES, build
from tests.onnx.models import merged_llama, operators, padded_batch, quantize
from tests.tiny import tiny_llama

# fp32 on both sides; logits of the tiny models are below 1, sums are taken in different orders
FP32 = 5e-6


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = merged_llama()
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    return model, folder, export_onnx(model, folder)


def test_a_merged_model_becomes_a_graph_with_the_same_logits(exported):
    model, folder, report = exported
    ids, mask = padded_batch()
    assert verify(model, folder, ids, mask).max_abs_difference < FP32
    assert report.parity.max_abs_difference < FP32
    assert report.parity_cached.max_abs_difference < FP32


def test_the_graph_passes_onnx_checker_and_shape_inference(exported):
    _, folder, _ = exported
    onnx.checker.check_model(str(folder / "model.onnx"))
    onnx.shape_inference.infer_shapes_path(str(folder / "model.onnx"), str(folder.parent / "inferred.onnx"))


def test_projections_of_one_input_are_one_operator_and_share_the_pooling(exported):
    model, folder, _ = exported
    count = operators(folder).count
    layers = model.config.num_hidden_layers
    assert count("MatMulNBits") == 4 * layers  # q k v, o, gate up, down
    assert count("ReduceSum") == 4 * layers
    assert count("If") == operators(folder, inner=True).count("GroupQueryAttention") == layers


def test_no_placeholder_and_no_dequantized_weight_is_left(exported):
    model, folder, report = exported
    weights = sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, GroupQuantLinear))
    floats = sum(p.nbytes for p in {id(p): p for p in model.parameters() if p.is_floating_point()}.values())
    assert report.bytes < 2 * weights + floats + 120_000  # scales, deltas, rotary tables, graph, configuration
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {entry.domain for entry in graph.opset_import} == {"", "com.microsoft"}


def test_the_callers_model_is_left_alone(exported):
    model, _, _ = exported
    assert type(model.model.layers[0].mlp.up_proj) is GroupQuantLinear
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)
    assert all(parameter.dtype in (torch.float32, torch.uint8) for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_every_attention_keeps_left_padding_right_over_the_cache(tmp_path, attention):
    report = export_onnx(merged_llama(), tmp_path / "out", attention=attention)
    assert report.attention == attention
    assert report.parity_cached.max_abs_difference < FP32


def test_float_zero_points_and_factored_give_the_same_outputs(tmp_path, exported):
    model, factored, _ = exported
    export_onnx(model, tmp_path / "zeros", lowering="float_zero_point")
    ids, mask = padded_batch()
    assert operators(tmp_path / "zeros").count("ReduceSum") == 0
    # z' is rounded to fp32 near 8: 2^-21 codes of a scale below 0.1
    assert verify(factored, tmp_path / "zeros", ids, mask).max_abs_difference < 2e-5


def test_a_base_with_fractional_zero_points_is_exact(tmp_path):
    model = tiny_llama()
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            codes = torch.randint(0, 16, layer.weight.shape, dtype=torch.uint8)
            groups = layer.in_features // 32
            scales = torch.rand(layer.out_features, groups) * 0.05
            zeros = torch.rand(layer.out_features, groups) * 15
            packed = GroupQuantLinear.from_affine(Affine(codes, scales, zeros), bits=4, group_size=32)
            model.set_submodule(name, packed)
    report = export_onnx(model, tmp_path / "out")
    assert report.parity.max_abs_difference < 1e-4
    written = {(layer.operator, layer.correction) for layer in report.layers if layer.name != "lm_head"}
    assert written == {("MatMulNBits", "fractional zeros")}  # nothing was trained


def test_a_symmetric_base_writes_no_zero_points(tmp_path):
    export_onnx(quantize(tiny_llama(), p=None, symmetric=True), tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "MatMulNBits")


def test_a_tied_embedding_is_written_once(exported):
    _, folder, _ = exported
    names = [tensor.name for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_int8_activations_are_reported_beside_the_exact_figures(tmp_path):
    report = export_onnx(merged_llama(), tmp_path / "out", accuracy_level=4)
    assert report.parity.max_abs_difference < FP32
    assert FP32 < report.parity_as_written.max_abs_difference < 0.1
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    levels = [a.i for n in nodes if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [4] * 8


def test_a_graph_that_its_types_spoil_is_not_written(tmp_path, monkeypatch):
    spoilt = ParityReport(48, 50.0, 5.0, 2.0, 0.1, 0)
    monkeypatch.setattr(Gate, "look_at", lambda *_: spoilt)
    with pytest.raises(ExportError, match=r"float16, accuracy levels \(4, 4\)\), the graph is no longer the model"):
        export_onnx(merged_llama(), tmp_path / "out", dtype="float16", accuracy_level=4)
    assert not list(tmp_path.iterdir())
    report = export_onnx(merged_llama(), tmp_path / "out", dtype="float16", accuracy_level=4, tolerance=None)
    assert report.parity_as_written == spoilt


def test_a_graph_that_overflows_in_half_precision_is_not_written(tmp_path):
    model = merged_llama()
    model.model.norm.weight.data *= 1e6
    with pytest.raises(
        ExportError, match=r"float16, accuracy levels \(0, 0\)\), the graph is no longer the model: max .*inf"
    ):
        export_onnx(model, tmp_path / "out", dtype="float16", tolerance=1e4)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_reported_beside_the_exact_figures(tmp_path):
    report = export_onnx(merged_llama(), tmp_path / "out", dtype="float16")
    assert report.parity.max_abs_difference < FP32
    assert report.parity_as_written.max_abs_difference < 5e-3  # fp16 keeps 11 bits


@pytest.mark.parametrize("kind", ["Llama", "Gemma3Text"])
def test_a_model_loaded_in_16_bits_is_held_against_itself_in_float32(tmp_path, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=100)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=GroupQuantConfig(), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "packed")
    assert export_onnx(tmp_path / "packed", tmp_path / "out").parity.max_abs_difference < FP32


def test_the_report_is_text_and_json(exported):
    _, folder, report = exported
    assert json.loads(json.dumps(report.to_dict()))["attention"] == "gqa"
    assert str(folder) in str(report)
    assert "MatMulNBits + block delta" in str(report)
    assert "parity over the cache" in str(report)
    counted = re.search(r"^nodes: (.*), (\d+) others \((\d+) kinds\)$", str(report), re.MULTILINE)
    shown = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", counted[1])}
    assert shown.items() <= report.operators.items()
    assert sum(shown.values()) + int(counted[2]) == sum(report.operators.values())
    assert len(shown) + int(counted[3]) == len(report.operators)


def test_a_full_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not empty"):
        export_onnx(merged_llama(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_a_folder_is_replaced_when_told_to(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    export_onnx(merged_llama(), target, overwrite=True)
    assert not (target / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(LinearLowering, "_branch", lambda *inputs: inputs[3])  # y without its correction
    with pytest.raises(ExportError, match=r"differ from the torch model's by up to .* allowed: 6e-04"):
        export_onnx(merged_llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"provider": "tpu"}, "provider='tpu' is not known"),
        ({"lowering": "fast"}, "lowering='fast' is not known"),
        ({"attention": "flash"}, "attention='flash' is not known"),
        ({"dtype": "bfloat16"}, "dtype=bfloat16 has no kernels on provider='cpu'; allowed there: float32, float16"),
        ({"provider": "cuda", "dtype": torch.float32}, "dtype=float32 has no kernels on provider='cuda'"),
        ({"accuracy_level": 7}, "accuracy_level=7 is not known"),
        ({"accuracy_level": 4.0}, "accuracy_level=4.0 is not known"),
        ({"prompt_accuracy_level": True}, "prompt_accuracy_level=True is not known"),
        ({"provider": "cuda", "prompt_accuracy_level": 0}, "only provider='cpu' has"),
        ({"provider": "cuda", "accuracy_level": 4}, "accuracy_level chooses between kernels that only provider='cpu'"),
        ({"prompt_accuracy_level": 0}, "prompt_accuracy_level=0 changes nothing without accuracy_level=4"),
        ({"prompt_accuracy_level": 2}, "prompt_accuracy_level=2 changes nothing without accuracy_level=4"),
        ({"logits": "first"}, "logits='first' is not known"),
        ({"max_length": 0}, "max_length=0 must be a whole number of at least 4"),
        ({"max_length": 12.5}, "max_length=12.5 must be a whole number"),
        ({"tolerance": "x"}, "tolerance='x' must be a number"),
        ({"tolerance": float("nan")}, "tolerance=nan must be a number"),
        ({"tokenizer": 5}, "tokenizer takes a tokenizer, a folder or a model id, not 5"),
        ({"tokenizer": "/nowhere"}, "tokenizer='/nowhere' is no folder, nor a model id"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_any_work(tmp_path, wrong, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(merged_llama(), tmp_path / "out", **wrong)
    assert not list(tmp_path.iterdir())


def test_float_zero_points_refuse_an_adapter_that_varies_inside_a_group(tmp_path):
    model = quantize(tiny_llama(), p=16)
    with pytest.raises(
        ExportError, match="in_factor a multiple of the quantization group of 32, this one has in_factor=16"
    ):
        export_onnx(model, tmp_path / "out", lowering="float_zero_point")
    assert not list(tmp_path.iterdir())


def test_float_zero_points_of_8_bits_are_refused_where_there_is_no_kernel(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig(bits=8))
    model = get_peft_model(model, QBLoRAConfig(r=2, quantization_aware=True, init_lora_weights=False))
    with pytest.raises(ExportError, match=r"no CPU kernel for 8-bit codes with fractional zero points"):
        export_onnx(merge(model), tmp_path / "out", lowering="float_zero_point")
    assert not (tmp_path / "out").exists()


def test_a_layer_without_an_exact_form_is_refused_by_name(tmp_path):
    model = tiny_llama()

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qweight = torch.nn.Buffer(torch.zeros(4, 4, dtype=torch.int32))

        def forward(self, x):
            return x

    model.model.layers[0].mlp.up_proj = Odd()
    with pytest.raises(ExportError, match=r"model.layers.0.mlp.up_proj: a Odd has no exact ONNX form"):
        export_onnx(model, tmp_path / "out")


def test_something_that_is_no_decoder_is_refused(tmp_path):
    with pytest.raises(ExportError, match="a Linear is no decoder"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(ExportError, match="holds neither a model"):
        export_onnx(tmp_path, tmp_path / "out")
    with pytest.raises(ExportError, match="takes a model or a folder, not a int"):
        export_onnx(3, tmp_path / "out")


def test_missing_weights_and_a_path_that_leaves_the_folder_are_refused(tmp_path, exported):
    _, folder, _ = exported
    copy = shutil.copytree(folder, tmp_path / "copy")
    graph = onnx.load(copy / "model.onnx", load_external_data=False)
    (copy / "model.onnx.data").rename(copy / "elsewhere")
    with pytest.raises(ExportError, match=r"needs model.onnx.data, which is missing"):
        OnnxLogits(copy)
    (copy / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(ExportError, match="is too short for weight"):
        OnnxLogits(copy)
    (tmp_path / "outside").write_bytes((copy / "elsewhere").read_bytes())
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside"
    onnx.save(graph, copy / "model.onnx")
    with pytest.raises(ExportError, match="outside the model's folder"):
        OnnxLogits(copy)


def test_two_graphs_in_one_folder_are_refused(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ExportError, match=r"expected exactly one \.onnx file, found a\.onnx, b\.onnx"):
        OnnxLogits(tmp_path)


def test_a_cuda_graph_names_what_would_fall_back(tmp_path):
    report = export_onnx(merged_llama(), tmp_path / "out", provider="cuda")
    assert (report.dtype, report.attention, report.fallbacks) == ("float16", "gqa", ())
    standard = export_onnx(merged_llama(), tmp_path / "two", provider="cuda", dtype="bfloat16", attention="standard")
    assert standard.parity_as_written is None  # no CPU kernels for bfloat16
    assert standard.fallbacks == ()  # angles are computed in float32


def test_an_operator_or_type_without_a_cuda_kernel_is_named():
    half = ir.TensorType(ir.DataType.BFLOAT16)
    x = ir.Value(name="x", type=half, shape=ir.Shape([2]))
    cos, odd = ir.node("Cos", [x]), ir.node("BitShift", [x], {"direction": "LEFT"})
    graph = ir.Graph([x], [cos.outputs[0], odd.outputs[0]], nodes=[cos, odd], opset_imports={"": 23})
    found = cuda_fallbacks(ir.Model(graph, ir_version=10))
    assert found == ("1 x BitShift: not among the CUDA kernels listed", "1 x Cos: no CUDA kernel for bfloat16")
    assert "OperatorKernels.md" in cuda_table()["source"]


@pytest.mark.parametrize(
    "case", ["opt with learned positions", "gptj, which rotates in a way of its own", "phi with grouped heads"]
)
def test_what_the_tracer_writes_has_cuda_kernels(tmp_path, case):
    kind, settings, _ = ARCHITECTURES[case]
    report = export_onnx(build(kind, settings), tmp_path / "out", provider="cuda", attention="standard")
    assert report.fallbacks == ()


def test_half_precision_works_with_standard_attention(tmp_path):
    report = export_onnx(merged_llama(), tmp_path / "out", dtype="float16", attention="standard")
    assert report.parity_as_written.max_abs_difference < 5e-3  # fp16 keeps 11 bits


def test_low_rank_keeps_the_factors_and_refuses_a_merged_layer(tmp_path):
    with pytest.raises(ExportError, match="keeps the two factors of an adapter, this layer holds their product"):
        export_onnx(merged_llama(), tmp_path / "out", lowering="low_rank")
    assert not list(tmp_path.iterdir())


def test_scales_of_16_bits_stay_so_in_the_file(exported):
    _, folder, _ = exported
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    stored = [tensor for tensor in graph.initializer if tensor.name.endswith(".scales")]
    assert stored
    assert all(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in stored)


def test_an_export_leaves_random_numbers_as_they_were(tmp_path):
    model = merged_llama()
    states = torch.get_rng_state(), random.getstate()
    export_onnx(model, tmp_path / "out", accuracy_level=4, kv_cache_dtype="int8")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
