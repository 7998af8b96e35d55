"""Models whose layers, or the steps that load them, are unlike the others'."""

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.experts import traced_tokens
from tests.tiny import SIZES, tokens

TEXT = {**SIZES, "num_hidden_layers": 1, "head_dim": 16, "max_position_embeddings": 64}
SEEING = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
newer = pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 has no such model")


def quantized(config, make, folder):
    model = make.from_config(config)
    for name, bias in model.named_parameters():
        if name.endswith(".bias"):  # they begin as zeros, of which any order is right
            torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    return make.from_pretrained(folder, quantization_config=GroupQuantConfig()).eval()


def inkling():
    sizes = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim")}
    windows = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8}
    experts = {"moe_intermediate_size": 96, "n_routed_experts": 4, "num_experts_per_tok": 2}
    own = {"unpadded_vocab_size": TEXT["vocab_size"], "d_rel": 16, "rel_extent": 64, "eos_token_id": 2}
    kinds = {"num_hidden_layers": 2, "num_key_value_heads": 2, "layer_types": ["hybrid_sliding", "hybrid"]}
    return AutoConfig.for_model("inkling2_text", **sizes, **windows, **experts, **own, **kinds, pad_token_id=0)


def qianfan():
    vision = {**SEEING, "image_size": [28, 28], "patch_size": [14, 14]}
    return AutoConfig.for_model("qianfan_ocr", text_config={**TEXT, "model_type": "qwen3"}, vision_config=vision)


@newer
@pytest.mark.parametrize(
    ("config", "make"), [(inkling, AutoModelForCausalLM), (qianfan, AutoModelForImageTextToText)], ids=["stem", "bias"]
)
def test_what_loading_renames_or_joins_opens_again_as_it_was_saved(tmp_path, config, make):
    base = quantized(config(), make, tmp_path / "float")
    model = get_peft_model(base, QBLoRAConfig(r=1, quantization_aware=True, init_lora_weights=False))
    merged = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    again = make.from_pretrained(tmp_path / "merged").state_dict()
    assert again.keys() == merged.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.state_dict().items())


@newer
def test_a_block_that_draws_the_stacked_tensors_of_its_experts_is_quantized_and_opens_again(tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**TEXT, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rotary}
    sizes = {"depth": 1, "num_heads": 4, "out_hidden_size": 64, "num_position_embeddings": 16}
    vision = {"hidden_size": 64, "intermediate_size": 96, "deepstack_visual_indexes": [0], **sizes}
    hearing = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
    audio = {**hearing, "num_mel_bins": 16, "downsample_hidden_size": 16, "output_dim": 64, "max_source_positions": 50}
    config = transformers.Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=vision, audio_config=audio)
    make = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    make(config).save_pretrained(tmp_path / "float")
    base = make.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig(bits=8)).eval()
    base.save_pretrained(tmp_path / "packed")
    ids, again = tokens(), make.from_pretrained(tmp_path / "packed").eval()
    with torch.no_grad():
        logits = base(ids).logits
        plain = make.from_pretrained(tmp_path / "float").eval()(ids).logits
        assert torch.equal(again(ids).logits, logits)
    assert (logits - plain).abs().max() < 0.02 * plain.abs().max()  # 8 bits


def test_counts_of_experts_may_be_those_of_single_layers():
    several, most = (
        AutoConfig.for_model("hunyuan_v1_moe", **{**SIZES, "head_dim": 16, "num_experts": 8, "moe_topk": chosen})
        for chosen in ([1, 2], 1)
    )
    assert traced_tokens(several) == traced_tokens(most)


def test_a_model_that_reads_numbers_while_it_is_built_becomes_a_float_one(tmp_path):
    model = quantized(AutoConfig.for_model("apertus", **SIZES), AutoModelForCausalLM, tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(model.dequantize()(tokens()).logits, expected)


@pytest.mark.parametrize("aware", [False, True])
def test_a_projection_that_attention_reads_without_calling_it_gets_no_adapter(tmp_path, aware):
    vision = {**SEEING, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config={**TEXT, "num_key_value_heads": 2}, vision_config=vision)
    base = quantized(config, AutoModelForImageTextToText, tmp_path)
    model = get_peft_model(base, QBLoRAConfig(r=1, quantization_aware=aware))
    assert not any("head.attention" in name for name in adapter_layers(model))
    assert any("vision_tower" in name for name in adapter_layers(model))


@newer
def test_routers_that_the_files_lack_are_drawn_as_transformers_draws_them(tmp_path):
    text = {**TEXT, "layer_types": ["full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
    widths = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_next", **text, **widths))
    held = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("mlp.gate.weight")}
    model.save_pretrained(tmp_path, state_dict=held)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GroupQuantConfig())
    assert 0.01 < again.model.layers[0].mlp.gate.weight.std() < 0.03
