"""QBLoRAConfig checks itself and survives a file."""

import json
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import ConfigError


def test_defaults_are_those_of_the_documentation():
    config = QBLoRAConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.0)
    assert (config.in_factor, config.out_factor, config.target_modules) == (2, 2, "all-linear")
    assert QBLoRAConfig(quantization_aware=True).in_factor is None  # the base's group, known later


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_factor": 0}, r"in_factor=0 must be a whole number of at least 1"),
        ({"out_factor": 1.5}, r"out_factor=1.5 must be a whole number"),
        ({"r": True}, r"r=True must be a whole number"),
        ({"in_factor_pattern": {"q_proj": 0}}, r"in_factor_pattern\['q_proj'\]=0 must be a whole number"),
        ({"in_factor_pattern": [("q_proj", 2)]}, r"in_factor_pattern=\[.*\] must be a dictionary of layer names"),
        ({"rank_pattern": {"q_proj": "8"}}, r"rank_pattern\['q_proj'\]='8' must be a whole number"),
        ({"lora_alpha": None}, r"lora_alpha=None must be a number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\]=nan must be a number"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be at least 0 and less than 1"),
        ({"init_lora_weights": 0}, r"init_lora_weights=0 is made for"),
        ({"bias": "some"}, r"bias='some' is not known; allowed: none, all, lora_only"),
        ({"pooling": "max"}, r"pooling='max' is not known; allowed: mean, rms, sum"),
        ({"adapter": "full"}, r"adapter='full' is not known; allowed: low_rank, block"),
        ({"on_misfit": "skip"}, r"on_misfit='skip' is not known; allowed: error, reduce"),
        ({"target_modules": 5}, r"target_modules=5 must be a list of module names, or one regular expression"),
        ({"exclude_modules": [5]}, r"exclude_modules=\[5\] must be a list of module names, or one regular"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head' must be a list of module names$"),
        (
            {"target_modules": "(q_proj"},
            r"target_modules: '\(q_proj' is no name and no regular expression \(missing \)",
        ),
        ({"exclude_modules": "*.q_proj"}, r"exclude_modules: '\*\.q_proj' is no name and no regular expression"),
        ({"in_factor_pattern": {"q_proj[": 2}}, r"in_factor_pattern: 'q_proj\[' is no name and no regular expression"),
        ({"rank_pattern": {3: 2}}, r"rank_pattern: 3 is no name and no regular expression"),
        ({"quantization_aware": "no"}, r"quantization_aware='no' must be true or false"),
        ({"base_quantization": 5}, r"base_quantization=5 must be a dictionary, or None"),
        ({"use_dora": True}, r"use_dora has no balanced form"),
        ({"lora_bias": True, "bias": "none"}, r"lora_bias has no balanced form"),
        ({"target_parameters": ["w"]}, r"target_parameters has no balanced form"),
        (
            {"init_lora_weights": "pissa"},
            r"'pissa' is made for factors of the whole weight.*qbl_trl\.adapter\.initialize",
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_value_and_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        QBLoRAConfig(**settings)


def test_a_start_for_whole_weights_is_refused_before_its_packages_and_settings_are_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in ("loftq", "eva", "corda"):
            with pytest.raises(ConfigError, match=f"'{start}' is made for factors"):
                QBLoRAConfig(init_lora_weights=start)


def test_it_is_a_lora_configuration_of_its_own_type_and_reads_back_equal(tmp_path):
    config = QBLoRAConfig(r=8, in_factor=4, pooling="sum", in_factor_pattern={"^model\\.q": 2}, adapter="block")
    assert isinstance(config, LoraConfig)
    assert config.peft_type.value == "QBLORA"
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is QBLoRAConfig
    assert again.to_dict() == {**config.to_dict(), "peft_version": again.peft_version}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_not_convert", "q_proj"),
        ("modules_to_not_convert", 3),
        ("modules_to_not_convert", {"q_proj": True}),
        ("quantize_embeddings", "false"),
        ("bits", 4.0),
        ("group_size", 32.0),
        ("quant_method", "gptq"),
        ("in_factor", "4"),
        ("out_factor", 0),
        ("layers", None),
        ("layers", {"q_proj": 8}),
    ],
)
def test_settings_of_another_type_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        GroupQuantConfig(**{name: value})


def test_names_in_a_set_are_saved_as_a_list():
    assert json.loads(GroupQuantConfig(modules_to_not_convert={"b", "a"}).to_json_string())[
        "modules_to_not_convert"
    ] == ["a", "b"]


def test_all_linear_is_read_as_peft_reads_it():
    assert QBLoRAConfig(target_modules="All-Linear").target_modules == "all-linear"


def test_symmetric_codes_are_not_left_to_an_algorithm_that_chooses_zero_points():
    with pytest.raises(ConfigError, match=r'algorithm="hqq" optimises the zero point, .* set symmetric=False'):
        GroupQuantConfig(algorithm="hqq", symmetric=True)


def test_numbers_of_numpy_become_those_that_a_file_takes(tmp_path):
    settings = {"r": np.int64(8), "lora_alpha": np.float32(8), "lora_dropout": np.float32(0.5)}
    config = QBLoRAConfig(**settings, rank_pattern={"q_proj": np.int32(3)}, alpha_pattern={"q_proj": np.float64(2)})
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert (again.r, again.lora_alpha, again.lora_dropout) == (8, 8.0, 0.5)
    assert (again.rank_pattern, again.alpha_pattern) == ({"q_proj": 3}, {"q_proj": 2.0})
    stored = GroupQuantConfig(bits=np.int64(4), group_size=np.int32(32))
    assert (type(stored.bits), type(stored.group_size)) == (int, int)


def test_texts_of_a_calibration_are_neither_compared_nor_printed():
    one, other = (GroupQuantConfig(algorithm="gptq", calibration=[torch.full((2, 9), token)]) for token in (1, 2))
    assert one == other
    assert "tensor" not in repr(one)
