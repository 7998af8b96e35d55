"""`model.dequantize()`: the float model of the same function, which saves and loads as any other."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.errors import ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.packed import PackedWeight
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens

MODELS = {
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,  # whose layers are stored transposed, some of them square
}


@pytest.mark.parametrize("quantize_embeddings", [False, True])
@pytest.mark.parametrize("kind", list(MODELS))
def test_it_computes_the_same_and_so_does_what_it_saves(tmp_path, kind, quantize_embeddings):
    config = GroupQuantConfig(quantize_embeddings=quantize_embeddings)
    model = quantize_model_(MODELS[kind](), config)
    expected = logits(model, tokens())
    plain = model.dequantize()
    assert not any(isinstance(module, PackedWeight) for module in plain.modules())
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == (kind != "llama")
    torch.testing.assert_close(logits(plain, tokens()), expected, rtol=0, atol=1e-5)  # products in another order
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False)
    assert torch.equal(logits(again, tokens()), logits(plain, tokens()))


def test_a_model_of_several_parts_saves_and_opens_again(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=100)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "f")
    packed = LlavaForConditionalGeneration.from_pretrained(tmp_path / "f", quantization_config=GroupQuantConfig())
    plain = packed.dequantize()
    plain.save_pretrained(tmp_path / "d")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "d")
    assert torch.equal(logits(again, tokens()), logits(plain, tokens()))


def test_it_takes_the_dtype_of_the_model():
    plain = quantize_model_(tiny_llama(), GroupQuantConfig()).to(torch.bfloat16).dequantize()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_it_takes_the_dtype_of_a_model_that_was_loaded_cast_and_saved(tmp_path):
    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    assert {p.dtype for p in model.dequantize().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("target", ["attn.c_proj", "c_attn"])
def test_adapters_of_layers_that_are_stored_transposed_merge_afterwards(target):
    model = quantize_model_(tiny_gpt2(), GroupQuantConfig(group_size=16))
    settings = {"quantization_aware": True, "r": 2, "target_modules": [target], "init_lora_weights": False}
    adapted = get_peft_model(model, QBLoRAConfig(**settings)).eval()
    expected = logits(adapted, tokens())
    model.dequantize()
    for merged in (merge(adapted), adapted.merge_and_unload()):
        torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=1e-5)  # products in another order


def test_a_merged_head_comes_back_to_the_embedding_that_is_there_by_then():
    model = quantize_model_(tiny_llama(tie_word_embeddings=True), GroupQuantConfig(quantize_embeddings=True))
    settings = {"quantization_aware": True, "r": 2, "target_modules": ["lm_head"], "init_lora_weights": False}
    adapted = get_peft_model(model, QBLoRAConfig(**settings)).eval()
    expected = logits(adapted, tokens())
    adapted.merge_adapter()
    model.dequantize()
    adapted.unmerge_adapter()
    assert model.lm_head.get_base_layer().weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(adapted, tokens()), expected, rtol=0, atol=1e-5)


def test_experts_with_adapters_are_not_stacked():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 100, "num_key_value_heads": 2}
    model = quantize_model_(MixtralForCausalLM(MixtralConfig(**sizes, **experts)), GroupQuantConfig())
    settings = {"quantization_aware": True, "r": 2, "target_modules": ["w1"], "init_lora_weights": False}
    adapted = get_peft_model(model, QBLoRAConfig(**settings)).eval()
    expected = logits(adapted, tokens())
    if BEFORE_5:  # where experts are layers of their own
        model.dequantize()
    else:
        with pytest.raises(ConfigError, match=r"experts\.0\.w1 has an adapter, .* merge the adapter first"):
            model.dequantize()
    torch.testing.assert_close(logits(adapted, tokens()), expected, rtol=0, atol=1e-5)


def test_other_methods_do_not_meet_layers_that_are_stored_transposed():
    model = quantize_model_(tiny_gpt2(), GroupQuantConfig())
    adapted = get_peft_model(model, LoraConfig(target_modules=["attn.c_proj"], init_lora_weights=False)).eval()
    expected = logits(adapted, tokens())
    with pytest.raises(ConfigError, match=r"attn\.c_proj has an adapter of another method .* transposed"):
        model.dequantize()
    assert torch.equal(logits(adapted, tokens()), expected)
