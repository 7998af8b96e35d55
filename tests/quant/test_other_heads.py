"""A packed folder opened by another head than the one that it was saved from: an inner model, or another task."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Model,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.quant.hf_quantizer import quantize_model_
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
