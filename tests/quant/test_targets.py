"""Which layers are quantized."""

import pytest
import torch
import transformers
from torch import nn

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.affine import min_max
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.targets import is_linear, is_named, keys_of, target_layers
from tests.tiny import tiny_llama

BERT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 100}


class Spelled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(1)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_linear_counts_if_it_computes_what_a_linear_layer_computes():
    assert is_linear(Spelled(4, 6))
    assert is_linear(Spelled(4, 6, bias=False).to("meta"))
    assert not is_linear(Router(4, 6))
    assert not is_linear(Scaled(4, 6))


def test_the_keys_of_a_module_are_those_that_name_it():
    name = "model.layers.12.mlp.experts.2.down_proj"
    named = {name, "layers.12", "experts.2", "2.down_proj", "down_proj", "model", "mlp.experts", "12", "2"}
    other = {"layers.1", "experts.2.down", "proj", "layers.2", "", ".down_proj", "model.", "experts.12", "down.proj"}
    assert named <= keys_of(name)
    assert other.isdisjoint(keys_of(name))
    assert all(is_named(name, key) for key in keys_of(name))
    assert not any(is_named(name, key) for key in other)


def test_a_weight_that_torchs_own_attention_reads_stays_in_float():
    assert not is_linear(nn.MultiheadAttention(8, 2).out_proj)


def test_a_classifier_on_top_stays_in_float():
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT, vocab_size=100))
    found = target_layers(model, GroupQuantConfig())
    assert "roberta.encoder.layer.0.attention.self.query" in found
    assert not [name for name in found if name.startswith("classifier")]


def test_a_layer_narrower_than_every_group_stays_in_float():
    narrow = {**BERT, "hidden_size": 8, "intermediate_size": 32, "vocab_size": 100}
    found = target_layers(transformers.LlamaForCausalLM(transformers.LlamaConfig(**narrow)), GroupQuantConfig())
    assert found == ["model.layers.0.mlp.down_proj"]


def test_what_a_model_wants_in_float32_stays_so():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    found = target_layers(model, GroupQuantConfig())
    assert "decoder.block.0.layer.2.DenseReluDense.wi" in found
    assert not [name for name in found if name.endswith(".wo")]


def test_a_layer_that_is_handed_integers_says_why():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    layer = GroupQuantLinear.from_affine(min_max(weight, 32, 4, False, torch.float16), bits=4, group_size=32)
    with pytest.raises(ConfigError, match=r"was handed torch.uint8: the model casts .*modules_to_not_convert"):
        layer(torch.zeros(1, 32).to(layer.weight.dtype))


def test_experts_that_stay_in_float_are_named(caplog):
    model = tiny_llama()
    model.model.layers[0].experts = nn.ParameterList([torch.randn(4, 64, 192)])  # as models that nobody knows have them
    quantize_model_(model, GroupQuantConfig())
    assert "stay in float, because they are no linear layers: model.layers.0.experts.0 and 0 more" in caplog.text


def test_no_weight_is_copied_while_layers_are_chosen(monkeypatch):
    """transformers 4.57 copies the model it is asked about, to tie its weights."""
    copied, original = [], nn.Parameter.__deepcopy__

    def deepcopy(self, memo):
        copied.append(self.device.type)
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", deepcopy)
    model = tiny_llama(tie_word_embeddings=True)
    assert not [name for name in target_layers(model, GroupQuantConfig()) if "lm_head" in name]
    assert set(copied) <= {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["Bert", "ViT"])
def test_a_pooler_stays_in_float_with_either_generation(kind):
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**BERT))
    targets = target_layers(model, GroupQuantConfig())
    assert len(targets) == 6
    assert not any("pooler" in name for name in targets)
