"""An adapter is placed on all of its layers or on none, by whichever of PEFT's tuners."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MambaConfig, MambaForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()
FITS, MISFITS = ["q_proj"], ["q_proj", "v_proj", "down_proj"]  # 112 inputs are no whole groups of 32


def base():
    return quantize_model_(tiny_llama(intermediate_size=112), GroupQuantConfig())


def config(targets):
    return QBLoRAConfig(quantization_aware=True, r=2, target_modules=targets)


def adapted(model):
    return {name for name, _ in model.named_parameters() if "lora_" in name}


def test_the_layers_of_a_refused_adapter_give_it_back(tmp_path):
    model = base()
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="down_proj: in_factor=32 does not divide"):
        get_peft_model(model, config(MISFITS))
    assert not adapted(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    peft = get_peft_model(model, config(FITS))
    assert {name.split(".lora_")[0][-6:] for name in adapted(peft)} == {"q_proj"}
    peft.save_pretrained(tmp_path)
    PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("first", [LoraConfig(r=2, target_modules=FITS), config(FITS)], ids=["lora", "balanced"])
def test_an_adapter_of_the_same_name_that_was_there_before_stays(first):
    model = base()
    peft = get_peft_model(model, first)
    held, settings = adapted(peft), dict(peft.peft_config)
    for refused in (config(MISFITS[1:]), config(["down_proj"])):
        with pytest.raises((ConfigError, ValueError)):
            get_peft_model(model, refused)
    assert adapted(peft) == held
    assert peft.peft_config.keys() == settings.keys()


@pytest.mark.parametrize("mixed", [False, True])
def test_the_adapters_that_are_there_stay_as_they_were(mixed):
    model = get_peft_model(base(), config(FITS), mixed=mixed).eval()
    held, expected = adapted(model), logits(model, IDS)
    with pytest.raises(ConfigError, match="down_proj: in_factor=32 does not divide"):
        model.add_adapter("second", config(MISFITS))
    assert adapted(model) == held
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, IDS), expected)
    model.add_adapter("second", config(FITS))


def test_a_model_of_transformers_takes_another_adapter_after_a_refused_one():
    model = base()
    with pytest.raises(ConfigError, match="down_proj: in_factor=32 does not divide"):
        model.add_adapter(config(MISFITS))
    model.add_adapter(config(FITS))
    assert adapted(model)
    with pytest.raises(ConfigError, match="down_proj: in_factor=32 does not divide"):
        model.add_adapter(config(MISFITS), "second")
    model.add_adapter(config(FITS), "second")


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}], ids=["whole", "rows"]
)
def test_a_mixed_model_trains_no_codes_either(settings):
    model = quantize_model_(tiny_llama(), GroupQuantConfig(quantize_embeddings=True))
    with pytest.raises(ConfigError, match="holds packed codes, which have no gradient"):
        get_peft_model(model, QBLoRAConfig(r=4, **settings), mixed=True)
    assert not adapted(model)


def test_a_mixed_model_refuses_layers_that_a_kernel_reads():
    model = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=32, state_size=8))
    with pytest.raises(ConfigError, match=r"out_proj: the kernels of a mamba model read this layer's weight"):
        get_peft_model(model, QBLoRAConfig(r=4, target_modules=["out_proj"]), mixed=True)


def test_a_mixed_model_keeps_the_order_of_bitsandbytes_codes(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the [bnb] extra is not installed")
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=nf4)
    model = get_peft_model(model, QBLoRAConfig(r=4), mixed=True).train()
    trained = logits(model, IDS)
    assert torch.equal(logits(model.eval(), IDS), trained)
    assert torch.equal(logits(model.train(), IDS), trained)


TOKENS = {"embed_tokens": [5], "nothing": [5]}


@pytest.mark.parametrize(
    "refused",
    [
        {"target_modules": MISFITS, "layer_replication": [(0, 2), (0, 2)]},
        {"target_modules": ["v_proj"], "modules_to_save": ["norm"], "trainable_token_indices": TOKENS},
        {"target_modules": FITS, "trainable_token_indices": [2000]},
    ],
    ids=["replicated", "wrapped", "rows"],
)
@pytest.mark.parametrize("way", ["peft", "mixed", "transformers"])
def test_nothing_else_stays_of_what_was_refused(way, refused):
    model = base()
    settings = {"quantization_aware": True, "r": 2, "init_lora_weights": False}
    adapter = QBLoRAConfig(target_modules=["q_proj", "o_proj"], **settings)
    if way == "transformers":
        model.add_adapter(adapter, "first")
        adapting = model
    else:
        adapting = get_peft_model(model, adapter, "first", mixed=way == "mixed")
    kinds, expected = {name: type(m) for name, m in model.named_modules()}, logits(adapting.eval(), IDS)
    other = QBLoRAConfig(**settings, **refused)
    with pytest.raises((ConfigError, ValueError, IndexError)):
        adapting.add_adapter(*((other, "second") if way == "transformers" else ("second", other)))
    if way == "transformers" or "modules_to_save" not in refused:  # PEFT itself wraps those of a PeftModel afterwards
        assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert torch.equal(logits(adapting.eval(), IDS), expected)
    assert {name for layer in adapter_layers(model).values() for name in layer.active_adapters} == {"first"}
