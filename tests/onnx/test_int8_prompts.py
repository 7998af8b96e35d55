"""prompt_weights="int8": prompts multiply integers of 8 bits, and steps go on with the codes."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qbl_trl import GroupQuantConfig, export_onnx, verify
from qbl_trl.errors import ExportError
from qbl_trl.onnx.int8_prompts import _CONSTANTS, _integers, _named
from qbl_trl.onnx.int8_weights import Layer
from qbl_trl.onnx.protos import subgraphs
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.onnx.architectures import ARCHITECTURES, build_named
from tests.onnx.models import merged_llama, operators, padded_batch, quantize
from tests.tiny import logits, tiny_llama, tokens

# Sums of integers are exact. Inputs that differ by 1e-7 may have an l on the other side of a half, which is worth
# 1 / 7938 of what is largest of a token; what rounding itself costs is fifty times as much.
OTHER_SIDE = 2e-4


class Rounded(nn.Module):
    """The definition in float64: W with one scale for each output, x in two integers with one scale for each token."""

    def __init__(self, layer: GroupQuantLinear) -> None:
        super().__init__()
        self.layer, self.base = layer, copy.deepcopy(layer)
        self.base.set_delta(None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = weight_of(self.base)
        c = weight.abs().amax(1, keepdim=True) / 127  # in float32: of codes in groups, many lie halfway
        t = x.double().abs().amax(-1, keepdim=True) / 63
        h = (x / t).round()
        read = t * (h + ((x / t - h) * 126).round() / 126)
        adapted = self.layer(x) - self.base(x)  # stays beside the codes, in float
        return (read @ (c.double() * (weight / c).round()).T + bias + adapted).to(x.dtype)


def weight_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) and (N,): what a layer makes of the unit vectors, and of nothing."""
    bias = layer(torch.zeros(1, layer.in_features))
    return (layer(torch.eye(layer.in_features)) - bias).T, bias[0]


def with_rounded_layers(model):
    """The model as its prompts are to be read."""
    changed = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, GroupQuantLinear):
            changed.set_submodule(name, Rounded(layer))
    return changed


def session_of(nodes, inputs, outputs, weights):
    """Nodes alone: `inputs` are types and shapes by name, `outputs` types."""
    given = [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()]
    made = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "alone", given, made, weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def branches_of(folder, file="model.onnx"):
    graph = onnx.load(folder / file, load_external_data=False).graph
    return {part.name: part.node for node in graph.node for part in subgraphs(node)}


MODELS = {
    "llama": merged_llama,
    "without zero points": lambda: quantize(tiny_llama(), symmetric=True),
    "qwen2 with biases": lambda: build_named("qwen2 with biases"),
    "phi3 with joined projections": lambda: build_named("phi3 with joined projections"),
}


@pytest.mark.parametrize("case", MODELS)
def test_prompts_are_the_rounded_model_and_steps_the_model(tmp_path, case):
    model, ids = MODELS[case](), tokens()
    export_onnx(model, tmp_path / "out", prompt_weights="int8")
    graph, mask = OnnxLogits(tmp_path / "out"), torch.ones_like(ids)
    found, cache = graph.step(ids, mask, graph.empty_cache(len(ids)))
    torch.testing.assert_close(found, logits(with_rounded_layers(model), ids), rtol=0, atol=OTHER_SIDE)
    assert (found - logits(model, ids)).abs().max() > 10 * OTHER_SIDE  # something was rounded

    export_onnx(model, tmp_path / "exact")
    longer = torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.long)
    step, expected = (OnnxLogits(tmp_path / name).step(ids[:, :1], longer, cache)[0] for name in ("out", "exact"))
    assert torch.equal(step, expected)


@pytest.mark.parametrize(
    "options", [{"accuracy_level": 4}, {"lowering": "float_zero_point"}], ids=["digits", "fractional zero points"]
)
def test_an_adapter_within_the_codes_is_rounded_with_them(tmp_path, options):
    model = merged_llama(hidden_size=256, intermediate_size=512)  # wide enough for digits to pay
    export_onnx(model, tmp_path / "out", prompt_weights="int8", **options)
    kinds = [node.op_type for node in branches_of(tmp_path / "out")["prompts"]]
    assert kinds.count("ReduceSum") <= 1  # of the mask: nothing is pooled
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    tensors = {weight.name: weight for weight in graph.initializer}
    for name, layer in model.named_modules():
        stem = f"{name}.weight/int8"
        if isinstance(layer, GroupQuantLinear) and stem in tensors:
            codes, scales = (
                numpy_helper.to_array(tensors[part], str(tmp_path / "out")) for part in (stem, f"{stem}.scales")
            )
            weight = weight_of(layer)[0].numpy().T
            digits = float(layer.delta.abs().max()) / 225
            assert (np.abs(codes * scales - weight) <= scales * 0.501 + digits + 1e-6).all()
            assert np.abs(codes).max() == 127


@pytest.mark.parametrize("quant_type", [0, 1], ids=["fp4", "nf4"])
def test_weights_of_bitsandbytes_are_those_that_the_operator_multiplies(tmp_path, quant_type):
    pytest.importorskip("bitsandbytes")
    size, outputs, generator = 48, 6, np.random.default_rng(0)  # blocks of 32 go on from row to row
    weights = {
        "codes": generator.integers(0, 256, size * outputs // 2, dtype=np.uint8),
        "absmax": generator.random(size * outputs // 32, dtype=np.float32),
    }
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    settings = {"K": size, "N": outputs, "block_size": 32, "quant_type": quant_type, "domain": "com.microsoft"}
    node = helper.make_node("MatMulBnb4", ["x", *weights], ["y"], **settings)
    product = session_of([node], {"x": (TensorProto.FLOAT, [size, size])}, {"y": TensorProto.FLOAT}, initializers)
    expected = product.run(None, {"x": np.eye(size, dtype=np.float32)})[0].T
    found = torch.cat(list(Layer.of(node, {value.name: value for value in initializers}, {}).rows(tmp_path)))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("bits", [2, 8])
def test_codes_of_other_widths(tmp_path, bits):
    model = tiny_llama()
    quantize_model_(model, GroupQuantConfig(bits=bits, group_size=32, algorithm="rtn"))
    export_onnx(model, tmp_path / "out", prompt_weights="int8", logits="last")
    ids = tokens()
    found = OnnxLogits(tmp_path / "out")(ids, torch.ones_like(ids))
    expected = logits(model, ids)[:, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 20)


def test_what_sees_one_position_reads_the_codes(tmp_path):
    for answers in ("all", "last"):
        out = tmp_path / answers
        export_onnx(merged_llama(), out, prompt_weights="int8", accuracy_level=4, embedding_bits=4, logits=answers)
        count = [node.op_type for node in branches_of(out)["prompts"]].count
        left = 4 if answers == "last" else 0  # after the last attention: its output, gate and up, down; and the head
        assert (count("MatMulNBits"), count("MatMulIntegerToFloat")) == (left, 2 * (2 * 4 + 1 - left))
        levels = {a.i for n in branches_of(out)["prompts"] for a in n.attribute if a.name == "accuracy_level"}
        assert levels == ({4} if left else set())
        assert "MatMulIntegerToFloat" not in [node.op_type for node in branches_of(out)["steps"]]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "experts" in name])
def test_experts_are_read_so_too_and_only_where_they_are_asked(tmp_path, name):
    model = build_named(name)
    export_onnx(model, tmp_path / "out", prompt_weights="int8")
    ids = tokens(1, 2, 0)  # some expert has no token
    found, expected = OnnxLogits(tmp_path / "out")(ids, torch.ones_like(ids)), logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 20)
    assert "MatMulIntegerToFloat" in operators(tmp_path / "out", inner=True)


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}, {"accuracy_level": 4, "logits": "last"}])
def test_both_graphs_of_a_folder_read_the_same_bytes(tmp_path, options):
    export_onnx(merged_llama(), tmp_path / "plain", **options)
    report = export_onnx(merged_llama(), tmp_path / "out", prompt_weights="int8", **options)
    assert report.parity_as_written.max_abs_difference < 0.05
    weights = sum(
        layer.in_features * layer.out_features
        for layer in merged_llama().modules()
        if isinstance(layer, GroupQuantLinear)
    )
    more = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("plain", "out")]
    assert 0 < more[1] - more[0] <= weights + (1 << 16) * 9  # a byte each, and where each begins
    ids, mask = padded_batch()
    for file in ("model.onnx", "model_genai.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / file), full_check=True)
        found, expected = (OnnxLogits(tmp_path / name / file)(ids[1:], mask[1:]) for name in ("out", "plain"))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("cache", [None, "int8"])
def test_verify_reads_the_weights_of_prompts(tmp_path, cache):
    model, ids = merged_llama(), tokens()
    export_onnx(model, tmp_path / "out", prompt_weights="int8", kv_cache_dtype=cache)
    before = verify(model, tmp_path / "out", ids).max_abs_difference
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    weight = next(weight for weight in graph.initializer if weight.name.endswith("down_proj.weight/int8"))
    place = {entry.key: entry.value for entry in weight.external_data}
    with (tmp_path / "out" / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(bytes(int(place["length"])))
    assert verify(model, tmp_path / "out", ids).max_abs_difference > 5 * before


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_two_integers_hold_14_bits_of_every_token(scale):
    """They lie where sums of two products fit into 16 bits, and a large feature takes nothing from the others."""
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    x[0], x[1, 3], x[2] = 0, 100, np.nan
    x *= np.float32(scale)
    constants = [numpy_helper.from_array(np.asarray(value), _named(name)) for name, value in _CONSTANTS.items()]
    made = {"h": TensorProto.UINT8, "l": TensorProto.UINT8, "m": TensorProto.FLOAT}
    session = session_of(list(_integers("x", *made)), {"x": (TensorProto.FLOAT, [5, 64])}, made, constants)
    coarse, fine, largest = (np.delete(part, 2, 0) for part in session.run(None, {"x": x}))  # a token's nan is its own
    x = np.delete(x, 2, 0)
    for part in (coarse, fine):
        assert part.min() >= 1
        assert part.max() <= 127
    found = largest / 63 * ((coarse.astype(np.float32) - 64) + (fine.astype(np.float32) - 64) / 126)
    assert (np.abs(found - x) <= largest / 63 / 252 * 1.01).all()


def test_a_model_without_codes_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no layer of this model has any"):
        export_onnx(tiny_llama(), tmp_path / "out", prompt_weights="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt_weights": "int4"}, "prompt_weights='int4' is not known; allowed: None, int8"),
        ({"prompt_weights": "int8", "provider": "cuda"}, "only provider='cpu' has"),
        ({"prompt_weights": "int8", "dtype": "float16"}, "written in float32, not for dtype=float16"),
        ({"prompt_weights": "int8", "accuracy_level": 4, "prompt_accuracy_level": 0}, "set one of the two"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tmp_path, options, reason):
    with pytest.raises(ExportError, match=reason):
        export_onnx(merged_llama(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
