"""A packed model is saved as it is, or not at all: under adapters, with a given state, with its configuration."""

import copy

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.quant.test_hf_quantizer import load
from tests.tiny import logits, tiny_llama, tokens


def test_a_base_under_an_adapter_is_not_saved_over_itself(tmp_path):
    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    adapted = get_peft_model(model, QBLoRAConfig(r=2, quantization_aware=True))
    with pytest.raises(ConfigError, match=r"an adapter sits on model\.layers\.0\.self_attn\.q_proj"):
        adapted.get_base_model().save_pretrained(tmp_path / "base")
    expected = logits(adapted.unload(), tokens())
    torch.testing.assert_close(logits(load(tmp_path / "base"), tokens()), expected, rtol=0, atol=0)
    model.add_adapter(QBLoRAConfig(r=2, quantization_aware=True))
    for name, state in (("adapter", {}), ("given", {"state_dict": model.get_adapter_state_dict()})):
        model.save_pretrained(tmp_path / name, **state)  # by transformers: the adapter alone
        assert (tmp_path / name / "adapter_model.safetensors").is_file()


def test_a_state_that_is_given_is_what_is_saved(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] *= 2
    model.save_pretrained(tmp_path / "out", state_dict=state)
    assert torch.equal(load(tmp_path / "out").model.norm.weight, state["model.norm.weight"])
    model.save_pretrained(tmp_path / "compiled", state_dict={f"_orig_mod.{name}": t for name, t in state.items()})
    assert torch.equal(load(tmp_path / "compiled").model.norm.weight, state["model.norm.weight"])
    model.save_pretrained(tmp_path / "rank 1", state_dict={}, is_main_process=False)  # as accelerate has it
    with pytest.raises(ConfigError, match=r"state_dict lacks '.*', a tensor of this packed model"):
        model.save_pretrained(tmp_path / "float", state_dict=tiny_llama().state_dict())
    assert not list((tmp_path / "float").iterdir())


def test_the_configuration_of_a_loaded_model_loads_another(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=GroupQuantConfig())
    model.save_pretrained(tmp_path / "packed")
    for config in (model.config, copy.deepcopy(model.config)):
        again = load(tmp_path / "packed", config=config)
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    with pytest.raises(CheckpointError, match=r"no layer of a LlamaForCausalLM is packed .* is given as config="):
        load(tmp_path / "float", config=model.config)


def test_float_files_under_a_configuration_that_says_packed_are_named(tmp_path):
    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path)
    save_file(tiny_llama().state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no layer of a LlamaForCausalLM is packed in these files"):
        load(tmp_path)
