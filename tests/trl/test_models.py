"""Models that are none of transformers', that are made anew for every training, or come with settings of their own."""

import json
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.model_files import save_model, valid_generation
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl import finish
from qbl_trl.trl.callback import REPORT, QBLoRACallback
from tests.tiny import SIZES, tiny_llama, tokens
from tests.trl.runs import adapter, base, settings, sft

ROWS = [{"input_ids": ids, "labels": float(ids.sum() % 7)} for ids in tokens(8, 6) % 32]


class Regression(nn.Module):
    """A head of one's own over a backbone."""

    def __init__(self, backbone, config=None):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.config.hidden_size, 1)
        if config is not None:
            self.config = config

    def forward(self, input_ids, labels=None):
        y = self.head(self.backbone(input_ids=input_ids).last_hidden_state[:, -1]).squeeze(-1)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


def regression(with_config=False):
    backbone = base().model
    return Regression(backbone, backbone.config if with_config else None)


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("form", ["callback", "model"])
def test_a_module_of_ones_own_trains_and_merges(tmp_path, form, with_config):
    torch.manual_seed(0)
    config = QBLoRAConfig(r=4, quantization_aware=True, modules_to_save=["head"], target_modules=["q_proj", "up_proj"])
    model, callback = regression(with_config), QBLoRACallback(config if form == "callback" else None)
    if form == "model":
        model = get_peft_model(model, config)
    args = TrainingArguments(**settings(tmp_path))
    trainer = Trainer(model, args, train_dataset=ROWS, callbacks=[callback])
    trainer.train()
    assert callback.record.merge["exact"]
    ids = tokens(2, 6) % 32
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids, labels=torch.zeros(2))["logits"]
        got = merge(trainer.model)(input_ids=ids, labels=torch.zeros(2))["logits"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # float32 sums


def test_what_cannot_be_saved_is_refused_before_training(tmp_path):
    config = QBLoRAConfig(quantization_aware=True, target_modules=["q_proj"])
    callback = QBLoRACallback(config, merged_output_dir=tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"merged_output_dir: a Regression has no save_pretrained"):
        Trainer(regression(), TrainingArguments(**settings(tmp_path)), train_dataset=ROWS, callbacks=[callback])


def test_generation_settings_that_only_load_are_saved_without_what_they_do_not_use(tmp_path, caplog):
    model = base()
    model.generation_config = GenerationConfig(temperature=0.7, top_p=0.9)
    assert model.generation_config.do_sample is not True
    callback = QBLoRACallback(adapter(), merged_output_dir=tmp_path / "merged", save_merged=True)
    with caplog.at_level(logging.WARNING):
        sft(tmp_path / "run", callback, model=model, save_strategy="steps", save_steps=2).train()
    saved = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert saved.do_sample is not True
    assert saved.temperature == GenerationConfig().temperature
    assert "without do_sample: saved without them" in caplog.text
    assert model.generation_config.temperature == 0.7


def test_generation_settings_that_nothing_mends_are_refused_before_training(tmp_path):
    model = base()
    model.generation_config = GenerationConfig(num_beams=1, length_penalty=2.0)
    with pytest.raises(ConfigError, match=r"generation settings cannot be saved: .*length_penalty"):
        sft(tmp_path / "run", QBLoRACallback(adapter(), merged_output_dir=tmp_path / "merged"), model=model)
    assert valid_generation(None) is None


def test_a_model_that_generates_nothing_may_hold_any_settings(tmp_path):
    model = LlamaForSequenceClassification(tiny_llama(pad_token_id=0).config)
    model.generation_config = GenerationConfig(num_beams=1, length_penalty=2.0)
    save_model(model, tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_the_report_describes_the_model_that_model_init_made(tmp_path):
    ranks = iter([4, 2, 8])

    def model_init():
        return get_peft_model(base(), adapter(r=next(ranks)))

    callback = QBLoRACallback()
    args = TrainingArguments(**settings(tmp_path))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    trainer = Trainer(args=args, model_init=model_init, train_dataset=rows, callbacks=[callback])
    for rank in (2, 8):
        trainer.train()
        report = json.loads((tmp_path / REPORT).read_text())
        assert {layer["nominal_rank"] for layer in report["layers"]} == {rank}
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        assert report["adapter"]["trainable_parameters"] == trained


def test_an_adapter_on_other_layers_than_the_active_one_is_passed_over(tmp_path):
    model = get_peft_model(base(), adapter(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", adapter(target_modules=["gate_proj"]))
    model.set_adapter("second")
    callback = QBLoRACallback()
    sft(tmp_path, callback, model=model).train()
    assert {name.rpartition(".")[2] for name in callback.record.layers} == {"gate_proj"}
    assert callback.record.merge["exact"]


def test_an_adapter_made_active_after_the_trainer_was_built_is_the_one_described(tmp_path):
    model = get_peft_model(base(), adapter(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", adapter(target_modules=["gate_proj"]))
    callback = QBLoRACallback()
    trainer = sft(tmp_path, callback, model=model)
    model.set_adapter("second")
    trainer.train()
    assert {name.rpartition(".")[2] for name in callback.record.layers} == {"gate_proj"}
    assert {name.rpartition(".")[2] for name in callback.record.probe} == {"gate_proj"}


def test_a_model_of_which_nothing_trains_is_refused(tmp_path):
    get_peft_model(base(), adapter()).save_pretrained(tmp_path / "adapter")
    trainer = sft(tmp_path / "run", QBLoRACallback(), model=PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    with pytest.raises(ConfigError, match=r"nothing would be trained.*is_trainable=True"):
        trainer.train()


def test_a_second_training_starts_with_an_empty_report(tmp_path):
    callback = QBLoRACallback(adapter())
    trainer = sft(tmp_path, callback)
    trainer.train()
    assert callback.record.merge
    callback.record.begin()
    assert not callback.record.merge
    assert callback.record.callback_seconds == 0


@pytest.mark.parametrize(("wrong", "raises"), [(slice(0, 1), False), (slice(None), True)])
def test_a_router_that_rounding_moves_is_no_wrong_merge(monkeypatch, caplog, wrong, raises):
    """One token of a mixture in bfloat16 goes to another expert; of a wrong merge many tokens tell."""
    config = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model = get_peft_model(quantize_model_(model, GroupQuantConfig()), adapter(init_lora_weights=False))
    usual = finish.logits_of

    def moved(source):
        def logits(ids, mask):
            found = usual(source)(ids, mask)
            if not isinstance(source, PeftModel) and not any("lora_" in n for n, _ in source.named_parameters()):
                found[:, wrong] += 3 * found.abs().max()
            return found

        return logits

    monkeypatch.setattr(finish, "logits_of", moved)
    if raises:
        with pytest.raises(MergeError, match="logits differ"):
            finish.merge_and_verify(model, tokens(1, 8))
        return
    with caplog.at_level(logging.WARNING):
        merged, entry = finish.merge_and_verify(model, tokens(1, 8))
    assert merged is not None
    assert entry["parity"]["max_abs_difference"] > entry["parity"]["tolerance"]
    assert entry["parity"]["tokens_routed_elsewhere"] == 1
    assert "made a router choose another expert" in caplog.text
