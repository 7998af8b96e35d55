"""The core path on tiny random models of many architectures: quantize, adapt, one step back, merge, save, reload."""

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from tests.tiny import SIZES, logits, tokens

COMMON = {**SIZES, "pad_token_id": 0}
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
    "Llama4Text": {
        **COMMON,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
    },  # a router of its own
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
OTHER_TASKS = {
    "T5": (AutoModelForSeq2SeqLM, {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}),
    "Bart": (AutoModelForSeq2SeqLM, {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}),
    "Bert": (AutoModelForTokenClassification, COMMON),
    "Roberta": (AutoModelForSequenceClassification, COMMON),  # two linear layers in its head
    "DistilBert": (AutoModelForSequenceClassification, {"dim": 64, "hidden_dim": 96, "n_layers": 1, "n_heads": 4}),
    "Gemma3": (
        AutoModelForImageTextToText,
        {"text_config": COMMON, "vision_config": {**VISION, "num_hidden_layers": 1}},
    ),
}
TASKS = {
    AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM",
    AutoModelForTokenClassification: "TOKEN_CLS",
    AutoModelForSequenceClassification: "SEQ_CLS",
    AutoModelForImageTextToText: "CAUSAL_LM",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_trained_is_what_is_merged_saved_and_reloaded(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    model = get_peft_model(base, QBLoRAConfig(r=8, out_factor=2, quantization_aware=True, init_lora_weights=False))

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


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_models_for_other_tasks_merge_save_and_reload_as_well(name, tmp_path):
    auto, settings = OTHER_TASKS[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    if name != "Gemma3":
        config.vocab_size, config.pad_token_id, config.decoder_start_token_id = 100, 0, 0
    auto.from_config(config).save_pretrained(tmp_path / "float")
    base = auto.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    adapter = QBLoRAConfig(r=8, out_factor=2, quantization_aware=True, init_lora_weights=False, task_type=TASKS[auto])
    model = get_peft_model(base, adapter).eval()
    inputs = {"input_ids": tokens()}
    if auto is AutoModelForSeq2SeqLM:
        inputs["decoder_input_ids"] = tokens(seed=1)
    with torch.no_grad():
        expected = model(**inputs).logits
        merged = merge(model)
        found = merged(**inputs).logits
        # float32 rounding through two layers of width 64; Gemma3 scales its embeddings
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
        merged.save_pretrained(tmp_path / "merged")
        again = auto.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(**inputs).logits, found)


def test_a_base_model_loads_from_the_checkpoint_of_a_model_with_a_head(tmp_path):
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    model.save_pretrained(tmp_path / "float")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    packed.save_pretrained(tmp_path / "packed")
    inner = AutoModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(inner(tokens()).last_hidden_state, packed.model(tokens()).last_hidden_state)
