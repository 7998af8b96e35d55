"""Other PEFT methods over packed layers: they train, or are refused, and their merge into codes is, in words."""

import copy

import pytest
import torch
from peft import (
    DeftConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    KasaConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeanutConfig,
    UniLoraConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.adapter import others
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()
TARGETS = ["q_proj", "down_proj"]
METHODS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "loha": LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
}


def groups(bits=4):
    return quantize_model_(tiny_llama(), GroupQuantConfig(bits=bits))


CALLS = [LoraConfig, IA3Config, OFTConfig, VeraConfig]  # some of those that call their base
READS = [HiraConfig, HRAConfig, PeanutConfig, UniLoraConfig]  # those that would compute with codes, in silence
READS_SHAPES = [LoHaConfig, LoKrConfig, DeftConfig]


def adapted(base, config_class):
    more = {"feedforward_modules": []} if config_class is IA3Config else {}
    return get_peft_model(base, config_class(target_modules=TARGETS, **more)).eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("config_class", CALLS + READS_SHAPES)
def test_what_calls_its_base_computes_as_over_the_float_weights_of_the_codes(config_class, bits):
    base = groups(bits)
    plain = copy.deepcopy(base).dequantize()
    if config_class in READS_SHAPES and bits == 4:  # the shape of the weight is that of the bytes
        with pytest.raises(ConfigError, match=r"q_proj: L?[A-Z]+ reads the weight of its layer, which is packed codes"):
            adapted(base, config_class)
        return
    torch.manual_seed(0)
    model = adapted(base, config_class)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    twin = adapted(plain, config_class)
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    expected = logits(twin, IDS)
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-4)  # float32, products in another order
    assert not torch.allclose(expected, logits(model.unload(), IDS), atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("config_class", READS)
def test_what_reads_the_weight_is_refused_where_it_is_packed_before_anything_is_placed(config_class, bits):
    base = groups(bits)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: [A-Z]+ reads the weight of its layer"):
        adapted(base, config_class)
    assert torch.equal(logits(base, IDS), logits(groups(bits), IDS))
    head = get_peft_model(base, config_class(target_modules=["lm_head"]))  # which stays in float
    head(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"kasa_config": KasaConfig()}])
def test_the_variants_of_lora_that_read_it_are_refused(settings):
    base = groups(8)
    codes = base.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ConfigError, match=r"LORA with (use_dora|kasa_config) reads the weight"):
        get_peft_model(base, LoraConfig(target_modules=TARGETS, **settings))
    assert torch.equal(base.model.layers[0].self_attn.q_proj.weight, codes)
    get_peft_model(base, LoraConfig(target_modules=["lm_head"], **settings))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "orthogonal", "corda", "mica"])
def test_starts_of_lora_that_read_it_are_refused_with_those_that_do_not(start):
    settings = {"target_modules": TARGETS, "r": 4}
    message = rf"q_proj: LORA with init_lora_weights='{start}' reads .*=True or \"gaussian\""
    with pytest.raises(ConfigError, match=message):
        get_peft_model(groups(), LoraConfig(init_lora_weights=start, **settings))
    for works in (True, "gaussian"):
        get_peft_model(groups(), LoraConfig(init_lora_weights=works, **settings))(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize(("method", "bits"), [("lora", 4), ("lora", 8), ("ia3", 4), ("ia3", 8), ("loha", 8)])
def test_it_trains_and_its_merge_is_refused_before_a_code_is_touched(method, bits):
    model = get_peft_model(groups(bits), METHODS[method])
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = logits(model.eval(), IDS)
    for safe in (False, True):
        for merging in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(MergeError, match=r"q_proj: a .* does not merge into packed codes\. Train QBLoRAConfig"):
                merging(safe_merge=safe)
    assert torch.equal(logits(model, IDS), expected)
    assert torch.equal(logits(model.unload(), IDS), logits(groups(bits), IDS))


def test_a_mixed_model_is_asked_as_well():
    ours = QBLoRAConfig(r=4, target_modules=TARGETS, quantization_aware=True)
    model = get_peft_model(groups(8), ours, "ours", mixed=True)
    with pytest.raises(ConfigError, match="LORA with use_dora reads the weight of its layer"):
        model.add_adapter("dora", LoraConfig(target_modules=["v_proj"], use_dora=True))
    model.add_adapter("other", METHODS["loha"])
    with pytest.raises(MergeError, match="does not merge into packed codes"):
        model.merge_and_unload()


def test_layers_that_stay_in_float_take_it_as_ever():
    base = quantize_model_(tiny_llama(), GroupQuantConfig(modules_to_not_convert=["down_proj"]))
    settings = {"target_modules": ["down_proj"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=2, **settings)).eval()
    expected = logits(model, IDS)
    torch.testing.assert_close(logits(model.merge_and_unload(), IDS), expected, rtol=0, atol=1e-5)  # float32 rounding


def test_layers_are_looked_through_once_for_all_targets_of_an_adapter(monkeypatch):
    """Of a mixture there are tens of thousands of both."""
    asked, original = [], others.refuse_placement

    def refuse_placement(tuner, config, model):
        asked.append(config)
        original(tuner, config, model)

    monkeypatch.setattr(others, "refuse_placement", refuse_placement)
    first, second = (LoHaConfig(r=2, target_modules=["q_proj", "k_proj"]) for _ in range(2))
    model = get_peft_model(quantize_model_(tiny_llama(), GroupQuantConfig(bits=8)), first)
    model.add_adapter("second", second)
    assert [id(config) for config in asked] == [id(first), id(second)]
