"""The check before the first step."""

import copy
import random

import numpy
import peft
import pytest
import torch
from torch import nn

from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import MergeError
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.trl.probe import probe
from qbl_trl.trl.shadow import computing_merged, merged_base
from qbl_trl.trl.tokens import random_tokens
from tests.tiny import tiny_gpt2, tiny_llama, tokens
from tests.trl.runs import adapter, base


def adapted(model=None, **changes):
    return peft.get_peft_model(base() if model is None else model, adapter(**changes))


def test_the_probe_asks_one_layer_of_each_kind_and_finds_rounding_only():
    errors = probe(adapter_layers(adapted()))
    assert [name.rpartition(".")[2] for name in errors] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert max(errors.values()) <= 1e-6  # fp32 rounding


def test_the_probe_leaves_no_trace():
    model = adapted(lora_dropout=0.5).train()
    before = copy.deepcopy(model.state_dict())
    formats = {n: m.format for n, m in model.named_modules() if isinstance(m, GroupQuantLinear)}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    modes = {name: module.training for name, module in model.named_modules()}
    probe(adapter_layers(model))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert formats == {n: m.format for n, m in model.named_modules() if isinstance(m, GroupQuantLinear)}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_merge_that_computes_something_else_is_found_before_training(monkeypatch):
    honest = GroupQuantLinear.set_delta
    monkeypatch.setattr(GroupQuantLinear, "set_delta", lambda self, d, *factors: honest(self, d * 1.01, *factors))
    with pytest.raises(MergeError, match=r"q_proj: before training, .* differ by"):
        probe(adapter_layers(adapted()))


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (lambda: None, {"quantization_aware": False}),  # factors inside a group: no exact merge
        (lambda: tiny_llama(), {"quantization_aware": False}),  # float base
        (lambda: tiny_llama().to(torch.bfloat16), {"quantization_aware": False}),
        (lambda: tiny_gpt2(), {"quantization_aware": False}),  # transposed weights
        (lambda: None, {"adapter": "block"}),
    ],
    ids=["q-blora", "float", "bfloat16", "conv1d", "block"],
)
def test_every_base_and_adapter_is_probed(model, changes):
    assert probe(adapter_layers(adapted(model(), **changes)))


def test_the_probe_is_drawn_on_the_cpu_whatever_the_default_device():
    model = adapted()
    with torch.device("meta"):
        errors = probe(adapter_layers(model))
        tokens = random_tokens(32)
    assert errors
    assert tokens.device.type == "cpu"


def test_layers_that_are_elsewhere_are_passed_over():
    assert probe(adapter_layers(adapted().to("meta"))) == {}


def test_a_merged_base_shares_the_codes_and_leaves_the_layer_alone():
    layer = next(iter(adapter_layers(adapted(init_lora_weights=False)).values()))
    merged = merged_base(layer)
    assert merged.weight.data_ptr() == layer.get_base_layer().weight.data_ptr()
    assert merged.delta is not None
    assert layer.get_base_layer().delta is None


def test_computing_merged_gives_the_same_logits_and_the_bases_with_adapters_disabled():
    model = adapted(init_lora_weights=False).eval()
    ids = tokens(vocabulary=32)
    with torch.no_grad():
        trained = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
        with computing_merged(model):
            torch.testing.assert_close(model(ids).logits, trained, rtol=0, atol=1e-5)  # fp32 rounding
            with model.disable_adapter():
                torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
        torch.testing.assert_close(model(ids).logits, trained, rtol=0, atol=0)
    assert (trained - plain).abs().max() > 1e-3


def test_the_probe_does_not_make_bitsandbytes_repack_the_models_codes(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the [bnb] extra is not installed")
    model = nn.Module()
    model.layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    model.layer.to("cpu").support_avx512bf16_for_cpu = True  # repacks in eval mode, in place

    def repack(*args):
        raise AssertionError("the codes were repacked")

    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repack)
    layers = adapter_layers(peft.inject_adapter_in_model(adapter(quantization_aware=False), model).eval())
    assert list(probe(layers)) == ["layer"]
