"""The type that weights were loaded in decides codes: it is recorded, noticed, and a base is made again as it was."""

import copy
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.loading import load_adapter
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_llama

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


def load(folder, dtype, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=GroupQuantConfig(**settings), dtype=dtype)


def codes(model):
    return torch.cat([p.flatten() for p in model.parameters() if p.dtype == torch.uint8])


def told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = call()
    return model, [str(warning.message) for warning in caught if "was trained over a base" in str(warning.message)]


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float32")
    return tmp_path / "float32"


@pytest.fixture
def adapter(folder, tmp_path):
    """Trained over the float32 files as a GPU recipe loads them, in bfloat16; and that base's codes."""
    config = QBLoRAConfig(quantization_aware=True, r=1, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load(folder, BRAIN, algorithm="hqq"), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", codes(model)


@pytest.mark.parametrize("stored", [FLOAT, BRAIN, HALF])
@pytest.mark.parametrize("loaded", [FLOAT, BRAIN, HALF])
def test_a_base_knows_the_narrowest_type_that_held_its_weights(tmp_path, stored, loaded):
    tiny_llama().to(stored).save_pretrained(tmp_path)
    expected = BRAIN if BRAIN in (stored, loaded) else HALF if HALF in (stored, loaded) else FLOAT
    assert load(tmp_path, loaded).config.quantization_config.noted_dtype == str(expected).removeprefix("torch.")


def test_so_does_one_that_was_quantized_in_memory():
    model = quantize_model_(tiny_llama().to(BRAIN), GroupQuantConfig())
    assert model.config.quantization_config.noted_dtype == "bfloat16"
    rounded = quantize_model_(tiny_llama(), GroupQuantConfig(weights_dtype="bfloat16"))
    assert torch.equal(codes(rounded), codes(model))


def test_an_adapter_gets_the_base_back_that_it_was_trained_over(adapter, folder):
    assert not torch.equal(codes(load(folder, FLOAT, algorithm="hqq")), adapter[1])
    assert torch.equal(codes(load_adapter(adapter[0])), adapter[1])


def test_another_type_is_noticed_and_the_same_one_is_not(adapter, folder, tmp_path):
    _, words = told(lambda: PeftModel.from_pretrained(load(folder, FLOAT, algorithm="hqq"), adapter[0]))
    assert len(words) == 1
    assert "weights_dtype=bfloat16, and this one has group_quant weights_dtype=float32" in words[0]
    load(folder, BRAIN, algorithm="hqq").save_pretrained(tmp_path / "packed")
    for base in (
        load(folder, BRAIN, algorithm="hqq"),
        load(folder, FLOAT, algorithm="hqq", weights_dtype="bfloat16"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
    ):
        model, words = told(lambda base=base: PeftModel.from_pretrained(base, adapter[0]))
        assert not words
        assert torch.equal(codes(model), adapter[1])


def test_packed_files_hold_codes_and_do_not_say_it(folder, tmp_path):
    load(folder, BRAIN).save_pretrained(tmp_path / "packed")
    assert "weights_dtype" not in AutoConfig.from_pretrained(tmp_path / "packed").quantization_config


def test_an_adapter_over_a_float_model_is_told_how_its_base_was_made(adapter):
    wanted = r"GroupQuantConfig\(algorithm='hqq', weights_dtype='bfloat16'\)"
    with pytest.raises(ConfigError, match=wanted):
        AutoPeftModelForCausalLM.from_pretrained(adapter[0])


def test_a_configuration_that_a_base_was_made_by_rounds_no_other_model(folder):
    used = load(folder, BRAIN).config.quantization_config
    again = AutoModelForCausalLM.from_pretrained(folder, quantization_config=used, dtype=FLOAT)
    assert torch.equal(codes(again), codes(load(folder, FLOAT)))


def test_an_embedding_counts_where_it_is_packed(tmp_path):
    mixed = tiny_llama().to(BRAIN).float()
    mixed.model.embed_tokens.weight.data += 1e-4
    for packed, expected in ((True, "float32"), (False, "bfloat16")):
        model = quantize_model_(copy.deepcopy(mixed), GroupQuantConfig(quantize_embeddings=packed))
        assert model.config.quantization_config.noted_dtype == expected


def test_one_adapter_configuration_serves_models_of_several_types(folder):
    config = QBLoRAConfig(quantization_aware=True, r=1)
    for dtype in (FLOAT, BRAIN):
        assert adapter_layers(get_peft_model(load(folder, dtype), config))


def test_what_no_base_can_be_made_of_is_refused(folder):
    with pytest.raises(ConfigError, match=r"gptq.* load it in bfloat16"):
        GroupQuantConfig(algorithm="gptq", weights_dtype="bfloat16")
    large = tiny_llama()
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ConfigError, match='weights_dtype="float16" ends at 65504'):
        quantize_model_(large, GroupQuantConfig(weights_dtype="float16"))


def test_an_unknown_type_is_refused():
    with pytest.raises(ConfigError, match="weights_dtype='float8' is not known"):
        GroupQuantConfig(weights_dtype="float8")


def bitsandbytes(folder, dtype, **settings):
    settings = BitsAndBytesConfig(**(settings or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype)


@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_a_bitsandbytes_base_is_made_again_from_the_type_it_was_loaded_in(folder, tmp_path, dtype, settings):
    pytest.importorskip("bitsandbytes")
    config = QBLoRAConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(bitsandbytes(folder, dtype, **settings), config)
    for number in ("first", "second"):  # what was opened takes a further adapter, which knows it as well
        model.save_pretrained(tmp_path / number)
        opened = load_adapter(tmp_path / number)
        own, again = ([p for p in m.parameters() if p.dtype in (torch.uint8, torch.int8)] for m in (model, opened))
        assert len(own) == len(again) == 14
        assert all(torch.equal(*pair) for pair in zip(own, again, strict=True))
        embeddings = [m.get_base_model().get_input_embeddings().weight for m in (opened, model)]
        assert torch.equal(embeddings[0], embeddings[1].float())
        assert opened(torch.arange(8)[None]).logits.dtype == FLOAT
        model = get_peft_model(opened.unload(), QBLoRAConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
