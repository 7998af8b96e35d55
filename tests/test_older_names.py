"""Folders that transformers 5 wrote compute the same on 4.57, which has other names for rotary settings."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig
from qbl_trl.generation import BEFORE_5
from qbl_trl.loading import open_model
from qbl_trl.older_names import restore_settings_
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import logits, tokens

pytestmark = pytest.mark.skipif(not BEFORE_5, reason="transformers 5 reads what it writes")
IDS = tokens(length=40)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default"}
LONG = {"short_factor": [1.0 + i / 20 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
# model type: the settings as 4.57 has them, and as 5 has them
CASES = {
    "llama": ({"rope_theta": 500.0}, {**PLAIN, "rope_theta": 500.0}),
    "llama, scaled": ({"rope_theta": 500.0, "rope_scaling": LLAMA3}, {**LLAMA3, "rope_theta": 500.0}),
    "phi": (
        {"rope_theta": 500.0, "partial_rotary_factor": 0.25},
        {**PLAIN, "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    ),
    "gpt_neox": (
        {"rotary_emb_base": 500, "rotary_pct": 0.5},
        {**PLAIN, "rope_theta": 500, "partial_rotary_factor": 0.5},
    ),
    "phi3": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 32},
        {"rope_type": "longrope", **LONG, "rope_theta": 500.0, "original_max_position_embeddings": 32},
    ),
    "gemma3_text": (
        {**LAYERS, "head_dim": 16, "rope_theta": 500.0, "rope_scaling": LINEAR, "rope_local_base_freq": 70.0},
        {"full_attention": {**LINEAR, "rope_theta": 500.0}, "sliding_attention": {**PLAIN, "rope_theta": 70.0}},
    ),
}


def folders(case, tmp_path):
    """A float model, and a folder of it as transformers 5 writes it."""
    own, newer = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.partition(",")[0], **SIZES, **own)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1  # so that positions matter
    model.save_pretrained(tmp_path / "float")
    quantize_model_(model, GroupQuantConfig()).save_pretrained(tmp_path / "packed")
    for folder in ("float", "packed"):
        file = tmp_path / folder / "config.json"
        stored = {
            name: value for name, value in json.loads(file.read_text()).items() if name not in own or name in LAYERS
        }
        stored |= {"head_dim": own["head_dim"]} if "head_dim" in own else {}
        file.write_text(json.dumps({**stored, "rope_parameters": newer}))
    return model


@pytest.mark.parametrize("case", CASES)
def test_rotary_settings_that_transformers_5_wrote_are_read(tmp_path, case):
    packed = folders(case, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), IDS), logits(packed, IDS))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    assert torch.equal(logits(again, IDS), logits(packed, IDS))
    again.save_pretrained(tmp_path / "again")
    assert "rope_parameters" not in (tmp_path / "again" / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), IDS), logits(packed, IDS))


def test_a_float_folder_is_opened_with_them_too(tmp_path):
    folders("llama, scaled", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    found = open_model(tmp_path / "float").eval()
    assert found.config.rope_theta == 500.0
    assert (logits(found, IDS) - logits(plain, IDS)).abs().max() > 1e-2


def test_what_a_user_sets_is_left_as_it_is(tmp_path):
    folders("llama", tmp_path)
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", rope_scaling=LINEAR)
    assert (scaled.config.rope_scaling, scaled.config.rope_theta) == (LINEAR, 500.0)


def test_settings_inside_a_configuration_are_found():
    config = transformers.Qwen2VLConfig()
    sections = {"mrope_section": [2, 3, 3], "rope_type": "default"}
    config.text_config.rope_parameters = {**sections, "rope_theta": 500.0}
    assert restore_settings_(config)
    assert (config.text_config.rope_scaling, config.text_config.rope_theta) == (sections, 500.0)


def test_what_a_part_has_by_default_around_it_is_no_choice_of_a_user():
    config = transformers.VoxtralConfig(text_config={"model_type": "llama"})
    assert config.text_config.rope_theta != transformers.LlamaConfig().rope_theta
    config.text_config.rope_parameters = {**PLAIN, "rope_theta": 10000.0}
    assert restore_settings_(config)
    assert config.text_config.rope_theta == 10000.0
