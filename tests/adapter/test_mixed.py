"""Balanced adapters beside other PEFT methods on the same layers."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, get_peft_model
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.adapter.factors import recorded_factors
from qbl_trl.adapter.layer import BalancedLinear, adapter_layers
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.onnx.models import quantize
from tests.tiny import logits, tiny_llama, tokens

TARGETS = ["q_proj", "down_proj"]
OURS = QBLoRAConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
LOHA = LoHaConfig(r=4, target_modules=TARGETS, init_weights=False)
IDS = tokens()


@pytest.mark.parametrize(("first", "second"), [(OURS, LOHA), (LOHA, OURS)])
def test_two_methods_on_one_layer_add_up_switch_and_merge(first, second):
    model = get_peft_model(tiny_llama(), first, "first", mixed=True)
    model.add_adapter("second", second)
    assert any(isinstance(module, BalancedLinear) for module in model.modules())
    outputs = {}
    for names in (["first"], ["second"], ["first", "second"]):
        model.set_adapter(names)
        outputs[tuple(names)] = logits(model.eval(), IDS)
    assert len({round(float(y.sum()), 4) for y in outputs.values()}) == 3
    merged = model.merge_and_unload()
    # float32 rounding of sums of at most 96 products
    torch.testing.assert_close(logits(merged, IDS), outputs["first", "second"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_a_mixed_model_that_is_merged_saves_what_it_computes_tied_heads_too(packed, tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    base = quantize_model_(base, GroupQuantConfig(quantize_embeddings=True)) if packed else base
    targets = {"target_modules": ["q_proj", "lm_head"], "in_factor": 32, "out_factor": 1}
    model = get_peft_model(base, QBLoRAConfig(r=2, init_lora_weights=False, **targets), mixed=True).eval()
    expected = logits(model, IDS)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-5)  # float32 rounding
    model.unmerge_adapter()
    model.merge_and_unload().save_pretrained(tmp_path)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path), IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


LORA = LoraConfig(target_modules=TARGETS)


@pytest.mark.parametrize(("first", "second"), [(OURS, LORA), (LORA, OURS)])
def test_a_lora_and_a_balanced_adapter_do_not_share_a_layer(first, second):
    model = get_peft_model(tiny_llama(), first, "first", mixed=True)
    with pytest.raises(ConfigError, match=r"cannot hold a LoRA and a balanced adapter; use QBLoRAConfig\(in_factor=1"):
        model.add_adapter("second", second)


def test_merge_refuses_what_another_method_would_leave_behind():
    model = get_peft_model(tiny_llama(), OURS, "first", mixed=True)
    model.add_adapter("second", LOHA)
    with pytest.raises(MergeError, match="adapters of other PEFT methods"):
        merge(model)


def test_a_mixed_model_states_the_factors_its_layers_got():
    open_factors = QBLoRAConfig(r=4, quantization_aware=True, target_modules=TARGETS)
    model = get_peft_model(quantize(tiny_llama(hidden_size=128), p=None), open_factors, "ours", mixed=True)
    stated = model.peft_config["ours"]
    assert stated.in_factor == 32
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, BalancedLinear):
            assert recorded_factors(stated, name) == (layer.in_factor["ours"], layer.out_factor["ours"])


@pytest.mark.parametrize("balanced_first", [True, False])
def test_a_layer_holds_no_lora_beside_a_balanced_adapter(balanced_first):
    configs = [QBLoRAConfig(r=4, target_modules=TARGETS), LoraConfig(r=4, target_modules=TARGETS)]
    first, second = configs if balanced_first else configs[::-1]
    model = tiny_llama()
    model.add_adapter(first, "one")
    with pytest.raises(ConfigError, match="one layer cannot hold a"):
        model.add_adapter(second, "two")


def test_a_merge_that_one_layer_refuses_changes_none():
    settings = {"r": 4, "in_factor": 32, "target_modules": ["q_proj", "v_proj"]}
    ours = QBLoRAConfig(**settings, in_factor_pattern={"layers.1.self_attn.v_proj": 16})
    model = get_peft_model(quantize_model_(tiny_llama(), GroupQuantConfig()), ours, mixed=True)
    for merging in (model.merge_and_unload, model.base_model.merge_adapter):
        with pytest.raises(MergeError, match=r"layers.1.self_attn.v_proj: in_factor=16 is no multiple"):
            merging()
    layers = [module for module in model.modules() if isinstance(module, BalancedLinear)]
    assert len(layers) == 4
    assert not any(layer.merged for layer in layers)


def test_layers_whose_other_adapters_were_deleted_are_their_base(tmp_path):
    base = quantize_model_(tiny_llama(), GroupQuantConfig())
    ours = QBLoRAConfig(r=4, quantization_aware=True, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, ours, "ours", mixed=True).eval()
    model.add_adapter("lora", LoraConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter("ours")
    with pytest.raises(MergeError, match="other PEFT methods"):
        merge(model)
    model.delete_adapter("lora")
    expected = logits(model, IDS)
    merge(model).save_pretrained(tmp_path)
    for merged in (AutoModelForCausalLM.from_pretrained(tmp_path), model.merge_and_unload()):
        torch.testing.assert_close(logits(merged, IDS), expected, rtol=0, atol=1e-5)  # float32 rounding


def test_a_further_adapter_on_all_linear_layers_leaves_the_head_out_as_the_first_does():
    config = QBLoRAConfig(r=1, quantization_aware=True)
    model = PeftMixedModel(quantize_model_(tiny_llama(), GroupQuantConfig()), config, "first")
    model.add_adapter("second", QBLoRAConfig(r=1, quantization_aware=True))
    layers = adapter_layers(model)
    assert not any("lm_head" in name for name in layers)
    assert all(layer.rank.keys() == {"first", "second"} for layer in layers.values())


@pytest.mark.parametrize("packed", [True, False])
def test_two_balanced_adapters_around_another_that_was_deleted_merge(packed):
    base = quantize_model_(tiny_llama(), GroupQuantConfig(bits=8)) if packed else tiny_llama()
    ours = {"target_modules": TARGETS, "in_factor": 32, "r": 2, "init_lora_weights": False}
    model = get_peft_model(base, QBLoRAConfig(**ours), "first", mixed=True)
    model.add_adapter("between", LOHA)
    model.add_adapter("second", QBLoRAConfig(**ours))
    model.delete_adapter("between")
    model.set_adapter(["first", "second"])
    expected = logits(model.eval(), IDS)
    torch.testing.assert_close(logits(merge(model), IDS), expected, rtol=0, atol=1e-5)  # float32 rounding
