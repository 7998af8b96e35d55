"""A GGUF file states more than transformers' own reader takes from it; what is converted is the model it stands for."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qbl_trl import GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.importers import convert_checkpoint
from qbl_trl.quant.importers.gguf_config import stated_settings
from qbl_trl.quant.packed import PackedWeight
from qbl_trl.quant.writers import write_checkpoint
from tests.quant.foreign_gguf import put_on_grid_, write_gguf
from tests.tiny import SIZES, logits, tiny_llama, tokens

NEMOTRON = {"attention.key_length": 32, "rope.dimension_count": 32}
FLOAT = {"embed": "F32", "wte": "F32", "wpe": "F32", "lm_head": "F32"}


def tiny(model_type, **settings):
    """A random model of any architecture; its own names of sizes in `settings`."""
    torch.manual_seed(0)
    named = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}, "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4}}
    sizes = named[model_type] | {"vocab_size": 100} if model_type in named else SIZES
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **settings)).eval()


def case(model_type, settings, fields, architecture=None):
    return pytest.param(
        model_type, settings, fields, architecture or model_type, id="-".join([model_type, *settings][:2])
    )


@pytest.fixture(autouse=True)
def gguf():
    return pytest.importorskip("gguf", reason="the GGUF importer needs the package gguf")


@pytest.mark.parametrize(
    ("model_type", "settings", "fields", "architecture"),
    [
        case("starcoder2", {"rope_theta": 999999.0}, {"rope.freq_base": 999999.0}),
        case("stablelm", {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}, {"rope.dimension_count": 8}),
        case("phi3", {"partial_rotary_factor": 0.5, "pad_token_id": 0}, {"rope.dimension_count": 8}),
        case("phi3", {"sliding_window": 4, "pad_token_id": 0}, {"attention.sliding_window": 4}),
        case("phi3", {"pad_token_id": 0}, {"attention.sliding_window": 0}),
        case("nemotron", {"partial_rotary_factor": 0.25}, {"rope.dimension_count": 4}),
        case(
            "gemma2",
            {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 20.0},
            {"attention.key_length": 32, "attn_logit_softcapping": 20.0},
        ),
        case(
            "gemma3_text",
            {"head_dim": 32, "query_pre_attn_scalar": 32, "rope_theta": 1e6},
            {"attention.key_length": 32, "rope.freq_base": 1e6},
            "gemma3",
        ),
        case("qwen3", {"head_dim": 32}, {"attention.key_length": 32}),
        case("gpt2", {"n_positions": 32}, {}),
        case("bloom", {}, {}),
    ],
)
def test_a_gguf_file_of_any_architecture_is_the_model_it_was_written_from(
    tmp_path, model_type, settings, fields, architecture
):
    model = tiny(model_type, **settings)
    put_on_grid_(model)
    write_gguf(tmp_path / "in.gguf", model, FLOAT, "Q8_0", architecture=architecture, fields=fields)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(isinstance(module, PackedWeight) for module in loaded.modules())
    ids = tokens(length=24)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=2e-4)  # norms as w + 1; logits 5


@pytest.mark.parametrize(
    ("architecture", "layers", "width", "heads", "head", "scalar"),
    [  # query_pre_attn_scalar in the published config.json of 2B, 9B, 27B; 4B, 12B, 27B
        ("gemma2", 26, 2304, 8, 256, 256),
        ("gemma2", 42, 3584, 16, 256, 256),
        ("gemma2", 46, 4608, 32, 128, 144),
        ("gemma3", 34, 2560, 8, 256, 256),
        ("gemma3", 48, 3840, 16, 256, 256),
        ("gemma3", 62, 5376, 32, 128, 168),
    ],
)
def test_queries_of_gemma_are_scaled_as_each_size_was_published(architecture, layers, width, heads, head, scalar):
    fields = {"block_count": layers, "embedding_length": width, "attention.head_count": heads}
    settings = stated_settings(architecture, (fields | {"attention.key_length": head}).get)
    assert settings["query_pre_attn_scalar"] == scalar
    assert settings["head_dim"] == head


def test_a_configuration_written_from_a_gguf_file_states_partial_rotation_where_both_generations_look(tmp_path):
    write_gguf(
        tmp_path / "in.gguf",
        tiny("stablelm", partial_rotary_factor=0.5),
        FLOAT,
        architecture="stablelm",
        fields={"rope.dimension_count": 8},
    )
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["partial_rotary_factor"] == 0.5
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_split_file_is_refused_with_the_way_to_merge_it(tmp_path, part):
    fields = {"split.no": part, "split.count": 2}
    write_gguf(tmp_path / "in.gguf", tiny_llama(tie_word_embeddings=False), {}, fields=fields)
    with pytest.raises(CheckpointError, match=rf"number {part + 1} of the 2 parts.*llama-gguf-split --merge"):
        convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "settings", "fields"),
    [
        ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32}, {"attention.key_length": 32}),
        ("nemotron", {"partial_rotary_factor": 1.0}, {}),
    ],
)
def test_trained_norms_are_written_the_way_the_architecture_stores_them(tmp_path, model_type, settings, fields):
    model = tiny(model_type, **settings)
    write_gguf(tmp_path / "in.gguf", model, FLOAT, architecture=model_type, fields=fields)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    put = {name: p for name, p in loaded.named_parameters() if name.endswith("norm.weight")}
    assert put
    for parameter in put.values():
        parameter.data += torch.randn(parameter.shape) * 0.3
    write_checkpoint(loaded, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    convert_checkpoint(tmp_path / "out.gguf", tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second").state_dict()
    for name, parameter in put.items():
        torch.testing.assert_close(again[name], parameter.data, rtol=0, atol=3e-7)  # w + 1 is rounded once
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), tokens()),
        logits(loaded, tokens()),
        rtol=0,
        atol=1e-4,
    )


def test_a_head_that_llama_cpp_would_not_read_is_refused(tmp_path):
    model = tiny("gemma2", head_dim=32, query_pre_attn_scalar=32)
    write_gguf(tmp_path / "in.gguf", model, FLOAT, architecture="gemma2", fields={"attention.key_length": 32})
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.detach() + 1)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from the embedding, which llama\.cpp reads"):
        write_checkpoint(loaded, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")


@pytest.mark.parametrize(
    ("model_type", "settings", "fields", "changed"),
    [
        ("stablelm", {"partial_rotary_factor": 0.3}, {"rope.dimension_count": 4}, {}),  # 4 of 16 features in both
        ("nemotron", {"head_dim": 32, "partial_rotary_factor": 1.0}, NEMOTRON, {}),
        ("starcoder2", {"norm_epsilon": 1e-5}, {"attention.layer_norm_epsilon": 1e-5}, {"norm_epsilon": 1e-2}),
    ],
)
def test_a_template_is_the_models_by_what_is_run_of_it(tmp_path, model_type, settings, fields, changed):
    model = tiny(model_type, **settings)
    write_gguf(tmp_path / "in.gguf", model, FLOAT, architecture=model_type, fields=fields)
    packed = quantize_model_(model, GroupQuantConfig())
    vars(packed.config).update(changed)
    if not changed:
        write_checkpoint(packed, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
        return
    with pytest.raises(ConfigError, match=rf"the model has {next(iter(changed))}=.*another model's file"):
        write_checkpoint(packed, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")


def test_a_scale_of_queries_that_no_file_can_state_is_refused(tmp_path):
    model = tiny("gemma2", head_dim=32, query_pre_attn_scalar=32)
    write_gguf(tmp_path / "in.gguf", model, FLOAT, architecture="gemma2", fields={"attention.key_length": 32})
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    loaded.config.query_pre_attn_scalar = 48
    with pytest.raises(ConfigError, match=r"query_pre_attn_scalar=48, and .* would be run with 32"):
        write_checkpoint(loaded, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_float_matrix_that_is_stored_transposed_is_not_written_as_it_is(tmp_path):
    write_gguf(tmp_path / "in.gguf", tiny("gpt2"), FLOAT | {"c_proj": "F32"}, architecture="gpt2")
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.transformer.h[0].attn.c_proj.weight.data += 1
    with pytest.raises(CheckpointError, match=r"c_proj\.weight is stored with more than its rows permuted"):
        write_checkpoint(model, tmp_path / "out.gguf", "gguf", template=tmp_path / "in.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_two_tables_of_a_long_phi_are_those_of_the_model(tmp_path):
    """A text within the original length is read with the short factors, a longer one with the long ones."""
    factors = {"short_factor": [1.0 + i / 16 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    settings = {"original_max_position_embeddings": 16, "pad_token_id": 0}
    model = tiny("phi3", **settings, rope_scaling={"type": "longrope", **factors})
    put_on_grid_(model)
    tensors = {
        f"rope_factors_{kind}.weight": np.array(factors[f"{kind}_factor"], np.float32) for kind in ("long", "short")
    }
    fields = {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.2}
    write_gguf(tmp_path / "in.gguf", model, FLOAT, "Q8_0", rope=tensors, architecture="phi3", fields=fields)
    convert_checkpoint(tmp_path / "in.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for length in (12, 40):
        ids = tokens(length=length)
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=2e-4)  # logits of 5
    write_gguf(tmp_path / "half.gguf", model, FLOAT, "Q8_0", rope=dict([tensors.popitem()]), architecture="phi3")
    with pytest.raises(CheckpointError, match=r"rope_factors_long\.weight, .* one is missing"):
        convert_checkpoint(tmp_path / "half.gguf", tmp_path / "half")
