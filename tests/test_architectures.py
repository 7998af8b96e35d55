"""The core path on tiny random models of many architectures: quantize, adapt, one step back, merge, save, reload."""

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from tests.tiny import logits, tokens

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
ARCHITECTURES = {
    "Mistral": COMMON,
    "Qwen2": COMMON,  # biases on q, k, v
    "Qwen3": {**COMMON, "head_dim": 32},  # heads wider than hidden_size / num_heads
    "Gemma2": {**COMMON, "head_dim": 16},  # tied, scaled embeddings, soft caps
    "Phi3": COMMON,  # q, k, v in one matrix
    "Cohere": COMMON,
    "Mixtral": {**COMMON, "num_local_experts": 2},
    "GPTNeoX": {**COMMON, "num_key_value_heads": None},
    "GPT2": GPT,  # Conv1D
    "GPTJ": {**GPT, "rotary_dim": 8},  # buffers beside the weights
    "OPT": {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64, **{k: COMMON[k] for k in list(COMMON)[2:4]}}
    | {"vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0},
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_trained_is_what_is_merged_saved_and_reloaded(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    model = get_peft_model(base, QBLoRAConfig(r=8, quantization_aware=True, init_lora_weights=False))

    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable)

    expected = logits(model.eval(), tokens())
    merged = merge(model)
    # float32 rounding through two layers of width 64
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, tokens()), logits(merged, tokens()))
