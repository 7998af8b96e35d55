"""What a graph cannot express is refused with its reason, before anything is written; what may fall back does."""

import gc
import json
import weakref

import pytest
import torch
import transformers
from peft import get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig, export_onnx, verify
from qbl_trl.errors import ExportError
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.companions import Held
from qbl_trl.onnx.gate import Gate
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import ParityReport
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.onnx.architectures import ARCHITECTURES, DEEPSEEK, LATENT, MOE, build
from tests.onnx.models import merged_llama
from tests.tiny import tiny_gpt2, tiny_llama

FACTORS = {"short_factor": [1.0 + i / 20 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0}
GATED = {**WIDE, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}


def decoder(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def difference(model, folder, length):
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return verify(model, folder, ids, mask).max_abs_difference


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_longrope_changes_its_factors_where_the_model_does(tmp_path, attention):
    model = decoder(
        "Phi3",
        **{**GATED, "rope_scaling": {"type": "longrope", **FACTORS}},
        original_max_position_embeddings=16,
    )
    assert export_onnx(model, tmp_path / "out", attention=attention).attention == attention
    for length in (16, 19, 20, 40):  # 19 with 3 padded are 16; the other row is longer
        assert difference(model, tmp_path / "out", length) < 5e-6


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_longrope_of_phi_moe_scales_both_of_its_tables_and_its_layers_share_a_window(tmp_path, attention):
    scaling = {"type": "longrope", **FACTORS, "short_mscale": 1.1, "long_mscale": 1.3}
    scaling["original_max_position_embeddings"] = 16
    model = decoder("Phimoe", **GATED, num_local_experts=4, rope_scaling=scaling, sliding_window=12)
    assert export_onnx(model, tmp_path / "out", attention=attention).attention == attention
    for length in (16, 19, 20, 40):  # 19 with 3 padded are 16; the other row is longer
        assert difference(model, tmp_path / "out", length) < 5e-6


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_falcons_bias_is_rounded_as_torch_rounds_it(tmp_path, attention):
    model = decoder("Falcon", **{**WIDE, "num_attention_heads": 2}, alibi=True, max_position_embeddings=512)
    export_onnx(model, tmp_path / "out", attention=attention)
    assert difference(model, tmp_path / "out", 400) < 5e-6  # bfloat16 holds whole numbers up to 256


@pytest.mark.parametrize("kind", ["Bloom", "Mpt"])
def test_a_bias_by_places_is_made_from_the_mask_as_the_model_makes_it(tmp_path, kind):
    sizes = {
        "Bloom": {"hidden_size": 96, "n_layer": 1, "n_head": 6},
        "Mpt": {"d_model": 96, "n_layers": 1, "n_heads": 6},
    }
    model = decoder(kind, **sizes[kind], vocab_size=100)
    assert export_onnx(model, tmp_path / "out").attention == "gqa"
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[0, 8:11] = mask[1, 5] = 0  # holes too, whose tokens do not count as places in Bloom
    assert verify(model, tmp_path / "out", ids, mask).max_abs_difference < 5e-6


def test_ctrl_is_fused_and_reads_padding_where_torch_does(tmp_path):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96, "vocab_size": 100, "n_positions": 64}
    torch.manual_seed(0)
    model = transformers.CTRLLMHeadModel(transformers.CTRLConfig(**sizes)).eval()
    report = export_onnx(model, tmp_path / "out")
    assert report.attention == "gqa"
    assert report.parity_cached.max_abs_difference < 5e-6
    assert difference(model, tmp_path / "out", 20) < 5e-6


def test_longrope_is_refused_where_the_operator_counts_positions_itself(tmp_path):
    scaling = {"rope_type": "longrope", "factor": 4.0, **FACTORS}
    with pytest.raises(ExportError, match=r"longrope change once a text is longer than 64; \"auto\" tries the others"):
        export_onnx(merged_llama(rope_scaling=scaling), tmp_path / "out", attention="gqa", provider="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BEFORE_5, reason="transformers 5 reads the length among the other parameters")
@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_longrope_switches_at_the_length_that_its_parameters_name(tmp_path, attention):
    scaling = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, **FACTORS}
    model = merged_llama(rope_parameters={**scaling, "rope_theta": 1e4})
    export_onnx(model, tmp_path / "out", attention=attention)
    for length in (16, 17, 40):
        assert difference(model, tmp_path / "out", length) < 5e-6


@pytest.mark.skipif(BEFORE_5, reason="not in transformers 4.57")
def test_a_cache_that_holds_more_than_keys_and_values_is_named(tmp_path):
    sizes = {**MOE, **DEEPSEEK, **LATENT, "num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 32}
    model = decoder("DeepseekV32", **sizes, index_topk=8)
    with pytest.raises(
        ExportError, match=r"holds other things than keys, values and states \(Dynamic\w+\), which no graph"
    ):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_angles_that_grow_with_the_text_are_refused_where_they_begin_to_grow(tmp_path, attention):
    model = tiny_llama(max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    export_onnx(model, tmp_path / "out", attention=attention)
    assert difference(model, tmp_path / "out", 16) < 5e-6
    with pytest.raises(Exception, match=r"cos_cache|out of data bounds"):
        difference(model, tmp_path / "out", 20)


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 refuses sdpa where scores are capped")
def test_half_precision_is_held_against_the_attention_that_is_written(tmp_path):
    # Scores are capped by eager attention only.
    model = decoder("Gemma2", **GATED, head_dim=16, attn_logit_softcapping=0.01, query_pre_attn_scalar=0.01)
    with pytest.raises(ExportError, match=r"differ from .* the model runs sdpa; load it with attn_implementation"):
        export_onnx(model, tmp_path / "out", dtype="float16", attention="standard")
    assert not list(tmp_path.iterdir())
    export_onnx(model, tmp_path / "out", dtype="float16")


def test_a_router_that_computes_in_float32_keeps_its_type_in_half_precision(tmp_path):
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
    report = export_onnx(decoder("Ernie4_5_Moe", **GATED, **experts), tmp_path / "out", dtype="float16")
    assert report.parity_as_written.max_abs_difference < 5e-3  # fp16 keeps 11 bits


def test_a_norm_after_rotation_is_no_residual_norm(tmp_path):
    report = export_onnx(decoder("HunYuanDenseV1", **GATED, head_dim=16), tmp_path / "out")
    assert report.parity.max_abs_difference < 5e-6


def test_a_head_that_the_operator_cannot_rotate_takes_the_next_attention(tmp_path):
    model = decoder("GPTNeoX", **{**WIDE, "intermediate_size": 96, "max_position_embeddings": 64, "rotary_pct": 0.25})
    with pytest.raises(ExportError, match=r"rotates a multiple of 16 features, not 4 of a head"):
        export_onnx(model, tmp_path / "out", attention="gqa")
    assert not list(tmp_path.iterdir())
    for provider, attention in (("cuda", "standard"), ("cpu", "attention")):
        report = export_onnx(model, tmp_path / provider, provider=provider)
        assert report.attention == attention
        assert "multiple of 16" in report.attention_reason


def test_a_cache_with_keys_of_another_size_than_values_is_not_described_to_genai(tmp_path):
    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
    grouped = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    report = export_onnx(decoder("DeepseekV3", **{**GATED, **latent, **experts, **grouped}), tmp_path / "out")
    assert report.parity.max_abs_difference < 1e-5  # float32; keys are 32 wide and values 16
    assert not (tmp_path / "out" / "genai_config.json").exists()


def test_a_recurrence_that_no_operator_computes_is_refused_before_any_work(tmp_path, monkeypatch):
    model = decoder("Rwkv", hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, vocab_size=100)
    monkeypatch.setattr(Held, "linears", lambda held: pytest.fail("work began"))
    with pytest.raises(ExportError, match=r"decoders of type 'rwkv'.*takes no past_key"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Bessel(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def untraceable():
    model = tiny_llama()
    model.model.layers[0].mlp.act_fn = Bessel()
    return model


def test_a_trace_that_fails_prints_nothing(tmp_path, capfd):
    model = untraceable()
    with pytest.raises(ExportError, match="could not be traced"):
        export_onnx(model, tmp_path / "out")
    printed = capfd.readouterr()
    assert "graph(" not in printed.out + printed.err


def test_a_model_that_the_tracer_cannot_follow_is_refused_with_its_reason(tmp_path):
    model = untraceable()
    with pytest.raises(ExportError, match=r"a LlamaForCausalLM could not be traced: .*'aten::special_bessel_j0'"):
        export_onnx(model, tmp_path / "out")
    with pytest.raises(ExportError, match=r'"gqa" does not fit this model: .*bessel_j0.*; "auto" tries the others$'):
        export_onnx(model, tmp_path / "out", attention="gqa")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("SmolLM3", {"no_rope_layers": [0, 0]}),
        ("Gemma3Text", {"head_dim": 16, "layer_types": ["sliding_attention"] * 2, "sliding_window": 6}),
    ],
)
def test_a_rotary_table_that_no_layer_reads_costs_nothing(tmp_path, kind, settings):
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**GATED, **settings))
    report = export_onnx(model.eval(), tmp_path / "out")
    assert report.attention == "gqa"
    assert report.parity_cached.max_abs_difference < 5e-6


def test_a_table_of_positions_takes_the_type_of_the_graph(tmp_path):
    sizes = {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "vocab_size": 100}
    report = export_onnx(decoder("XGLM", **sizes, max_position_embeddings=64), tmp_path / "out", dtype="float16")
    assert report.parity_as_written.max_abs_difference < 5e-3  # fp16 keeps 11 bits


def test_the_gate_is_no_wider_than_the_logits(tmp_path):
    gate = Gate.on_noise(merged_llama(), 100)
    export_onnx(merged_llama(), tmp_path / "out")
    assert gate.reference.abs().max() < 1
    gate.reference += 9e-4
    with pytest.raises(ExportError, match=r"differ from the torch model's by up to 9.\d+e-04"):
        gate.pass_(tmp_path / "out", 1e-3)


def test_a_model_read_from_a_folder_is_let_go_and_read_again_and_a_given_one_is_kept(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    held = Held(tmp_path / "model")
    first = weakref.ref(held.model())
    held.let_go()
    assert first() is None
    assert held.decoder().config.vocab_size == held.config.vocab_size

    given = Held(tiny_llama())
    model = weakref.ref(given.model())
    given.let_go()
    gc.collect()
    assert given.model() is model()


@pytest.mark.parametrize("bits", [None, 8])
def test_no_weight_of_a_folder_is_held_while_onnx_runtime_holds_its_own(tmp_path, monkeypatch, bits):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    model.save_pretrained(tmp_path / "model")
    shape = model.model.layers[0].mlp.down_proj.weight.shape
    del model
    held, opened = [], OnnxLogits.__init__

    def living():
        gc.collect()
        return sum(isinstance(one, torch.Tensor) and one.shape == shape for one in gc.get_objects())

    def counting(graph, *args, **kwargs):
        held.append(living() - others)
        opened(graph, *args, **kwargs)

    others = living()  # of other tests
    monkeypatch.setattr(OnnxLogits, "__init__", counting)
    export_onnx(tmp_path / "model", tmp_path / "out", embedding_bits=bits)
    assert held
    assert not any(held)


def test_a_model_without_a_quantized_layer_is_said_to_stay_in_float(tmp_path, caplog):
    export_onnx(tiny_llama(), tmp_path / "float")
    assert "no layer of this model is quantized: the graph holds it in float32" in caplog.text
    caplog.clear()
    export_onnx(merged_llama(), tmp_path / "packed")
    assert "is quantized" not in caplog.text


def test_8_bit_activations_where_no_layer_holds_integer_codes_are_said_to_change_nothing(tmp_path, caplog):
    export_onnx(tiny_llama(), tmp_path / "float", accuracy_level=4)
    assert "accuracy_level=4 changed nothing" in caplog.text
    caplog.clear()
    export_onnx(tiny_llama(), tmp_path / "packed", accuracy_level=4, embedding_bits=8)  # the head has codes
    assert "changed nothing" not in caplog.text


def test_keeping_the_factors_of_no_adapter_is_said_to_change_nothing(tmp_path, caplog):
    export_onnx(tiny_llama(), tmp_path / "plain", lowering="low_rank")
    assert 'lowering="low_rank" changed nothing' in caplog.text
    caplog.clear()
    export_onnx(get_peft_model(tiny_llama(), QBLoRAConfig(r=4)), tmp_path / "adapted", lowering="low_rank")
    assert "changed nothing" not in caplog.text


class Louder(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.0005


class Reshaping(torch.nn.Linear):
    def forward(self, x):
        flat = torch.nn.functional.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return flat.reshape(*x.shape[:-1], self.out_features)


def test_a_layer_that_asks_for_its_sizes_is_a_product_under_an_adapter_too(tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.__class__ = Reshaping
    adapted = get_peft_model(model, QBLoRAConfig(r=4, init_lora_weights=False))
    assert export_onnx(adapted, tmp_path / "out").parity.max_abs_difference < 1e-5


def test_a_layer_that_computes_a_little_more_than_a_product_is_traced(tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.__class__ = Louder
    assert export_onnx(model, tmp_path / "out").parity.max_abs_difference < 1e-5


OWN = ["stablelm, which calls torch's attention", "bloom, whose heads lie in turns", "mpt, whose bias is a table"]
OWN += ["falcon with alibi", "gptj, which rotates in a way of its own", "codegen, whose heads lie in four parts"]


@pytest.mark.parametrize("case", [*OWN, "gpt_oss with sinks and windows"])
def test_a_decoder_with_attention_of_its_own_keeps_the_fused_operator_in_half_precision(tmp_path, case):
    report = export_onnx(build(*ARCHITECTURES[case][:2]), tmp_path / "out", dtype="float16")
    assert (report.attention, report.attention_reason) == ("gqa", "")
    assert report.parity_as_written.max_abs_difference < 5e-3  # fp16 keeps 11 bits


@pytest.mark.parametrize("case", OWN)
def test_and_on_cuda(tmp_path, case):
    report = export_onnx(build(*ARCHITECTURES[case][:2]), tmp_path / "out", provider="cuda")
    assert (report.attention, report.fallbacks) == ("gqa", ())


def test_a_graph_that_runs_for_one_size_of_batch_only_is_not_written(tmp_path, monkeypatch):
    original = OnnxLogits.__call__

    def picky(graph, ids, mask):
        return original(graph, ids, mask) + (0 if ids.shape[0] == 2 else 1)

    monkeypatch.setattr(OnnxLogits, "__call__", picky)
    with pytest.raises(ExportError, match="the graph's logits differ"):
        export_onnx(merged_llama(), tmp_path / "out")


def test_a_second_way_to_run_that_is_wrong_is_dropped_whatever_the_tolerance(tmp_path, monkeypatch):
    wrong = ParityReport(1, 9.0, 9.0, 9.0, 0.0, 0)
    monkeypatch.setattr(Gate, "_right_padded", lambda gate, graph: wrong)
    report = export_onnx(merged_llama(), tmp_path / "out", tolerance=None)
    assert report.parity.max_abs_difference < 1e-5
    assert not (tmp_path / "out" / "model_genai.onnx").exists()


def test_a_graph_that_is_let_through_as_it_is_keeps_its_second_way_to_run(tmp_path, monkeypatch):
    far = merged_llama(seed=1)  # what every graph is held against here
    monkeypatch.setattr("qbl_trl.onnx.making.float32_reference", lambda model: far)
    report = export_onnx(merged_llama(), tmp_path / "out", tolerance=None)
    assert report.parity.max_abs_difference > 0.01
    assert (tmp_path / "out" / "model_genai.onnx").exists()


def test_a_merged_model_has_no_factors_and_is_told_so_before_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr("qbl_trl.onnx.making.trace", lambda *args: pytest.fail("traced"))
    with pytest.raises(ExportError, match='lowering="low_rank" keeps the two factors'):
        export_onnx(merged_llama(), tmp_path / "out", lowering="low_rank")


def test_dynamic_angles_end_where_they_begin_to_change(tmp_path):
    model = tiny_llama(max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    with pytest.raises(ExportError, match=r'"dynamic" are fixed for texts of 32 tokens only.*pass max_length=32'):
        export_onnx(model, tmp_path / "out", max_length=100)
    assert not (tmp_path / "out").exists()


def test_learned_positions_end_where_the_model_ends(tmp_path):
    with pytest.raises(ExportError, match="max_length=500, and a GPT2LMHeadModel has positions for 64 tokens only"):
        export_onnx(tiny_gpt2(), tmp_path / "out", max_length=500)
    settings = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100, "max_seq_len": 48}
    export_onnx(transformers.MptForCausalLM(transformers.MptConfig(**settings)).eval(), tmp_path / "mpt")
    assert json.loads((tmp_path / "mpt" / "genai_config.json").read_text())["model"]["context_length"] == 48


def test_weights_that_are_nowhere_are_named(tmp_path):
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ExportError, match=r"model.embed_tokens.weight is on no device \(meta\); load the model whole"):
        export_onnx(model, tmp_path / "out")


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 shares them in a way that a graph can")
def test_layers_that_share_a_cache_are_refused_by_count(tmp_path):
    settings = {**GATED, "head_dim": 16, "sliding_window": 30, "num_kv_shared_layers": 1, "num_hidden_layers": 3}
    settings |= {"laurel_rank": 32, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 101}
    settings |= {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 3}
    settings["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**settings)).eval()
    with pytest.raises(ExportError, match="2 caches for 3 layers; shared ones have no form"):
        export_onnx(model, tmp_path / "out")
