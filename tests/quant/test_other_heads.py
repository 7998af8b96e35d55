"""A packed folder opened by another head than the one that it was saved from: an inner model, or another task."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Model,
    LlamaForCausalLM,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.errors import CheckpointError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.hf_quantizer import describe_stored_, quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import tiny_gpt2, tiny_llama, tokens

BERT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
LAYERS = {"llama": (tiny_llama, ["q_proj", "v_proj"], {"q_proj": 4}), "gpt2": (tiny_gpt2, ["c_attn"], {})}


def states(model):
    with torch.no_grad():
        return model(tokens()).last_hidden_state


def merged(kind):
    build, targets, factors = LAYERS[kind]
    settings = {"r": 2, "out_factor": 2, "out_factor_pattern": factors, "target_modules": targets}
    base = quantize_model_(build(), GroupQuantConfig())
    return merge(get_peft_model(base, QBLoRAConfig(**settings, quantization_aware=True, init_lora_weights=False)))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_inner_model_of_a_merged_folder_has_the_adapters_that_only_some_layers_have(tmp_path, kind):
    model = merged(kind)
    model.save_pretrained(tmp_path / "whole")
    inner = AutoModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(states(inner), states(model.base_model))
    inner.save_pretrained(tmp_path / "inner")
    assert torch.equal(states(AutoModel.from_pretrained(tmp_path / "inner")), states(inner))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "inner")
    assert isinstance(again.base_model, GPT2Model) == (kind == "gpt2")
    assert torch.equal(states(again.base_model), states(inner))


def test_a_layer_that_the_stored_class_lacks_is_drawn_in_float_as_from_a_float_folder(tmp_path):
    model = quantize_model_(BertForMaskedLM(BertConfig(**BERT)), GroupQuantConfig())
    model.save_pretrained(tmp_path)
    classifier = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(classifier.bert.pooler.dense) is nn.Linear
    assert isinstance(classifier.bert.encoder.layer[0].output.dense, GroupQuantLinear)
    assert torch.equal(states(classifier.bert), states(model.eval().bert))
    assert torch.isfinite(classifier(tokens()).logits).all()


@pytest.mark.parametrize("opened", [AutoModel, AutoModelForSequenceClassification, "a class of its own"])
def test_a_layer_that_a_folder_has_lost_is_missing_under_any_head(tmp_path, opened):
    class Own(LlamaForCausalLM):
        pass

    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight' is missing"):
        (Own if isinstance(opened, str) else opened).from_pretrained(tmp_path)


def test_the_format_of_a_head_that_the_inner_model_lacks_is_no_matter(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig(quantize_embeddings=True))
    fine = quantize(torch.randn(100, 64), bits=8, group_size=32, symmetric=False, algorithm="rtn")
    model.lm_head = GroupQuantLinear.from_affine(fine, bits=8, group_size=32)
    describe_stored_(model, model.config.quantization_config)
    model.save_pretrained(tmp_path)
    assert "lm_head" in model.config.quantization_config.layers
    assert torch.equal(states(AutoModel.from_pretrained(tmp_path)), states(model.model))


@pytest.mark.skipif(BEFORE_5, reason="transformers 4.57 has no files to look at there, and never did")
def test_weights_may_lie_apart_from_their_configuration(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    model.save_pretrained(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="weights", config=config)
    assert torch.equal(states(again.model), states(model.model))
