"""Experts of a mixture of which some stay in float."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.quant.test_experts import STACKED, kind_of, mixture, stacking
from tests.tiny import logits, tokens


def test_experts_of_a_layer_that_stays_in_float_have_the_names_of_the_others(tmp_path):
    """transformers 5 splits the stacked tensors of all layers while it saves and loads, or of none."""
    mixture("Qwen3Moe").save_pretrained(tmp_path / "float")
    config = GroupQuantConfig(modules_to_not_convert=["model.layers.1"])
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.3.gate_proj.weight"].dtype == torch.uint8
    assert stored["model.layers.1.mlp.experts.3.gate_proj.weight"].dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, tokens()), logits(packed, tokens()))


@stacking
def test_a_folder_that_holds_the_float_experts_of_one_layer_stacked_is_read(tmp_path):
    config = GroupQuantConfig(modules_to_not_convert=["model.layers.1"])
    packed = quantize_model_(mixture("Qwen3Moe"), config)
    packed.save_pretrained(tmp_path)
    file, block = tmp_path / "model.safetensors", "model.layers.1.mlp.experts"
    stored = load_file(file)
    experts = [[stored.pop(f"{block}.{i}.{part}_proj.weight") for part in ("gate", "up", "down")] for i in range(4)]
    stored[f"{block}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
    stored[f"{block}.down_proj"] = torch.stack([down for _, _, down in experts])
    save_file(stored, file, metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, tokens()), logits(packed, tokens()), rtol=0, atol=1e-6)  # order of sums


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("loading", [True, False])
def test_experts_that_stay_in_float_have_memory_of_their_own_and_save(name, loading, tmp_path):
    model, config = mixture(name), GroupQuantConfig(modules_to_not_convert=["experts.0", "experts.2"])
    if loading:
        model.save_pretrained(tmp_path / "float")
        model = kind_of(name).from_pretrained(tmp_path / "float", quantization_config=config)
    else:
        quantize_model_(model, config)
    kept = [p for layer, p in model.named_parameters() if ".experts.0." in layer or ".experts.2." in layer]
    assert kept
    for weight in kept:
        assert weight.dtype == torch.float32
        assert weight.untyped_storage().nbytes() == 4 * weight.numel()
    model.save_pretrained(tmp_path / "packed")
    again = kind_of(name).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("name", STACKED)
def test_experts_to_keep_are_known_by_the_names_they_will_have(name, tmp_path, caplog):
    mixture(name).save_pretrained(tmp_path)
    config = GroupQuantConfig(modules_to_not_convert=["experts.1", "experts.9"])
    kind_of(name).from_pretrained(tmp_path, quantization_config=config)
    assert "modules_to_not_convert: experts.9 names no module of" in caplog.text


def test_experts_that_were_to_stay_in_float_are_no_surprise(caplog):
    quantize_model_(mixture("GptOss"), GroupQuantConfig(modules_to_not_convert=["experts"]))
    assert "stay in float" not in caplog.text


def test_a_mixture_without_a_layer_to_quantize_is_refused_as_it_was():
    model = mixture("GptOss")
    before = list(dict(model.named_parameters()))
    with pytest.raises(ConfigError, match="has no linear layer to quantize"):
        quantize_model_(model, GroupQuantConfig(modules_to_not_convert=["model"]))
    assert list(dict(model.named_parameters())) == before
