"""Models that read images or sound: quantized, adapted, merged, saved and loaded as those of text alone."""

import json
import re
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qbl_trl import GroupQuantConfig, QBLoRACallback, QBLoRAConfig, merge
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.cli import main
from qbl_trl.generation import BEFORE_5
from qbl_trl.loading import load_adapter, open_model
from qbl_trl.quant import calibration
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from tests.pictures import KINDS, answers, inputs, tiny
from tests.trl.runs import settings

ADAPTER = {"r": 2, "quantization_aware": True, "init_lora_weights": False}
pytestmark = [  # more rank than these towers have room for, and a layer that has none
    pytest.mark.filterwarnings("ignore:adapter 'default'. on"),
    pytest.mark.filterwarnings("ignore:2 layers get no adapter"),
]


def adapted(model, **changes):
    """A model with a balanced adapter that changes its answers."""
    return get_peft_model(model, QBLoRAConfig(**{**ADAPTER, **changes})).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_answers_images_and_sound_as_it_was_trained_to(kind, tmp_path):
    base = tiny(kind)
    base.save_pretrained(tmp_path / "float")
    model = adapted(open_model(tmp_path / "float", quantization_config=GroupQuantConfig()))
    trained = answers(model, kind)
    assert (trained - answers(base, kind)).abs().max() > 1e-2
    merged = merge(model)
    # float32 rounding through a tower and a text model, whose normal weights give logits of about 4
    torch.testing.assert_close(answers(merged, kind), trained, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(answers(open_model(tmp_path / "merged"), kind), answers(merged, kind))


def test_a_trainer_merges_and_writes_a_model_that_sees_and_its_merged_loss_is_that_of_images(tmp_path):
    given = inputs("llava", seed=1)
    rows = [{name: value[index] for name, value in given.items()} for index in (0, 1)] * 4
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    model = quantize_model_(tiny("llava"), GroupQuantConfig())
    callback = QBLoRACallback(
        QBLoRAConfig(**{**ADAPTER, "r": 1}), merged_output_dir=tmp_path / "merged", eval_merged_loss=True
    )
    args = settings(tmp_path / "run", max_steps=2, eval_strategy="steps", eval_steps=2, gradient_checkpointing=True)
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**args), train_dataset=rows, eval_dataset=rows, callbacks=[callback]
    )
    trainer.train()
    losses = {name: value for entry in trainer.state.log_history for name, value in entry.items() if "loss" in name}
    assert losses["eval_merged_loss"] == pytest.approx(losses["eval_loss"], abs=1e-4)  # float32 on both sides
    trained = answers(trainer.model.eval(), "llava")
    torch.testing.assert_close(answers(open_model(tmp_path / "merged"), "llava"), trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_audio"])
def test_towers_train_under_reentrant_checkpointing_too(kind):
    base = quantize_model_(tiny(kind), GroupQuantConfig())
    model, given = adapted(base).train(), inputs(kind)

    def trained():
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = trained()
    assert [name for name in expected if "language_model" not in name]
    model.prepare_model_for_gradient_checkpointing(base)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert trained() == expected


@pytest.mark.parametrize("batches", ["text", "images"])
def test_gptq_says_which_layers_its_calibration_does_not_reach(batches):
    given = inputs("llava")
    calibration = [given["input_ids"].clamp(max=98)] if batches == "text" else [given]
    config = GroupQuantConfig(algorithm="gptq", calibration=calibration)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_model_(tiny("llava"), config)
    said = [str(one.message) for one in caught if "no batch of the calibration" in str(one.message)]
    wanted = (
        r"reaches 14 of 21 layers \(model\.(vision_tower|multi_modal_projector)\..*, ...\): they are rounded to nearest"
    )
    assert [bool(re.search(wanted, one)) for one in said] == ([True] if batches == "text" else [])


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_vl"])
def test_gptq_replays_the_blocks_of_a_text_beside_a_tower_without_a_cache_that_grows(kind, monkeypatch):
    given = [torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    config = GroupQuantConfig(
        algorithm="gptq", calibration=given, modules_to_not_convert=["vision_tower", "visual", "multi_modal_projector"]
    )
    walked, whole = tiny(kind), tiny(kind)
    quantize_model_(walked, config)
    assert walked.config.get_text_config().use_cache
    monkeypatch.setattr(calibration, "find_chain", lambda *_: [])
    quantize_model_(whole, config)
    packed = {name: layer for name, layer in walked.named_modules() if isinstance(layer, GroupQuantLinear)}
    assert len(packed) == 7
    for name, layer in packed.items():
        assert torch.equal(layer.weight, whole.get_submodule(name).weight), name


@pytest.mark.parametrize("where", ["beside the settings of its text", "among them"])
def test_a_model_opens_in_its_class_wherever_its_configuration_says_it(where, tmp_path):
    model = tiny("qwen2_vl")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    for part in (settings, settings["text_config"]):
        part.pop("architectures", None)
    inner = settings["text_config"] if where == "among them" else settings
    inner["architectures"] = ["Qwen2VLForConditionalGeneration"]
    file.write_text(json.dumps(settings))
    assert torch.equal(answers(open_model(tmp_path), "qwen2_vl"), answers(model, "qwen2_vl"))


def test_a_configuration_that_names_no_class_opens_as_what_writes_text_about_images(tmp_path):
    model = tiny("llava")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": None}))
    assert type(open_model(tmp_path)) is transformers.LlavaForConditionalGeneration


def test_an_adapter_for_causal_language_models_goes_back_on_the_model_that_saw(tmp_path):
    tiny("llava").save_pretrained(tmp_path / "float")
    base = open_model(tmp_path / "float", quantization_config=GroupQuantConfig())
    model = adapted(base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(answers(load_adapter(tmp_path / "adapter"), "llava"), answers(model, "llava"))


def test_layers_whose_inputs_are_no_whole_groups_get_no_adapter_and_stay_quantized():
    base = quantize_model_(tiny("qwen2_5_vl"), GroupQuantConfig())
    with pytest.warns(UserWarning, match=r"2 layers get no adapter \(model\.visual\.blocks\.0\.mlp\.down_proj, ...\)"):
        model = adapted(base)
    others = {
        name
        for name, module in base.named_modules()
        if isinstance(module, GroupQuantLinear)
        and f"base_model.model.{name.removesuffix('.base_layer')}" not in adapter_layers(model)
    }
    assert others == {f"model.visual.blocks.{index}.mlp.down_proj" for index in (0, 1)}
    trained = answers(model, "qwen2_5_vl")
    torch.testing.assert_close(answers(merge(model), "qwen2_5_vl"), trained, rtol=0, atol=1e-4)


def test_a_tower_named_in_modules_to_not_convert_stays_in_float_and_gets_no_adapter():
    base = quantize_model_(tiny("llava"), GroupQuantConfig(modules_to_not_convert=["vision_tower"]))
    packed = [name for name, module in base.named_modules() if isinstance(module, GroupQuantLinear)]
    assert packed
    assert not [name for name in packed if "vision_tower" in name]
    assert not [name for name in adapter_layers(adapted(base)) if "vision_tower" in name]


def test_the_command_line_keeps_a_processor_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny("qwen2_vl").save_pretrained("float")
    (tmp_path / "float" / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    assert main(["quantize", "float", "packed"]) == 0
    adapted(open_model("packed")).save_pretrained("adapter")
    (tmp_path / "adapter" / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    assert main(["merge", "adapter", "merged"]) == 0
    for folder in ("packed", "merged"):
        assert (tmp_path / folder / "preprocessor_config.json").is_file()
    assert type(open_model("merged")) is transformers.Qwen2VLForConditionalGeneration


NAMES = {  # of the same modules in transformers 4.57 and in 5
    "llava": [("vision_tower.vision_model.", "vision_tower.")],
    "qwen2_audio": [
        ("language_model.model.", "model.language_model."),
        ("audio_tower.", "model.audio_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
}


def renamed_as_elsewhere(folder, kind):
    """Give an adapter folder the names that the other generation of transformers writes."""

    def other(name):
        for pair in NAMES[kind]:
            before, after = pair if BEFORE_5 else reversed(pair)
            name = name.replace(before, after)
        return name

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({other(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings["target_modules"] = [other(name) for name in settings["target_modules"]]
    for key in ("in_factor_pattern", "out_factor_pattern"):
        plain = {re.sub(r"\\(.)", r"\1", name): value for name, value in settings[key].items()}
        settings[key] = {
            "^" + re.escape(other(name[1:])) if name[0] == "^" else re.escape(name): value
            for name, value in plain.items()
        }
    file.write_text(json.dumps(settings))
    return settings


@pytest.mark.parametrize("kind", NAMES)
def test_an_adapter_that_the_other_transformers_wrote_goes_on_the_same_layers(kind, tmp_path):
    tiny(kind).save_pretrained(tmp_path / "float")
    base = open_model(tmp_path / "float", quantization_config=GroupQuantConfig())
    model = adapted(base, in_factor=64, on_misfit="reduce")  # 32 in the tower
    trained = answers(model, kind)
    model.save_pretrained(tmp_path / "adapter")
    own = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    settings = renamed_as_elsewhere(tmp_path / "adapter", kind)
    assert own != set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert any(name.startswith("^") for name in settings["in_factor_pattern"])
    again = open_model(tmp_path / "float", quantization_config=GroupQuantConfig())
    for found in (load_adapter(tmp_path / "adapter"), PeftModel.from_pretrained(again, tmp_path / "adapter").eval()):
        assert torch.equal(answers(found, kind), trained)
