"""Layers that keep a state of fixed size: convolutions and recurrences, over texts, steps and padding."""

import json

import onnx
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qbl_trl import GroupQuantConfig, export_onnx
from qbl_trl.errors import ExportError
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.norm_modules import gated_norm, rms_norm
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.onnx.architectures import GATED, STATES, build
from tests.onnx.models import PAD, operators, padded_batch
from tests.onnx.test_right_padding import in_genais_way, one_by_one
from tests.tiny import tiny_tokenizer, tokens

pytestmark = pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 has another code for each")

FP32 = 1e-5
DELTA, MAMBA, CONVOLUTION = "qwen3.5 with a delta rule", "granite with Mamba's recurrence", "lfm2 with convolutions"
ATTENTIVE = [name for name, row in STATES.items() if row[2] == "gqa"]
OWN_OPERATORS = {"LinearAttention", "CausalConvWithState", "GroupQueryAttention"}


@pytest.mark.parametrize("case", STATES)
def test_pieces_of_a_text_give_what_the_whole_does(exported, case):
    graph, ids = OnnxLogits(exported(case).folder), tokens(2, 17)
    mask, cache, parts = torch.ones_like(ids), graph.empty_cache(2), []
    for start, stop in ((0, 2), (2, 3), (3, 11), (11, 12), (12, 17)):  # shorter than a convolution, and longer
        logits, cache = graph.step(ids[:, start:stop], mask[:, :stop], cache)
        parts.append(logits)
    with torch.no_grad():
        expected = exported(case).model(ids).logits
    allowed = 3 * FP32 if case.startswith("mamba, ") else FP32  # its logits reach 3
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("case", STATES)
def test_pieces_that_are_padding_alone_leave_states_alone(exported, case):
    """Rows of 1, 4 and 11 tokens, padded on the right, read in pieces; then a token of each row's own."""
    graph, ids, lengths = OnnxLogits(exported(case).folder), tokens(3, 12), [1, 4, 11]
    mask = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
    cache = graph.empty_cache(3)
    for start, stop in ((0, 3), (3, 6), (6, 11)):
        _, cache = graph.step(ids[:, start:stop], mask[:, :stop], cache)
    found, _ = graph.step(ids[:, 11:], torch.nn.functional.pad(mask, (0, 1), value=1), cache)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = exported(case).model(torch.cat([ids[row : row + 1, :length], ids[row : row + 1, 11:]], 1)).logits
        torch.testing.assert_close(found[row : row + 1], alone[:, -1:], rtol=0, atol=FP32)


def test_a_packed_layer_whose_bias_the_model_takes_away_again(tmp_path):
    kind, settings, _ = STATES["jamba with experts, whose features recur each for itself"]
    wide = getattr(transformers, f"{kind}Config")(**settings | {"mamba_dt_rank": 32})
    model = quantize_model_(transformers.JambaForCausalLM(wide).eval(), GroupQuantConfig(algorithm="rtn"))
    assert isinstance(model.model.layers[0].mamba.dt_proj, GroupQuantLinear)
    report = export_onnx(model, tmp_path / "out")
    assert report.parity.max_abs_difference < FP32
    assert "model.layers.0.mamba.dt_proj" in {layer.name for layer in report.layers}


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("case", [DELTA, MAMBA])
def test_a_convolution_may_have_another_activation(tmp_path, case, activation):
    kind, settings, _ = STATES[case]
    report = export_onnx(build(kind, {**settings, "hidden_act": activation}), tmp_path / "out")
    assert report.attention == "gqa"
    assert max(report.parity.max_abs_difference, report.parity_cached.max_abs_difference) < FP32


@pytest.mark.parametrize("case", [DELTA, MAMBA, CONVOLUTION, "kimi, whose decay is of every feature"])
def test_standard_operators_compute_the_same(tmp_path, case):
    report = export_onnx(build(*STATES[case][:2]), tmp_path / "out", attention="standard")
    assert OWN_OPERATORS.isdisjoint(operators(tmp_path / "out", inner=True))
    assert max(report.parity.max_abs_difference, report.parity_cached.max_abs_difference) < FP32
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)


@pytest.mark.parametrize("attention", ["auto", "standard"])
@pytest.mark.parametrize("case", ["bamba", "mamba2, which never attends", "kimi, whose decay is of every feature"])
def test_padding_on_the_right_leaves_states_alone_whatever_attends(exported, case, attention):
    made = exported(case, attention=attention)
    found = in_genais_way(OnnxLogits(made.folder), buffer=0)
    torch.testing.assert_close(found, one_by_one(made.model), rtol=0, atol=FP32)


def test_padding_that_is_no_number_does_not_reach_a_state(tmp_path):
    """Attention may leave the places of padding unwritten: what a layer reads there can be anything."""
    model = build(*STATES["mamba2, which never attends"][:2])
    export_onnx(model, tmp_path / "out")
    written = onnx.load(tmp_path / "out" / "model.onnx")
    table = next(weight for weight in written.graph.initializer if "embeddings" in weight.name)
    values = onnx.numpy_helper.to_array(table).copy()
    values[PAD] = float("nan")
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(written, tmp_path / "out" / "model.onnx")
    graph, (ids, mask) = OnnxLogits(tmp_path / "out"), padded_batch()
    logits, cache = graph.step(ids, mask, graph.empty_cache(2))
    assert all(bool(torch.from_numpy(state).isfinite().all()) for state in cache.values())
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=FP32)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_recurrent_states_are_float32_in_every_graph(tmp_path, dtype):
    report = export_onnx(build(*STATES[DELTA][:2]), tmp_path / "out", dtype=dtype)
    graph = OnnxLogits(tmp_path / "out")
    kinds = {name.rsplit(".", 1)[1]: value.type for name, value in graph.inputs.items() if "past" in name}
    own = {"float16": "tensor(float16)", "float32": "tensor(float)"}[dtype]
    assert kinds == {"key": own, "value": own, "conv_state": own, "recurrent_state": "tensor(float)"}
    assert report.parity_as_written is None or report.parity_as_written.kl_per_token < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [DELTA, MAMBA, CONVOLUTION])
def test_cuda_has_kernels_for_all_of_it(tmp_path, case, dtype):
    report = export_onnx(build(*STATES[case][:2]), tmp_path / "out", provider="cuda", dtype=dtype)
    assert (report.attention, report.fallbacks) == ("gqa", ())
    assert "CausalConvWithState" in report.operators


def answers_of_genai(folder, ids, new):
    """What ONNX Runtime GenAI makes of a batch, (B, new); no row ends."""
    genai = pytest.importorskip("onnxruntime_genai")
    loaded = genai.Model(str(folder))
    params = genai.GeneratorParams(loaded)
    total = ids.shape[1] + new
    params.set_search_options(max_length=total, min_length=total, batch_size=len(ids), do_sample=False)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(ids.int().numpy() if len(ids) > 1 else ids[0].int().numpy())
    for _ in range(new):
        generator.generate_next_token()
    return torch.tensor([generator.get_sequence(row).tolist()[-new:] for row in range(len(ids))])


@pytest.mark.parametrize(
    ("case", "logits"),
    [*((case, "all") for case in (*ATTENTIVE, "bamba")), *((case, "last") for case in (DELTA, MAMBA, CONVOLUTION))],
)
def test_genai_generates_what_torch_does(tmp_path, case, logits):
    model = build(*STATES[case][:2])
    export_onnx(model, tmp_path / "out", logits=logits, tokenizer=tiny_tokenizer())
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(4))
    rows = [ids[0, :5], ids[1]]  # GenAI pads the shorter on the right
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = [model.generate(row[None], **settings)[0, len(row) :] for row in rows]
    padded = ids.clone()
    padded[0, 5:] = PAD
    assert answers_of_genai(tmp_path / "out", padded, 6).tolist() == torch.stack(expected).tolist()
    assert answers_of_genai(tmp_path / "out", ids[1:], 6)[0].tolist() == expected[1].tolist()


def test_genai_is_told_of_states(exported):
    def decoder(case):
        return json.loads((exported(case).folder / "genai_config.json").read_text())["model"]

    delta, convolution = decoder(DELTA), decoder(CONVOLUTION)
    assert delta["type"] == "decoder"
    assert delta["decoder"]["inputs"]["past_recurrent_names"] == "past_key_values.%d.recurrent_state"
    assert delta["decoder"]["outputs"]["present_conv_names"] == "present.%d.conv_state"
    assert convolution["type"] == "lfm2"
    assert convolution["decoder"]["layer_types"] == ["conv", "full_attention"]
    assert "past_recurrent_names" not in convolution["decoder"]["inputs"]


def test_a_graph_that_no_runtime_feeds_says_so(tmp_path, caplog):
    export_onnx(build(*STATES["mamba2, which never attends"][:2]), tmp_path / "out")
    assert "does not know a cache such as this graph's, nor does ORTModelForCausalLM" in caplog.text
    assert not (tmp_path / "out" / "genai_config.json").exists()


def test_states_that_come_from_elsewhere_are_refused(tmp_path):
    config = transformers.ZayaConfig(**GATED)
    model = transformers.ZayaForCausalLM(config).eval()
    with pytest.raises(ExportError, match=r"ZayaForCausalLM keeps states .* that no operator computes"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_transformers_does_not_run_is_said_to_be_that(tmp_path):
    kind, settings, _ = STATES[DELTA]
    model = build(kind, {**settings, "layer_types": ["linear_attention"] * 2})
    with pytest.raises(ExportError, match=r"does not run in transformers itself: .*only contain LinearAttention"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_head_whose_type_is_read_is_not_packed(tmp_path):
    model = build(*STATES["mamba2, which never attends"][:2])
    with pytest.raises(ExportError, match=r"embedding_bits=8: a Mamba2ForCausalLM does not run over a packed"):
        export_onnx(model, tmp_path / "out", embedding_bits=8)
    assert not list(tmp_path.iterdir())


class GatedRMSNorm(nn.Module):
    def __init__(self, activation, gate_first, groups=1):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(16)), 1e-5
        self.activation, self.gate_first, self.groups = activation, gate_first, groups

    def forward(self, x, gate=None):
        x = x * self.activation(gate) if self.gate_first else x
        apart = x.unflatten(-1, (self.groups, -1))
        y = (apart * torch.rsqrt(apart.pow(2).mean(-1, keepdim=True) + 1e-5)).flatten(-2) * self.weight
        return y if self.gate_first else y * self.activation(gate)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", [nn.functional.silu, torch.sigmoid])
def test_a_norm_with_a_gate_is_recognized_by_what_it_computes(activation, gate_first):
    module = GatedRMSNorm(activation, gate_first)
    found = gated_norm(module)
    assert (found.activation, found.gate_first, found.norm.epsilon) == (activation, gate_first, 1e-5)
    assert rms_norm(module) is None
    assert gated_norm(GatedRMSNorm(activation, gate_first, groups=2)) is None
    assert gated_norm(GatedRMSNorm(torch.tanh, gate_first)) is None
    assert gated_norm(LlamaRMSNorm(16)) is None
