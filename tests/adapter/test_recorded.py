"""An adapter says what it was trained over, and over anything else it is not taken for the same."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.adapter.models import config, groups
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()


def base(**settings):
    return quantize_model_(tiny_llama(), GroupQuantConfig(**settings))


def trained_over(folder, **settings):
    get_peft_model(base(**settings), config(quantization_aware=True, target_modules=["q_proj"])).save_pretrained(folder)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            {"modules_to_not_convert": ["k_proj"]},
            {"modules_to_not_convert": ["v_proj"]},
            r"modules_to_not_convert=\['k_proj'\], and this one has .* modules_to_not_convert=\['v_proj'\]",
        ),
        ({}, {"scale_dtype": "bfloat16"}, "scale_dtype=float16, and this one has .* scale_dtype=bfloat16"),
    ],
)
def test_a_base_of_other_numbers_is_noticed_where_as_many_layers_are_packed(tmp_path, there, here, message):
    trained_over(tmp_path, **there)
    with pytest.warns(UserWarning, match=message):
        PeftModel.from_pretrained(base(**here), tmp_path)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"modules_to_not_convert": ["k_proj", "v_proj"]}, {"modules_to_not_convert": ["v_proj", "k_proj"]}),
        ({}, {"modules_to_not_convert": []}),
        ({}, {"modules_to_not_convert": ["lm_head"]}),
    ],
)
def test_the_same_base_in_other_words_is_the_same(tmp_path, there, here):
    trained_over(tmp_path, **there)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(base(**here), tmp_path)


def test_an_adapter_that_does_not_say_so_much_loads_in_silence(tmp_path):
    trained_over(tmp_path, modules_to_not_convert=["k_proj"])
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    for name in ("modules_to_not_convert", "scale_dtype"):
        del saved["base_quantization"][name]
    file.write_text(json.dumps(saved))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(base(modules_to_not_convert=["v_proj"], scale_dtype="bfloat16"), tmp_path)


def test_one_configuration_serves_round_after_round_of_merged_adapters_but_no_other_base():
    adapter, model = config(quantization_aware=True), groups()
    for _ in range(3):
        adapted = get_peft_model(model, adapter).eval()
        expected = logits(adapted, IDS)
        model = adapted.merge_and_unload()
        torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-5)  # float32, two layers
    smaller = quantize_model_(tiny_llama(), GroupQuantConfig(group_size=16))
    with pytest.raises(
        ConfigError, match=r"group_size=32 .*when it was first placed, and this one has .*group_size=16"
    ):
        get_peft_model(smaller, adapter)
    with pytest.raises(ConfigError, match="this one has none; make a QBLoRAConfig for each base"):
        get_peft_model(tiny_llama(), adapter)


def test_a_configuration_completed_for_a_float_base_serves_no_quantized_one():
    adapter = config()
    get_peft_model(tiny_llama(), adapter)
    get_peft_model(tiny_llama(), adapter)
    with pytest.raises(ConfigError, match="completed for a base with none when it was first placed"):
        get_peft_model(groups(), adapter)


def test_a_layer_that_a_quantized_base_keeps_in_float_is_to_be_left_out_and_a_float_base_to_be_quantized(tmp_path):
    with pytest.raises(ConfigError, match=r"lm_head: .* this one is float\. Leave this layer of it out"):
        get_peft_model(groups(), config(quantization_aware=True, target_modules=["q_proj", "lm_head"]))
    get_peft_model(groups(), config(quantization_aware=True)).save_pretrained(tmp_path)
    with (
        pytest.raises(
            ConfigError, match=r"this layer is float\. Load the model with from_pretrained\(.*=GroupQuantConfig\(\)\)"
        ),
        pytest.warns(UserWarning, match="this one has none"),
    ):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_base_of_other_layers_is_noticed(tmp_path):
    get_peft_model(groups(), config(quantization_aware=True, target_modules=["q_proj"])).save_pretrained(tmp_path)
    fewer = quantize_model_(tiny_llama(), GroupQuantConfig(modules_to_not_convert=["mlp"]))
    with pytest.warns(UserWarning, match="trained over a base with 14 quantized layers, and this one has 8"):
        PeftModel.from_pretrained(fewer, tmp_path)


@pytest.mark.parametrize("field", ["in_factor_pattern", "out_factor_pattern"])
def test_a_pattern_that_no_layer_answers_to_is_said(field):
    config = QBLoRAConfig(quantization_aware=True, r=1, **{field: {"q_prj": 32, "k_proj": 32}})
    with pytest.warns(RuntimeWarning, match=rf"{field} keys did not match any targeted module .* \['q_prj'\]"):
        get_peft_model(quantize_model_(tiny_llama(), GroupQuantConfig()), config)
