"""`model.dequantize()`: the float model of the same function, which saves and loads as any other."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from qbl_trl import GroupQuantConfig
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
