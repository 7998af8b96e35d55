"""Layers whose weight the model around them reads: they stay in float, and the model runs."""

from unittest import mock

import pytest
import torch
import transformers
from torch import nn

from qbl_trl import GroupQuantConfig
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.read_weights import read_by, read_by_others
from qbl_trl.quant.targets import target_layers
from tests.tiny import tokens

T5 = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
VIDEO = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.cast, self.typed, self.product, self.called, self.guarded = (nn.Linear(32, 32) for _ in range(5))
        self.table = nn.Embedding(4, 32)

    def forward(self, x):
        kind = self.typed.weight.dtype
        x = self.cast(x.to(self.cast.weight.dtype))
        x = self.typed(x.to(dtype=kind))
        x = nn.functional.linear(x.view(x.shape), self.product.weight, bias=self.product.bias)
        return self.called(self.closed(x.to(self.table.weight.dtype)))

    def closed(self, x):
        if self.guarded.weight.dtype != torch.int8 and self.guarded.weight.dtype != torch.uint8:
            x = x.to(self.guarded.weight.dtype)
        return self.guarded(x).to(self.called.weight.device)


class Child(Reader):
    """Its methods are those of its parent."""


class Replaced(Reader):
    """None of what its parent reads is read here."""

    proxy = mock.call

    def forward(self, x):
        # x = self.cast(x.to(self.cast.weight.dtype))
        kind = self.typed.weight.dtype if x.is_cuda else x.dtype
        return self.product(self.typed(x.to(kind)), self.cast.weight.device)

    def closed(self, x):
        return x.type_as(self.called.weight)


def test_the_source_of_a_class_says_which_weights_it_reads():
    assert read_by(Reader) == read_by(Child) == {"cast", "typed", "product", "table"}
    assert read_by_others(nn.Sequential(Child())) == {"0.cast", "0.typed", "0.product"}
    assert read_by(Replaced) == {"called"}


def test_a_class_without_a_source_reads_nothing():
    space = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return self.a(x.to(self.a.weight.dtype))", space)
    assert read_by(space["Made"]) == set()


def long_t5():
    config = transformers.LongT5Config(**T5, decoder_start_token_id=0, local_radius=3)
    return transformers.LongT5ForConditionalGeneration(config), {
        "input_ids": tokens(),
        "decoder_input_ids": tokens(),
    }


def video_mae():
    config = transformers.VideoMAEConfig(**VIDEO, image_size=32, patch_size=8, num_frames=2, tubelet_size=2)
    return transformers.VideoMAEForVideoClassification(config), {"pixel_values": torch.randn(2, 2, 3, 32, 32)}


def exact_bloom():
    sizes = {"hidden_size": 64, "n_layer": 1, "n_head": 4, "vocab_size": 100}
    config = transformers.BloomConfig(**sizes, pretraining_tp=2, slow_but_exact=True)
    return transformers.BloomForCausalLM(config), {"input_ids": tokens()}


@pytest.mark.parametrize("build", [long_t5, video_mae, exact_bloom])
def test_a_quantized_model_runs_that_reads_weights_of_its_layers(build):
    model, inputs = build()
    quantize_model_(model.eval(), GroupQuantConfig())
    assert any(isinstance(module, GroupQuantLinear) for module in model.modules())
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


class Around(Reader):
    """Reads the weight of one `cast`; that of the block is called."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"cast": nn.Linear(32, 32)})


def test_a_layer_of_the_same_name_elsewhere_is_none_of_its_business():
    class Model(transformers.PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.cast, self.block, self.last = nn.Linear(32, 32), Around(), nn.Linear(32, 32)
            self.post_init()

        def forward(self, x):
            return self.last(self.block(self.cast(x.to(self.cast.weight.dtype))))

    found = target_layers(Model(transformers.PretrainedConfig()), GroupQuantConfig())
    assert "block.block.cast" in found
    assert not {"cast", "block.cast", "block.product"} & {*found}
