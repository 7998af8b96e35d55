"""What a float model is asked to become: settings of new models only, and calibration data that are token ids."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.errors import ConfigError
from qbl_trl.quant.calibration import calibration_batches
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def merged():
    model = quantize_model_(tiny_llama(), GroupQuantConfig(group_size=16, algorithm="hqq"))
    return merge(get_peft_model(model, QBLoRAConfig(quantization_aware=True, r=2, out_factor=2)))


def test_the_configuration_of_a_merged_model_quantizes_another_and_stays_as_it_is(tmp_path, caplog):
    tiny_llama(seed=1).save_pretrained(tmp_path / "float")
    settings = merged().config.quantization_config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=settings)
    assert "in_factor=16, out_factor=2" in caplog.text
    assert settings.in_factor == 16
    assert model.config.quantization_config.in_factor is None
    assert model.model.layers[0].mlp.up_proj.format.group_size == 16
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize("algorithm", ["hqq", "rtn"])
def test_the_callers_configuration_stays_as_it_is(tmp_path, algorithm):
    settings = GroupQuantConfig(algorithm=algorithm)
    before = settings.to_dict()
    bare = BertModel(BertConfig(**SMALL), add_pooling_layer=False)
    bare.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path, quantization_config=settings)
    assert type(loaded.pooler.dense) is torch.nn.Linear  # fresh, which transformers 5 sees, and writes down, only then
    quantized = quantize_model_(tiny_llama(), settings)
    assert settings.to_dict() == before
    assert quantized.config.quantization_config.modules_to_not_convert is None


def test_factors_given_by_hand_are_left_out_of_what_is_written(tmp_path, caplog):
    quantize_model_(tiny_llama(), GroupQuantConfig(in_factor=32, out_factor=2)).save_pretrained(tmp_path)
    assert "this model is quantized now and has none" in caplog.text
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_formats_of_single_layers_are_refused_by_name():
    settings = GroupQuantConfig(layers={"model.layers.0.mlp.up_proj": {"bits": 8}})
    with pytest.raises(
        ConfigError, match=r"layers\['model\.layers\.0\.mlp\.up_proj'\]=\{'bits': 8\} describes a layer"
    ):
        quantize_model_(tiny_llama(), settings)


@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        (IDS, [(2, 9)]),
        (IDS[0], [(1, 9)]),
        ([IDS, IDS[:1]], [(2, 9), (1, 9)]),
        (list(IDS), [(1, 9), (1, 9)]),
        ([[1, 2, 3], [4, 5]], [(1, 3), (1, 2)]),
        ([[[1, 2], [3, 4]]], [(2, 2)]),
        ((row for row in IDS), [(1, 9), (1, 9)]),
        (IDS.numpy().astype(np.int32)[None], [(2, 9)]),
        ({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, [(2, 9)]),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}], [(1, 3)]),
    ],
)
def test_token_ids_are_taken_in_any_sensible_shape(given, shapes):
    found = calibration_batches(tiny_llama(), given)
    assert [tuple(batch["input_ids"].shape) for batch in found] == shapes
    assert all(batch["input_ids"].dtype == torch.int64 and batch.keys() == {"input_ids"} for batch in found)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_what_a_model_takes_beside_its_ids_is_kept(kind):
    given = {"input_ids": kind([1, 2]), "position_ids": kind([0, 1])}
    (batch,) = calibration_batches(tiny_llama(), [given])
    assert torch.equal(batch["position_ids"], torch.tensor([[0, 1]]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "calibration=5 is no list of batches"),
        ([{"input_ids": [1, 2], "words": ["a", "b"]}], "words of a batch is no tensor, and no lists of numbers"),
        ("some text", "calibration='some text' is no list of batches"),
        (None, r"needs calibration=\["),
        ([], "no batch was given"),
        (["some text"], "must be integer token ids"),
        ([1, 2, 3], "must be integer token ids"),
        ([IDS.float()], "must be integer token ids"),
        ([IDS > 3], "must be integer token ids"),
        ([IDS[None]], "must be integer token ids"),
        ([[[1, 2], [3]]], "must be integer token ids"),
        ([torch.empty(0, dtype=torch.long)], "must be integer token ids"),
        ([IDS, IDS + 100], r"token ids from \d+ to 1\d\d, and the model has 100 tokens"),
        ([IDS - 100], r"token ids from -\d+ to -\d+, and the model has 100 tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], "padded"),
    ],
)
def test_what_is_no_token_id_of_the_model_is_refused_before_a_layer_is_quantized(given, message):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        quantize_model_(model, GroupQuantConfig(algorithm="gptq", calibration=given))
    assert not any(isinstance(module, GroupQuantLinear) for module in model.modules())


def test_what_the_model_does_not_take_is_refused():
    model = tiny_llama()
    model.forward = lambda input_ids, position_ids=None: None  # others take whatever has a name
    with pytest.raises(ConfigError, match="a batch holds topic, words, which a LlamaForCausalLM does not take"):
        calibration_batches(model, [{"input_ids": [1, 2], "words": 5, "topic": 3}])


@pytest.mark.parametrize(("model", "config"), [(torch.nn.Linear(4, 4), GroupQuantConfig()), (tiny_llama(), {})])
def test_only_a_model_of_transformers_is_quantized_and_only_by_a_config(model, config):
    with pytest.raises(ConfigError, match="takes a model of transformers and a GroupQuantConfig, not a"):
        quantize_model_(model, config)


def test_one_tensor_calibrates_like_a_list_of_it(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    one, other = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=GroupQuantConfig(algorithm="gptq", calibration=given)
        )
        for given in (IDS, [IDS])
    )
    assert torch.equal(logits(one, IDS), logits(other, IDS))
