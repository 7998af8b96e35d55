"""Checkpoints: resumed identically, the best one loaded, and never a half-written one taken for whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EarlyStoppingCallback

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl import checkpoints
from qbl_trl.trl.callback import QBLoRACallback
from qbl_trl.trl.checkpoints import NOTE, check_checkpoint, last_whole_checkpoint, set_aside_parts, write_json
from tests.tiny import tiny_llama, tokens
from tests.trl import data
from tests.trl.runs import adapter, base, losses, sft

SAVING = {"save_strategy": "steps", "save_steps": 2}


def injected(output, **changes):
    return sft(output, QBLoRACallback(adapter(lora_dropout=0.1)), **changes)


def placed(output, **changes):
    return sft(output, QBLoRACallback(), peft_config=adapter(lora_dropout=0.1), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with checkpoints 2 and 4."""
    output = tmp_path_factory.mktemp("finished") / "run"
    trainer = injected(output, **SAVING)
    trainer.train()
    return output


@pytest.fixture
def run(finished, tmp_path):
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("build", [injected, placed])
def test_a_resumed_run_continues_with_identical_losses(tmp_path, build):
    whole = build(tmp_path / "a", **SAVING)
    whole.train()
    again = build(tmp_path / "a", **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    first, second = (trainer.model.state_dict() for trainer in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_over_bitsandbytes_goes_on_in_the_types_it_trained_in(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the [bnb] extra is not installed")
    tiny_llama(vocab_size=32).save_pretrained(tmp_path / "float")

    def trainer():
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=nf4)
        settings = {"peft_config": adapter(quantization_aware=False), **SAVING}
        return sft(tmp_path / "run", QBLoRACallback(), model, **settings)

    def trained(run):
        return {name: p for name, p in run.model.named_parameters() if p.requires_grad}

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert {p.dtype for p in trained(whole).values()} == {torch.bfloat16}  # as TRL has it over 4 bits
    for name, parameter in trained(again).items():
        assert torch.equal(parameter, trained(whole)[name]), name


def _field(changed):
    (name,) = changed
    return {"alpha_pattern": "lora_alpha"}.get(name, name)


@pytest.mark.parametrize(
    "changed",
    [
        {"pooling": "mean"},
        {"lora_alpha": 128},
        {"use_rslora": True},
        {"r": 8},
        {"out_factor": 1},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
        {"alpha_pattern": {"q_proj": 3}},
        {"bias": "all"},
    ],
    ids=lambda changed: next(iter(changed)),
)
@pytest.mark.parametrize("form", ["callback", "peft_config"])
def test_a_checkpoint_does_not_go_on_under_other_settings_of_its_adapter(run, changed, form):
    other = adapter(**{"lora_dropout": 0.1, **changed})
    callback = {"callback": (QBLoRACallback(other),), "peft_config": (QBLoRACallback(),)}[form]
    trainer = sft(run, *callback, **({"peft_config": other} if form == "peft_config" else {}), **SAVING)
    held = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"checkpoint-2 was trained with {_field(changed)}="):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert all(torch.equal(tensor, held[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_checkpoint_does_not_go_on_with_more_or_fewer_layers(run, tmp_path):
    fewer = sft(run, QBLoRACallback(adapter(target_modules=["q_proj"])), **SAVING)
    with pytest.raises(ConfigError, match=r"24 tensors for layers that have no adapter"):
        fewer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    sft(tmp_path / "few", QBLoRACallback(adapter(target_modules=["q_proj"])), **SAVING).train()
    more = sft(tmp_path / "few", QBLoRACallback(adapter()), **SAVING)
    with pytest.raises(ConfigError, match=r"checkpoint-4 holds no adapter for 12 of the layers that this run adapts"):
        more.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"lora_dropout": 0.5}),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"self_attn.q_proj": 2}}),
        ({"trainable_token_indices": [5, 3]}, {"trainable_token_indices": {"embed_tokens": [5, 3]}}),
        ({"layers_to_transform": 1}, {"layers_to_transform": [1]}),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head", "lm_head"]}),
    ],
)
def test_a_checkpoint_goes_on_under_the_same_settings_however_they_are_spelled(tmp_path, first, second):
    sft(tmp_path, QBLoRACallback(adapter(**first)), **SAVING).train()
    again = sft(tmp_path, QBLoRACallback(adapter(**second)), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step > 2


def test_rows_of_other_tokens_are_not_taken_for_those_that_were_trained(tmp_path):
    sft(tmp_path, QBLoRACallback(adapter(trainable_token_indices=[5, 3])), **SAVING).train()
    trainer = sft(tmp_path, QBLoRACallback(adapter(trainable_token_indices=[3, 5])), **SAVING)
    with pytest.raises(ConfigError, match=r"trainable_token_indices=\[\[5, 3\]\], and this run has"):
        trainer.train(resume_from_checkpoint=True)


def test_the_adapter_that_trains_is_compared_with_its_own_file(tmp_path):
    def trainer(**changes):
        model = get_peft_model(base(), adapter())
        model.add_adapter("second", adapter(**{"r": 8, "target_modules": ["q_proj"], **changes}))
        model.set_adapter("second")
        return sft(tmp_path, QBLoRACallback(), model=model, **SAVING)

    trainer().train()
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = trainer(lora_alpha=32)
    with pytest.raises(ConfigError, match=r"checkpoint-2.second was trained with lora_alpha=16 .* has lora_alpha=32"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoint_is_loaded_at_the_end_and_it_is_the_one_merged(tmp_path):
    callback = QBLoRACallback(adapter(), merged_output_dir=tmp_path / "merged")
    trainer = sft(
        tmp_path / "run",
        callback,
        eval_dataset=data.texts(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst loss: not the last step
        learning_rate=0.05,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    saved = load_file(f"{best}/adapter_model.safetensors")
    own = {name.replace(".default.", "."): value for name, value in trainer.model.state_dict().items()}
    assert saved
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = tokens(vocabulary=32)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)  # fp32 rounding


def test_early_stopping_stops_and_the_run_is_merged_and_reported(tmp_path):
    trainer = sft(
        tmp_path,
        QBLoRACallback(adapter()),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        eval_dataset=data.texts(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # training lowers the loss, so nothing ever improves
        max_steps=20,
    )
    trainer.train()
    report = json.loads((tmp_path / "qblora_report.json").read_text())
    assert report["step"] < 20
    assert report["merge"]["exact"]


def test_every_checkpoint_is_marked_whole(finished):
    for name in ("checkpoint-2", "checkpoint-4"):
        files = json.loads((finished / name / NOTE).read_text())["files"]
        assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(files)
        check_checkpoint(finished / name)
    assert last_whole_checkpoint(finished) == str(finished / "checkpoint-4")


def test_save_merged_puts_a_loadable_4_bit_model_into_each_checkpoint(tmp_path):
    sft(tmp_path, QBLoRACallback(adapter(), save_merged=True), **SAVING).train()
    for name in ("checkpoint-2", "checkpoint-4"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "merged")
        assert "merged/model.safetensors" in json.loads((tmp_path / name / NOTE).read_text())["files"]
    sft(tmp_path, QBLoRACallback(adapter()), **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
# Without a note, a missing file can only be told by the one that is written last.
DAMAGES = [
    *((file, damage, True) for file in FILES for damage in (cut, Path.unlink)),
    *((file, cut, False) for file in FILES),
    ("trainer_state.json", Path.unlink, False),
]


@pytest.mark.parametrize(("file", "damage", "marked"), DAMAGES)
def test_a_checkpoint_with_a_cut_or_missing_file_is_not_whole(run, file, damage, marked):
    folder = run / "checkpoint-4"
    if not marked:
        (folder / NOTE).unlink()
    damage(folder / file)
    with pytest.raises(CheckpointError, match=file.split(".")[0]):
        check_checkpoint(folder)
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_the_right_size_that_holds_zeros_is_damaged(run, file):
    lost = run / "checkpoint-4" / file
    lost.write_bytes(bytes(lost.stat().st_size))  # what a power failure leaves
    with pytest.raises(CheckpointError, match=file.split(".")[0]):
        check_checkpoint(run / "checkpoint-4")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


def test_what_a_callback_of_the_users_writes_may_have_any_form(run):
    (run / "checkpoint-4" / "samples.bin").write_bytes(bytes(8))
    checkpoints.mark_whole(run / "checkpoint-4")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-4")


def test_a_checkpoint_whose_settings_are_gone_does_not_go_on(run):
    (run / "checkpoint-2" / "adapter_config.json").unlink()
    trainer = sft(run, QBLoRACallback(adapter(lora_alpha=64)), **SAVING)
    with pytest.raises(ConfigError, match=r"checkpoint-2 holds an adapter .*adapter_config\.json"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_checkpoint_of_a_run_without_the_callback_counts_as_whole(run):
    (run / "checkpoint-4" / NOTE).unlink()
    assert last_whole_checkpoint(run) == str(run / "checkpoint-4")


def test_a_damaged_note_is_a_clear_error(run):
    for content in ("{", '{"files": {"a": 1e400}}'):
        (run / "checkpoint-4" / NOTE).write_text(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            check_checkpoint(run / "checkpoint-4")


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_a_new_trainer_sets_a_half_written_checkpoint_aside_and_resumes_from_the_one_before(run, caplog):
    for name in (NOTE, "trainer_state.json", "optimizer.pt"):
        (run / "checkpoint-4" / name).unlink()
    trainer = injected(run, **SAVING)
    assert "half-written checkpoint moved" in caplog.text
    assert (run / "incomplete-checkpoint-4").is_dir()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    check_checkpoint(run / "checkpoint-4")


def test_a_checkpoint_that_was_tidied_up_by_hand_stays_where_it_is(run, caplog):
    readme = run / "checkpoint-4" / "README.md"
    readme.write_text(readme.read_text() + "my notes")
    check_checkpoint(run / "checkpoint-4")
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    assert set_aside_parts(run) == []
    assert "optimizer.pt is missing" in caplog.text
    assert "starts without it" in caplog.text


def test_every_process_has_written_before_a_checkpoint_is_marked_whole(tmp_path, monkeypatch):
    trainer, order = injected(tmp_path, **{**SAVING, "max_steps": 2}), []
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: order.append("wait"))
    monkeypatch.setattr(checkpoints, "mark_whole", lambda folder: order.append("mark"))
    trainer.train()
    assert order[:2] == ["wait", "mark"]


def test_a_hyperparameter_search_marks_the_checkpoints_of_each_trial(tmp_path, monkeypatch):
    trainer = injected(tmp_path, **{**SAVING, "max_steps": 2})
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / "run-0"))
    trainer.train()
    check_checkpoint(tmp_path / "run-0" / "checkpoint-2")
    assert (tmp_path / "run-0" / "checkpoint-2" / NOTE).is_file()


def test_setting_aside_deletes_nothing_and_never_overwrites(run):
    (run / "incomplete-checkpoint-4").mkdir()
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    files = sum(f.is_file() for f in run.rglob("*"))
    assert set_aside_parts(run) == [run / "incomplete-checkpoint-4-"]
    assert sum(f.is_file() for f in run.rglob("*")) == files
    assert set_aside_parts(run) == []


def test_a_json_file_is_replaced_whole_and_an_unwritable_content_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    endless = {}
    endless["x"] = endless
    with pytest.raises(ValueError, match="Circular"):
        write_json(tmp_path / "a.json", endless)
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_run_does_not_go_on_over_another_base(finished, tmp_path):
    other = quantize_model_(tiny_llama(vocab_size=32), GroupQuantConfig(bits=8))
    trainer = injected(tmp_path / "run", model=other, **SAVING)
    with pytest.raises(ConfigError, match="was trained over a base with group_quant bits=4, and this one has"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-2"))
