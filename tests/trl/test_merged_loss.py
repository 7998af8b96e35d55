"""eval_merged_loss: the merged model's loss beside the adapter's."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    trainer_callback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl.callback import QBLoRACallback
from tests.trl import data
from tests.trl.runs import adapter, base, losses, settings, sft

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_merged_loss_is_the_loss_of_the_written_merged_model(tmp_path):
    callback = QBLoRACallback(adapter(), eval_merged_loss=True, merged_output_dir=tmp_path / "m")
    trainer = sft(tmp_path / "run", callback, eval_dataset=data.texts(6), **EVALUATING)
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    measured = sft(tmp_path / "b", None, merged, eval_dataset=data.texts(6)).evaluate()["eval_loss"]
    assert history(trainer, "eval_merged_loss")[-1] == pytest.approx(measured, abs=1e-6)  # fp32 rounding
    assert history(trainer, "eval_merged_loss") == pytest.approx(history(trainer, "eval_loss"), abs=1e-5)


def test_measuring_the_merged_loss_changes_nothing_in_training(tmp_path):
    runs = []
    for flag in (False, True):
        callback = QBLoRACallback(adapter(lora_dropout=0.2), eval_merged_loss=flag)
        runs.append(sft(tmp_path / str(flag), callback, eval_dataset=data.texts(4), **EVALUATING))
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_num_tokens", "num_tokens", "entropy"):
        assert history(runs[0], name) == history(runs[1], name), name
    first, second = (trainer.model.state_dict() for trainer in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_bar_ends_at_its_end(tmp_path, monkeypatch):
    bars = []

    class Bar(trainer_callback.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(trainer_callback, "tqdm", Bar)
    callback = QBLoRACallback(adapter(), eval_merged_loss=True)
    sft(tmp_path, callback, eval_dataset=data.texts(6), disable_tqdm=False, eval_strategy="steps", eval_steps=4).train()
    assert [(bar.n, bar.total) for bar in bars] == [(4, 4), (1, 1), (1, 1)]  # training, evaluation, the merged model


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(ORPOTrainer, ORPOConfig), (CPOTrainer, CPOConfig)], ids=["orpo", "cpo"]
)
def test_measuring_the_merged_loss_leaves_the_averages_of_an_evaluation_as_they_were(
    tmp_path, trainer_class, config_class
):
    runs = []
    for flag in (False, True):
        runs.append(
            trainer_class(
                base(),
                args=config_class(**settings(tmp_path / str(flag), learning_rate=0.05, **EVALUATING)),
                train_dataset=data.preferences(),
                eval_dataset=data.preferences(4),
                processing_class=data.tokenizer(),
                callbacks=[QBLoRACallback(adapter(), eval_merged_loss=flag)],
            )
        )
        runs[-1].train()
    for name in ("eval_loss", "eval_logps/chosen", "eval_logits/rejected", "eval_rewards/margins"):
        assert history(runs[0], name) == history(runs[1], name), name
    assert len(history(runs[1], "eval_merged_loss")) == 2


def test_measuring_the_merged_loss_adds_no_rows_to_the_table_of_completions(tmp_path):
    tables = []
    for flag in (False, True):
        options = {"per_device_train_batch_size": 16, "num_generations": 2, "max_completion_length": 4}
        trainer = GRPOTrainer(
            base(),
            args=GRPOConfig(**settings(tmp_path / str(flag), **options)),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            train_dataset=data.prompts(),
            eval_dataset=data.prompts(4),
            processing_class=data.tokenizer(),
            callbacks=[QBLoRACallback(adapter(), eval_merged_loss=flag)],
        )
        assert ("eval_merged_loss" in trainer.evaluate()) == flag
        tables.append({name: list(trainer._logs[name]) for name in ("prompt", "completion", "advantages")})
    assert tables[0] == tables[1]


def test_the_merged_loss_can_choose_the_best_model(tmp_path):
    trainer = sft(
        tmp_path,
        QBLoRACallback(adapter(), eval_merged_loss=True),
        eval_dataset=data.texts(4),
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_merged_loss",
        **EVALUATING,
    )
    trainer.train()
    assert trainer.state.best_metric == min(history(trainer, "eval_merged_loss"))


@pytest.mark.parametrize("metric", ["merged_loss", "news_merged_loss", "merged_news_loss", "eval_qbl/adapter_norm"])
def test_a_best_model_by_a_figure_that_nobody_measures_is_refused_before_training(tmp_path, metric):
    best = {**EVALUATING, "save_strategy": "steps", "save_steps": 2, "metric_for_best_model": metric}
    with pytest.raises(ConfigError, match="eval_merged_loss=True"):
        sft(
            tmp_path,
            QBLoRACallback(adapter()),
            eval_dataset={"news": data.texts(4)},
            load_best_model_at_end=True,
            **best,
        )


def test_a_metric_that_is_only_called_alike_is_no_matter(tmp_path):
    trainer = sft(
        tmp_path, QBLoRACallback(adapter()), eval_dataset=data.texts(4), metric_for_best_model="unmerged_loss"
    )
    assert trainer.args.metric_for_best_model == "unmerged_loss"


def test_each_of_several_datasets_gets_its_own_merged_loss(tmp_path):
    datasets = {"short": data.texts(2), "long": data.texts(6)}
    trainer = sft(tmp_path, QBLoRACallback(adapter(), eval_merged_loss=True), eval_dataset=datasets, **EVALUATING)
    trainer.train()
    for name in datasets:
        merged = history(trainer, f"eval_merged_{name}_loss")
        assert merged == pytest.approx(history(trainer, f"eval_{name}_loss"), abs=1e-5)
        assert len(merged) == 2


def test_other_data_than_the_trainers_own_has_a_merged_loss_of_its_own(tmp_path):
    trainer = sft(tmp_path, QBLoRACallback(adapter(), eval_merged_loss=True), eval_dataset=data.texts(3))
    trainer.train()
    other = trainer.evaluate(trainer.train_dataset, metric_key_prefix="test")
    assert other["test_merged_loss"] == pytest.approx(other["test_loss"], abs=1e-5)
    assert other["test_merged_loss"] != pytest.approx(trainer.evaluate()["eval_merged_loss"], abs=1e-5)


def test_a_callback_that_is_added_later_measures_the_merged_loss_before_training_too(tmp_path):
    trainer = sft(tmp_path, None, peft_config=adapter(), eval_dataset=data.texts(4))
    trainer.add_callback(QBLoRACallback(eval_merged_loss=True))
    measured = trainer.evaluate()
    assert measured["eval_merged_loss"] == pytest.approx(measured["eval_loss"], abs=1e-5)
    trainer.train()
    assert all("qbl/adapter_norm" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_one_callback_measures_the_merged_loss_of_the_trainer_that_evaluates(tmp_path):
    callback = QBLoRACallback(eval_merged_loss=True)
    for name, rows in (("a", 4), ("b", 6)):
        trainer = sft(tmp_path / name, None, peft_config=adapter(), eval_dataset=data.texts(rows))
        trainer.add_callback(callback)
        measured = trainer.evaluate()
        assert measured["eval_merged_loss"] == pytest.approx(measured["eval_loss"], abs=1e-5)
        assert history(trainer, "eval_merged_loss") == [measured["eval_merged_loss"]]


def test_a_loss_with_another_adapter_as_reference_is_measured_with_the_merged_policy(tmp_path):
    trainer = DPOTrainer(
        get_peft_model(base(), adapter()),  # over which TRL keeps a copy of the adapter as reference
        args=DPOConfig(**settings(tmp_path, learning_rate=0.02, **EVALUATING)),
        train_dataset=data.preferences(),
        eval_dataset=data.preferences(4),
        processing_class=data.tokenizer(),
        callbacks=[QBLoRACallback(eval_merged_loss=True)],
    )
    trainer.train()
    merged, plain = history(trainer, "eval_merged_loss"), history(trainer, "eval_loss")
    assert merged == pytest.approx(plain, abs=1e-5)
    assert abs(merged[-1] - 0.6931) > 1e-3


def test_a_loss_with_the_base_as_reference_is_measured_with_the_merged_policy(tmp_path):
    trainer = DPOTrainer(
        base(),
        args=DPOConfig(**settings(tmp_path, learning_rate=0.02, **EVALUATING)),
        train_dataset=data.preferences(),
        eval_dataset=data.preferences(4),
        processing_class=data.tokenizer(),
        callbacks=[QBLoRACallback(adapter(), eval_merged_loss=True)],
    )
    trainer.train()
    merged, plain = history(trainer, "eval_merged_loss"), history(trainer, "eval_loss")
    assert merged == pytest.approx(plain, abs=1e-5)
    assert abs(merged[-1] - 0.6931) > 1e-3  # the policy is not its own reference


@pytest.mark.parametrize("metric", ["merged_loss", "news_merged_loss"])
def test_of_several_datasets_the_names_of_the_merged_losses_are_said(tmp_path, metric):
    best = {**EVALUATING, "save_strategy": "steps", "save_steps": 2, "metric_for_best_model": metric}
    sets = {"news": data.texts(2), "talk": data.texts(2)}
    callback = QBLoRACallback(adapter(), eval_merged_loss=True)
    with pytest.raises(ConfigError, match="the merged losses here are merged_news_loss, merged_talk_loss"):
        sft(tmp_path, callback, eval_dataset=sets, load_best_model_at_end=True, **best)


@pytest.mark.parametrize("generates", [False, True])
def test_a_last_batch_counts_for_the_merged_loss_as_it_does_for_the_other(tmp_path, generates):
    arguments = settings(tmp_path, per_device_eval_batch_size=4, predict_with_generate=generates)
    rows = [{"input_ids": [3, 4 + i, 5], "labels": [6 + i, 7]} for i in range(5)]
    trainer = Seq2SeqTrainer(
        quantize_model_(tiny_t5(), GroupQuantConfig()),
        Seq2SeqTrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[QBLoRACallback(adapter(task_type="SEQ_2_SEQ_LM"), eval_merged_loss=True)],
    )
    measured = trainer.evaluate()
    assert measured["eval_merged_loss"] == measured["eval_loss"]
