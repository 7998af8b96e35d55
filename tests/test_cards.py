import pytest
from transformers import LlamaForCausalLM

from qbl_trl.cards import write_card
from qbl_trl.config import GroupQuantConfig
from qbl_trl.model_files import save_model
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_llama


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_folder_says_how_it_is_opened(tmp_path, bits):
    model = quantize_model_(tiny_llama(), GroupQuantConfig(bits=bits))
    save_model(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("this folder", str(tmp_path))
    found = {}
    exec(code, found)
    assert type(found["model"]) is type(model)
    assert f"Linear weights are {bits}-bit codes in affine groups of 32" in card
    assert ("without an error" in card) == (bits == 8)
    assert "base_model" not in card


def test_a_float_model_and_a_folder_with_a_description_are_left_alone(tmp_path):
    save_model(tiny_llama(), tmp_path / "float")
    assert not (tmp_path / "float" / "README.md").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("mine")
    save_model(quantize_model_(tiny_llama(), GroupQuantConfig()), tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text() == "mine"


def test_the_base_is_named_where_it_is_an_id_of_the_hub(tmp_path):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    model.config._name_or_path = "some/model"
    save_model(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: some/model\n" in card
    assert "# model, 4 bits\n" in card


class Derived(LlamaForCausalLM):
    """Of a user."""


@pytest.mark.parametrize(
    ("auto_map", "opens"),
    [
        (None, 'LlamaForCausalLM.from_pretrained("this folder")'),
        (
            {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.Derived"},
            'AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)',
        ),
    ],
)
def test_a_class_that_transformers_lacks_is_opened_by_its_code_or_as_what_it_derives_from(tmp_path, auto_map, opens):
    model = quantize_model_(tiny_llama(), GroupQuantConfig())
    model.__class__, model.config.auto_map = Derived, auto_map
    write_card(model, tmp_path)
    assert f"model = {opens}" in (tmp_path / "README.md").read_text()
