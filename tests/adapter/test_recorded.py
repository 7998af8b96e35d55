"""An adapter says what it was trained over, and over anything else it is not taken for the same."""

import json
import warnings

import pytest
from peft import PeftModel, get_peft_model

from qbl_trl import GroupQuantConfig
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.adapter.models import config
from tests.tiny import tiny_llama


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
