"""The float weights that a packed model was made from, wherever a folder holds them."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DbrxConfig, DbrxForCausalLM, MixtralConfig, MixtralForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.adapter.initialize import initialize_from_error_
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.float_weights import FloatWeights
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.summary import summarize
from tests.pictures import tiny
from tests.tiny import tiny_gpt2, tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
DBRX = {"d_model": 64, "n_heads": 4, "n_layers": 1, "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4}}


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, vocab_size=96))


def dbrx():
    torch.manual_seed(0)
    settings = {**DBRX, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
    return DbrxForCausalLM(DbrxConfig(**settings, vocab_size=96))


MODELS = {
    "a tied head": lambda: tiny_llama(tie_word_embeddings=True),
    "experts, each with a tensor of its own": mixtral,
    "experts in one tensor": dbrx,
    "a tower whose names are other ones in files": lambda: tiny("llava"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_is_held_against_the_weight_it_was_made_from(kind, tmp_path):
    made = MODELS[kind]()
    made.save_pretrained(tmp_path)
    head = "head" in kind
    packed = quantize_model_(made, GroupQuantConfig(bits=8, quantize_embeddings=head))
    found = summarize(packed, tmp_path)
    assert len(found) == sum(isinstance(layer, GroupQuantLinear) for layer in packed.modules())
    assert all(0 < layer.error < 0.02 for layer in found)  # a step of 8 bits is a 255th of a group's range
    assert ("lm_head" in {layer.name for layer in found}) == head


def test_an_adapter_starts_from_the_float_folder_of_a_model_with_a_tower(tmp_path):
    tiny("llava").save_pretrained(tmp_path)
    for source in (tiny("llava"), tmp_path):
        base = quantize_model_(tiny("llava"), GroupQuantConfig(bits=2))
        targets = {"target_modules": r".*language_model.*_proj", "r": 1, "quantization_aware": True}
        left = initialize_from_error_(get_peft_model(base, QBLoRAConfig(**targets)), source)
        assert len(left) == 7
        assert all(0 < share < 1 for share in left.values())


def test_files_are_those_that_transformers_loads(tmp_path):
    old, new = tiny_llama(seed=1), tiny_llama(seed=2)
    old.save_pretrained(tmp_path, max_shard_size="50KB")
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)  # beside the index and shards of the old one
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(FloatWeights(tmp_path, loaded).read(name), loaded.get_submodule(name).weight)


@pytest.mark.parametrize("source", ["model", "folder"])
def test_an_adapter_of_gpt2_starts_from_weights_that_lie_the_other_way_round(source, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    adapted = get_peft_model(quantize_model_(tiny_gpt2(), GroupQuantConfig(bits=2)), QBLoRAConfig(r=4))
    left = initialize_from_error_(adapted, tiny_gpt2() if source == "model" else tmp_path)
    assert all(0 < share < 1 for share in left.values())


@pytest.mark.parametrize("damage", ["no configuration", "quantized by another library"])
def test_a_folder_of_which_no_float_model_can_be_made_is_of_another_model(damage, tmp_path):
    made = dbrx()
    made.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    if damage == "no configuration":
        file.unlink()
    else:
        quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **quantized}))
    with pytest.raises(CheckpointError, match="it is of another model"):
        summarize(quantize_model_(made, GroupQuantConfig()), tmp_path)


def test_another_model_has_no_such_weight(tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    model = tiny_llama()
    assert FloatWeights(tmp_path, model).read("model.layers.1.self_attn.q_proj") is None
