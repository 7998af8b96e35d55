"""What lies around a run is left as it is, and does not disturb it: folders, callers, other callbacks, earlier runs."""

import gc
import json
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qbl_trl.adapter.layer import BalancedLinear, adapter_layers
from qbl_trl.errors import ConfigError
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.trl import finish, refusals
from qbl_trl.trl.callback import REPORT, QBLoRACallback
from qbl_trl.trl.checkpoints import NOTE, check_checkpoint, mark_whole, set_aside_parts
from qbl_trl.trl.inject import place_
from qbl_trl.trl.report import write_report
from tests.tiny import tiny_llama
from tests.trl import data
from tests.trl.runs import adapter, base, losses, settings, sft

SAVING = {"save_strategy": "steps", "save_steps": 2}


def test_a_merged_model_that_was_moved_out_of_a_checkpoint_is_not_missed(tmp_path):
    sft(tmp_path, QBLoRACallback(adapter(), save_merged=True), **SAVING).train()
    shutil.move(tmp_path / "checkpoint-4" / "merged", tmp_path / "deployed")
    check_checkpoint(tmp_path / "checkpoint-4")
    trainer = sft(tmp_path, QBLoRACallback(adapter(), save_merged=True), **{**SAVING, "max_steps": 6})
    trainer.train(resume_from_checkpoint=True)
    assert len(losses(trainer)) == 6  # two of its own, after four that were read
    assert not list(tmp_path.glob("incomplete-*"))


def test_the_optimizer_of_a_sharded_run_may_be_deleted_to_save_space(tmp_path, caplog):
    folder = tmp_path / "checkpoint-2"
    for name in ("trainer_state.json", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    mark_whole(folder)
    shutil.rmtree(folder / "optimizer_0")
    assert set_aside_parts(tmp_path) == []
    assert "starts without it" in caplog.text
    shutil.rmtree(folder / "pytorch_model_fsdp_0")
    assert set_aside_parts(tmp_path) == [tmp_path / "incomplete-checkpoint-2"]


def test_a_base_in_a_folder_with_the_name_of_a_checkpoint_stays_there(tmp_path):
    base().save_pretrained(tmp_path / "checkpoint-100")
    model = type(base()).from_pretrained(tmp_path / "checkpoint-100")
    sft(tmp_path, QBLoRACallback(adapter()), model=model)
    assert (tmp_path / "checkpoint-100" / "config.json").is_file()


def test_outputs_do_not_take_the_place_of_the_base(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = type(base()).from_pretrained(tmp_path / "base")
    for folder in (tmp_path / "base", tmp_path):
        callback = QBLoRACallback(adapter(), merged_output_dir=folder, overwrite=True)
        with pytest.raises(ConfigError, match=r"would replace .*base, which it is made from"):
            sft(tmp_path.parent / "run", callback, model=model)
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sft(tmp_path / "run", QBLoRACallback(adapter(), merged_output_dir="~/merged")).train()
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_run_is_held_against_the_base_of_a_checkpoint_that_is_named_by_a_path(tmp_path):
    sft(tmp_path / "a", QBLoRACallback(adapter()), **SAVING).train()
    folder = tmp_path / "a" / "checkpoint-2" / "adapter_config.json"
    saved = json.loads(folder.read_text())
    saved["base_quantization"]["bits"] = 8
    folder.write_text(json.dumps(saved))
    (folder.parent / NOTE).unlink()
    with pytest.raises(ConfigError, match="was trained over a base with"):
        sft(tmp_path / "b", QBLoRACallback(adapter()), **SAVING).train(resume_from_checkpoint=folder.parent)


def test_a_report_of_an_earlier_run_does_not_stand_for_one_that_has_begun(tmp_path):
    sft(tmp_path, QBLoRACallback(adapter())).train()
    trainer = sft(tmp_path, QBLoRACallback(adapter()), callbacks=[Interrupting(1)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    report = json.loads((tmp_path / REPORT).read_text())
    assert (report["finished"], report["step"]) == (False, 0)


class Interrupting(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_rounding_of_an_interrupted_run_is_not_felt_by_another_callback(tmp_path):
    rounded = QBLoRACallback(adapter(), stored_delta="bfloat16")
    trainer = sft(tmp_path, rounded, callbacks=[Interrupting(3)], learning_rate=0.05)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = sft(tmp_path / "again", QBLoRACallback(), model=trainer.model)
    assert not any(layer._forward_hooks for layer in adapter_layers(again.model).values())
    again.train()


def test_a_script_can_let_go_of_a_model_that_a_trainer_adapted(tmp_path):
    model = base()
    held = weakref.ref(model)
    trainer = sft(tmp_path, QBLoRACallback(adapter()), model=model)
    trainer.train()
    del model, trainer
    gc.collect()
    assert held() is None


def test_variables_of_a_script_are_not_taken_for_those_of_a_trainer(tmp_path):
    added_tokens = np.arange(3)  # as SFTTrainer calls ids that a chat template brought
    sft(tmp_path, QBLoRACallback(adapter()))

    class Own(SFTTrainer):
        def __init__(self, *args, **kwargs):
            added_tokens = kwargs["processing_class"].add_tokens(["<x>"])
            super().__init__(*args, **kwargs)
            self.added = added_tokens

    given = {
        "train_dataset": data.texts(),
        "processing_class": data.tokenizer(),
        "callbacks": [QBLoRACallback(adapter())],
    }
    trainer = Own(base(), args=SFTConfig(**settings(tmp_path)), **given)
    assert trainer.added == 1
    assert not any("trainable_tokens" in name for name, _ in trainer.model.named_parameters())
    assert len(added_tokens) == 3


def test_a_trainer_that_was_refused_leaves_the_model_as_it_was_to_be_tried_again(tmp_path):
    model = base()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wrong = adapter(quantization_aware=False, in_factor=2)
    callback = QBLoRACallback(wrong, merged_output_dir=tmp_path / "m")
    with pytest.raises(ConfigError, match="outputs that need an exact merge"):
        sft(tmp_path, callback, model=model, gradient_checkpointing=True)
    assert not any(isinstance(module, BalancedLinear) for module in model.modules())
    assert isinstance(model.model.layers[0].mlp.up_proj, GroupQuantLinear)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    trainer = sft(tmp_path, QBLoRACallback(adapter(), merged_output_dir=tmp_path / "m"), model=model)
    trainer.train()
    first = sft(tmp_path / "other", QBLoRACallback(adapter()))
    first.train()
    assert losses(trainer) == losses(first)


def hooks(model):
    return {name: list(module._forward_hooks) for name, module in model.named_modules()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_factors_that_fit_some_layers_alone_leave_no_trace_of_them(tmp_path, checkpointing):
    model = base()
    model.enable_input_require_grads()
    before = hooks(model)
    wrong = adapter(in_factor=32, target_modules=["q_proj", "down_proj"], in_factor_pattern={"1.mlp.down_proj": 7})
    with pytest.raises(ConfigError, match="7"):
        sft(tmp_path, QBLoRACallback(wrong), model=model, gradient_checkpointing=checkpointing)
    assert not any(isinstance(module, BalancedLinear) for module in model.modules())
    assert hooks(model) == before
    sft(tmp_path, QBLoRACallback(adapter()), model=model).train()


def test_numbers_that_json_does_not_know_may_stand_in_a_log(tmp_path):
    class Logging(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.log_history:
                state.log_history[-1] |= {"a": np.float32(1), "b": torch.tensor(2.0), "c": torch.ones(2)}

    sft(tmp_path, QBLoRACallback(adapter()), callbacks=[Logging()]).train()
    entry = json.loads((tmp_path / REPORT).read_text())["log_history"][0]
    assert (entry["a"], entry["b"], entry["c"]) == (1.0, 2.0, "tensor([1., 1.])")


def test_a_metric_may_be_called_like_a_runtime(tmp_path):
    trainer = sft(tmp_path, QBLoRACallback(adapter(), eval_merged_loss=True), eval_dataset=data.texts())
    trainer.compute_metrics = lambda predictions: {"my_runtime": 1.0}
    assert "eval_merged_loss" in trainer.evaluate()


def test_seconds_per_step_are_those_of_the_steps_that_this_process_made(tmp_path):
    sft(tmp_path, QBLoRACallback(adapter()), **SAVING).train()
    trainer = sft(tmp_path, QBLoRACallback(adapter()), **{**SAVING, "max_steps": 6})
    trainer.train(resume_from_checkpoint=True)
    report = json.loads((tmp_path / REPORT).read_text())
    assert (report["first_step"], report["step"]) == (4, 6)


def test_an_interrupted_export_leaves_the_adapter_and_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "export", interrupted)
    monkeypatch.setattr(refusals, "check_export", lambda options: None)
    callback = QBLoRACallback(adapter(), merged_output_dir=tmp_path / "m", onnx_output_dir=tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        sft(tmp_path / "run", callback).train()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / REPORT).read_text())["merge"]["exact"]


def interrupted(*_):
    raise KeyboardInterrupt


def test_the_page_shows_the_losses_of_several_datasets(tmp_path):
    several = {"a": data.texts(), "b": data.texts()}
    callback = QBLoRACallback(adapter(), eval_merged_loss=True)
    sft(tmp_path, callback, eval_dataset=several, eval_strategy="steps", eval_steps=2).train()
    page = write_report(tmp_path).read_text()
    for name in ("evaluation a", "merged a", "evaluation b", "merged b"):
        assert name in page


def test_a_sentence_transformer_places_its_adapter_itself_for_it_saves_more_than_that():
    class Model(nn.Module):
        def add_adapter(self, config):
            self.config = config

    Model.__module__ = "sentence_transformers.sentence_transformer"
    model, config = Model(), adapter()
    assert place_(SimpleNamespace(args=None), model, config) is model
    assert model.config == config
    assert model.config is not config


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_a_model_does_not_have_is_named(task):
    labels = LlamaForSequenceClassification(tiny_llama().config)
    with pytest.raises(ConfigError, match=rf'task_type="{task}" is for models that generate text, and a LlamaForSeq'):
        place_(SimpleNamespace(args=None), labels, adapter(task_type=task))
