"""The callback in TRL's trainers and training modes. GRPO and RLOO, which generate, are in integration/."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl.callback import REPORT, QBLoRACallback
from tests.tiny import tiny_llama
from tests.trl import data
from tests.trl.runs import adapter, base, losses, settings, sft


def merged_exactly(output):
    merge = json.loads((output / REPORT).read_text())["merge"]
    return merge["exact"] and merge["parity"]["max_abs_difference"] <= merge["parity"]["tolerance"]


@pytest.mark.parametrize(
    "mode",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
        {"train_dataset": data.completions(), "completion_only_loss": True},
        {"train_dataset": data.chats(), "assistant_only_loss": True},
    ],
    ids=["accumulation", "checkpointing", "reentrant", "bf16", "packing", "completion-only", "assistant-only"],
)
def test_sft_trains_and_merges_in_every_mode(tmp_path, mode):
    trainer = sft(tmp_path, QBLoRACallback(adapter()), **mode)
    trainer.train()
    assert len(losses(trainer)) == 4
    assert trainer.state.log_history[-2]["qbl/adapter_norm"] > 0
    assert "train_loss" in trainer.state.log_history[-1]  # where scripts look for it, and TRL's own tests
    assert merged_exactly(tmp_path)


@pytest.mark.parametrize("mode", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_checkpointing_and_accumulation_change_no_loss(tmp_path, mode):
    plain = sft(tmp_path / "a", QBLoRACallback(adapter()), per_device_train_batch_size=4)
    rows = 4 // mode.get("gradient_accumulation_steps", 1)
    other = sft(tmp_path / "b", QBLoRACallback(adapter()), per_device_train_batch_size=rows, **mode)
    other.model.load_state_dict(plain.model.state_dict())
    plain.train()
    other.train()
    assert losses(other) == pytest.approx(losses(plain), abs=2e-4)  # sums in another order; 4 digits are logged


def test_a_bfloat16_model_trains_and_its_merge_is_held_to_bfloat16_rounding(tmp_path):
    model = quantize_model_(tiny_llama(vocab_size=32).to(torch.bfloat16), GroupQuantConfig())
    sft(tmp_path, QBLoRACallback(adapter()), model, bf16=True).train()
    assert merged_exactly(tmp_path)


@pytest.mark.parametrize("form", ["config", "peft_config"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class", "dataset"),
    [(DPOTrainer, DPOConfig, data.preferences), (KTOTrainer, KTOConfig, data.labelled)],
    ids=["dpo", "kto"],
)
def test_preference_trainers_use_the_base_as_reference_and_merge(tmp_path, trainer_class, config_class, dataset, form):
    given = {"peft_config": adapter()} if form == "peft_config" else {}
    trainer = trainer_class(
        base(),
        args=config_class(**settings(tmp_path)),
        train_dataset=dataset(),
        processing_class=data.tokenizer(),
        callbacks=[QBLoRACallback(None if given else adapter())],
        **given,
    )
    assert trainer.ref_model is None
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer_class is DPOTrainer:
        # Before the first step policy and reference are the same model: the loss is ln 2 exactly.
        assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
        assert history[-1]["loss"] != history[0]["loss"]
    assert all("qbl/adapter_norm" in entry for entry in history)
    assert merged_exactly(tmp_path)


def distillation(output, model, config):
    return DistillationTrainer(
        model,
        teacher_model=tiny_llama(vocab_size=32, seed=1),
        args=DistillationConfig(**settings(output, max_completion_length=4)),
        train_dataset=data.prompts(),
        processing_class=data.tokenizer(),
        callbacks=[QBLoRACallback(config)],
    )


def test_distillation_refuses_an_adapter_on_the_head_that_it_never_calls(tmp_path):
    config = adapter(target_modules=["q_proj", "lm_head"], in_factor=32, quantization_aware=False)
    with pytest.raises(ConfigError, match=r"DistillationTrainer reads the weight .* never calls it"):
        distillation(tmp_path, base(), config)


def test_distillation_refuses_a_packed_head(tmp_path):
    packed = quantize_model_(tiny_llama(vocab_size=32), GroupQuantConfig(quantize_embeddings=True))
    with pytest.raises(ConfigError, match=r"DistillationTrainer reads the weight .* quantize_embeddings=True packs it"):
        distillation(tmp_path, packed, adapter())


def online_dpo(output, callback, **given):
    return OnlineDPOTrainer(
        base(),
        args=OnlineDPOConfig(**settings(output, max_new_tokens=4, max_steps=1)),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=data.prompts(),
        processing_class=data.tokenizer(),
        callbacks=[callback],
        **given,
    )


def test_online_dpo_uses_the_base_as_reference_and_keeps_no_copy_of_it(tmp_path):
    trainer = online_dpo(tmp_path, QBLoRACallback(adapter()))
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == 0  # before the first step they are the same model
    assert merged_exactly(tmp_path)


def test_online_dpo_keeps_a_reference_that_it_was_given(tmp_path):
    reference = tiny_llama(vocab_size=32, seed=1)
    assert online_dpo(tmp_path, QBLoRACallback(adapter()), ref_model=reference).ref_model is reference


def self_distillation(output, trainer_class, config_class, teacher, **given):
    if trainer_class is SDPOTrainer:
        given["reward_funcs"] = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
    options = {"num_generations": 2, "max_completion_length": 4, "max_steps": 1}
    likeliest = {"distillation_mode": "topk_logits", "distillation_topk": 8}
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in data.prompts()]
    return trainer_class(
        base(),
        args=config_class(**settings(output, teacher_model_kind=teacher, **options, **likeliest)),
        train_dataset=Dataset.from_list([{**row, "privileged_context": "the red dog"} for row in rows]),
        processing_class=data.tokenizer(),
        **given,
    )


@pytest.mark.parametrize("form", ["config", "peft_config"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(SDPOTrainer, SDPOConfig), (SDFTTrainer, SDFTConfig)], ids=["sdpo", "sdft"]
)
def test_a_teacher_that_averages_adapters_is_refused_with_those_that_work(tmp_path, trainer_class, config_class, form):
    def given():
        if form == "config":
            return {"callbacks": [QBLoRACallback(adapter())]}
        return {"callbacks": [QBLoRACallback()], "peft_config": adapter()}

    with pytest.raises(
        ConfigError, match=r'Config: teacher_model_kind="ema" .* Set teacher_model_kind="base" .*"live"'
    ):
        self_distillation(tmp_path, trainer_class, config_class, "ema", **given())
    for teacher in ("base", "live"):
        self_distillation(tmp_path, trainer_class, config_class, teacher, **given()).train()
        assert merged_exactly(tmp_path)


def reward(output, callback, **changes):
    config = tiny_llama(vocab_size=32).config
    config.num_labels, config.pad_token_id = 1, 1
    torch.manual_seed(0)
    model = quantize_model_(LlamaForSequenceClassification(config), GroupQuantConfig(modules_to_not_convert=["score"]))
    return RewardTrainer(
        model,
        args=RewardConfig(**settings(output, **changes)),
        train_dataset=data.preferences(),
        processing_class=data.tokenizer(),
        callbacks=[callback],
    )


def test_a_reward_model_keeps_its_trained_head_in_the_merge(tmp_path):
    trainer = reward(tmp_path, QBLoRACallback(adapter(task_type="SEQ_CLS"), merged_output_dir=tmp_path / "merged"))
    trainer.train()
    assert merged_exactly(tmp_path)
    merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    trained = trainer.model.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(merged.score.weight, trained.detach())


def test_an_export_of_what_generates_no_text_is_refused_before_the_training(tmp_path):
    pytest.importorskip("onnxruntime")
    outputs = {"merged_output_dir": tmp_path / "merged", "onnx_output_dir": tmp_path / "onnx"}
    with pytest.raises(ConfigError, match=r"exports decoders .* LlamaForSequenceClassification is none; leave it out"):
        reward(tmp_path, QBLoRACallback(adapter(task_type="SEQ_CLS"), **outputs))


@pytest.mark.parametrize(("disabled", "probability"), [(True, 0.0), (False, 0.3)])
def test_disable_dropout_reaches_the_adapter_too(tmp_path, disabled, probability):
    callback = QBLoRACallback(adapter(task_type="SEQ_CLS", lora_dropout=0.3))
    trainer = reward(tmp_path, callback, disable_dropout=disabled)
    assert {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)} == {probability}


def test_a_trainer_that_would_load_a_second_reference_names_the_line_to_write(tmp_path):
    args = GRPOConfig(**settings(tmp_path, beta=0.1, num_generations=2))
    with pytest.raises(ConfigError, match=r"GRPOTrainer with beta=0.1 .* peft_config=QBLoRAConfig"):
        GRPOTrainer(
            base(),
            args=args,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=data.prompts(),
            processing_class=data.tokenizer(),
            callbacks=[QBLoRACallback(adapter())],
        )
