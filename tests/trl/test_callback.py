"""QBLoRACallback from the trainer's constructor to the written report."""

import json

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
)

import qbl_trl
from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.trl import finish
from qbl_trl.trl.callback import REPORT, QBLoRACallback
from tests.tiny import tiny_llama, tokens
from tests.trl import data
from tests.trl.runs import Exported, adapter, base, losses, settings, sft

IDS = tokens(vocabulary=32)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_config_in_the_callback_trains_exactly_as_peft_config_does(tmp_path):
    injected = sft(tmp_path / "a", QBLoRACallback(adapter()))
    placed = sft(tmp_path / "b", QBLoRACallback(), peft_config=adapter())
    # The two forms draw A before and after the trainer seeds; from one start, every loss must agree.
    injected.model.load_state_dict(placed.model.state_dict())
    injected.train()
    placed.train()
    assert losses(injected) == losses(placed)
    assert isinstance(injected.model, peft.PeftModel)


def test_only_the_adapter_is_saved_and_it_loads_as_a_peft_adapter(tmp_path):
    trainer = sft(tmp_path, QBLoRACallback(adapter()))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=0)


def test_the_merged_model_is_written_whole_and_computes_the_same(tmp_path):
    trainer = sft(tmp_path, QBLoRACallback(adapter(), merged_output_dir=tmp_path / "merged"))
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert any(isinstance(m, GroupQuantLinear) and m.delta is not None for m in merged.modules())
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=0, atol=1e-5)  # fp32 rounding
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert not list(tmp_path.glob(".merged*"))


def test_the_merged_model_does_not_run_the_trained_model_behind_a_patched_forward(tmp_path):
    trainer = sft(tmp_path, QBLoRACallback(adapter()))
    trainer.train()
    merged, _ = finish.merge_and_verify(trainer.model, IDS)
    merged.lm_head.weight = torch.nn.Parameter(torch.zeros_like(merged.lm_head.weight))
    assert logits(merged).abs().max() == 0
    assert logits(trainer.model).abs().max() > 0


def test_a_model_placed_by_accelerate_hooks_keeps_them_in_its_merge(tmp_path):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    model = base()
    add_hook_to_module(model, Counting())
    trainer = sft(tmp_path, QBLoRACallback(adapter()), model)
    trainer.train()
    merged, _ = finish.merge_and_verify(trainer.model, IDS)
    before = Counting.calls
    merged.lm_head.weight = torch.nn.Parameter(torch.zeros_like(merged.lm_head.weight))
    assert logits(merged).abs().max() == 0
    assert Counting.calls == before + 1


def test_the_report_holds_what_was_trained_merged_and_measured(tmp_path):
    trainer = sft(tmp_path, QBLoRACallback(adapter(), merged_output_dir=tmp_path / "merged"))
    trainer.train()
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["finished"]
    assert report["step"] == 4
    assert report["adapter"]["layers"] == len(report["layers"]) == 14
    assert len(report["probe"]) == 7  # one layer of each kind
    assert report["merge"]["exact"]
    assert report["merge"]["parity"]["max_abs_difference"] <= 1e-5
    assert report["merge"]["output"] == str(tmp_path / "merged")
    assert [e["loss"] for e in report["log_history"] if "loss" in e] == losses(trainer)
    assert {"in_factor", "out_factor", "rank", "shift_max", "stable_rank", "norm"} <= set(report["layers"][0])
    assert report["sizes"]["merged"] < report["sizes"]["float16"]


def test_a_plain_trainer_takes_the_callback(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 6, vocabulary=32).tolist()]
    args = TrainingArguments(**settings(tmp_path))
    trainer = Trainer(base(), args, train_dataset=rows, callbacks=[QBLoRACallback(adapter())])
    trainer.train()
    assert len(losses(trainer)) == 4
    assert json.loads((tmp_path / REPORT).read_text())["merge"]["exact"]


def test_the_collators_tokenizer_lies_beside_the_merged_model_where_the_trainer_has_none(tmp_path):
    rows = [{"input_ids": row} for row in tokens(8, 6, vocabulary=32).tolist()]
    collator = DataCollatorForLanguageModeling(data.tokenizer(), mlm=False)
    callback = QBLoRACallback(adapter(), merged_output_dir=tmp_path / "merged")
    args = TrainingArguments(**settings(tmp_path / "run"))
    Trainer(base(), args, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_one_callback_serves_one_trainer_after_another(tmp_path):
    callback = QBLoRACallback(adapter())
    for name in "ab":
        sft(tmp_path / name, callback).train()
    assert json.loads((tmp_path / "b" / REPORT).read_text())["finished"]


def test_a_float_base_is_merged_into_its_weights(tmp_path):
    config = adapter(quantization_aware=False)
    trainer = sft(tmp_path, QBLoRACallback(config, merged_output_dir=tmp_path / "m"), tiny_llama(vocab_size=32))
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(merged), logits(trainer.model), rtol=0, atol=1e-5)  # fp32 rounding


def test_q_blora_over_4_bits_trains_and_the_report_says_why_it_was_not_merged(tmp_path):
    sft(tmp_path, QBLoRACallback(adapter(quantization_aware=False))).train()
    merge = json.loads((tmp_path / REPORT).read_text())["merge"]
    assert not merge["exact"]
    assert "no multiple of its group" in merge["reason"]


def test_adapters_given_twice_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"already has adapters .* QBLoRACallback\(\) without a config"):
        sft(tmp_path, QBLoRACallback(adapter()), peft_config=adapter())


def test_a_callback_without_config_refuses_a_model_without_adapters(tmp_path):
    with pytest.raises(ConfigError, match="has no balanced adapters; place them"):
        sft(tmp_path, QBLoRACallback())


def test_adapters_of_another_method_are_refused(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="of another PEFT method"):
        sft(tmp_path, QBLoRACallback(), tiny_llama(vocab_size=32), peft_config=lora)


@pytest.mark.parametrize("change", [{"in_factor": 48}, {"in_factor": 16}, {"out_factor": 5}])
def test_factors_that_do_not_fit_are_refused_before_training_and_nothing_is_written(tmp_path, change):
    with pytest.raises(ConfigError, match="Allowed here"):
        sft(tmp_path / "run", QBLoRACallback(adapter(**change)))
    assert not list((tmp_path / "run").glob("*"))


def test_an_output_folder_that_is_not_empty_is_refused_unless_it_may_be_overwritten(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not empty"):
        sft(tmp_path, QBLoRACallback(adapter(), merged_output_dir=tmp_path / "m"))
    assert (tmp_path / "m" / "mine.txt").read_text() == "keep"
    sft(tmp_path, QBLoRACallback(adapter(), merged_output_dir=tmp_path / "m", overwrite=True)).train()
    assert (tmp_path / "m" / "config.json").is_file()
    assert not (tmp_path / "m" / "mine.txt").exists()


@pytest.mark.parametrize("option", [{"merged_output_dir": "m"}, {"save_merged": True}, {"eval_merged_loss": True}])
def test_a_merged_output_is_refused_where_there_is_no_exact_merge(tmp_path, option):
    with pytest.raises(ConfigError, match="need an exact merge"):
        sft(tmp_path, QBLoRACallback(adapter(quantization_aware=False), **option))


def test_a_packed_head_is_refused_where_the_trainer_reads_its_weight(tmp_path):
    packed = quantize_model_(tiny_llama(vocab_size=32), GroupQuantConfig(quantize_embeddings=True))
    with pytest.raises(ConfigError, match=r"SFTTrainer reads the weight of the output head"):
        sft(tmp_path, QBLoRACallback(adapter()), packed)


def test_a_config_added_after_the_trainer_was_built_is_refused(tmp_path):
    trainer = sft(tmp_path, None, peft_config=adapter(), eval_dataset=data.texts(2))
    trainer.add_callback(QBLoRACallback(adapter(), eval_merged_loss=True))
    for start in (trainer.evaluate, trainer.train):
        with pytest.raises(ConfigError, match="added after the trainer was built"):
            start()


def test_a_callback_without_config_may_be_added_later(tmp_path):
    trainer = sft(tmp_path, None, peft_config=adapter())
    trainer.add_callback(QBLoRACallback())
    trainer.train()
    assert json.loads((tmp_path / REPORT).read_text())["merge"]["exact"]
    assert all("qbl/adapter_norm" in entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"qbl/merged_max_logit_difference", "train_loss"} <= trainer.state.log_history[-1].keys()


def test_a_second_callback_is_refused_wherever_it_was_added(tmp_path):
    with pytest.raises(ConfigError, match="two QBLoRACallbacks"):
        sft(tmp_path, None, peft_config=adapter(), callbacks=[QBLoRACallback(), QBLoRACallback()])
    trainer = sft(tmp_path, QBLoRACallback(), peft_config=adapter())
    trainer.add_callback(QBLoRACallback())
    with pytest.raises(ConfigError, match="two QBLoRACallbacks"):
        trainer.train()


def test_model_init_is_refused(tmp_path):
    args = TrainingArguments(**settings(tmp_path))
    with pytest.raises(ConfigError, match="model_init makes another one"):
        Trainer(args=args, model_init=lambda: base(), train_dataset=[], callbacks=[QBLoRACallback(adapter())])


def test_a_callback_outside_a_trainer_names_the_line_to_write(tmp_path):
    args = TrainingArguments(**settings(tmp_path))
    with pytest.raises(ConfigError, match=r"peft_config=QBLoRAConfig\(\.\.\.\)"):
        QBLoRACallback(adapter()).on_init_end(args, None, None, model=base())


def test_arguments_that_make_no_sense_are_refused():
    for name in ("merged_output_dir", "onnx_output_dir", "onnx_options"):
        with pytest.raises(ConfigError, match=rf"QBLoRACallback: {name}=3 must be"):
            QBLoRACallback(**{name: 3})
    for name in ("save_merged", "eval_merged_loss", "overwrite"):
        with pytest.raises(ConfigError, match=rf"QBLoRACallback: {name}='no' must be True or False"):
            QBLoRACallback(**{name: "no"})
    with pytest.raises(ConfigError, match="must be a QBLoRAConfig"):
        QBLoRACallback(peft.LoraConfig())
    with pytest.raises(ConfigError, match="set merged_output_dir as well"):
        QBLoRACallback(adapter(), onnx_output_dir="x")
    with pytest.raises(ConfigError, match="onnx_options says how to export to onnx_output_dir; set it as well"):
        QBLoRACallback(adapter(), merged_output_dir="x", onnx_options={"dtype": "float16"})
    for wrong in (-1, 2.5):
        with pytest.raises(ConfigError, match="round_from_step"):
            QBLoRACallback(adapter(), stored_delta="int8", round_from_step=wrong)
    with pytest.raises(ConfigError, match="set stored_delta"):
        QBLoRACallback(adapter(), round_from_step=2)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"merged_output_dir": "run"}, "would replace what output_dir"),
        ({"merged_output_dir": "."}, "would replace what output_dir"),
        ({"merged_output_dir": "run/checkpoint-2"}, "one of the trainer's checkpoints"),
        ({"merged_output_dir": "m", "onnx_output_dir": "m"}, "would replace what merged_output_dir"),
        ({"merged_output_dir": "m/merged", "onnx_output_dir": "m"}, "would replace what merged_output_dir"),
        ({"merged_output_dir": "link/run"}, "would replace what output_dir"),
        ({"merged_output_dir": "run/../run"}, "would replace what output_dir"),
        ({"merged_output_dir": "file/m"}, "nothing can be written into"),
    ],
)
def test_outputs_that_could_not_be_written_are_refused_before_training(outputs, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "precious").touch()
    folders = {name: tmp_path / folder for name, folder in outputs.items()}
    with pytest.raises(ConfigError, match=message):
        sft(tmp_path / "run", QBLoRACallback(adapter(), overwrite=True, **folders))
    assert (checkpoint / "precious").is_file()


@pytest.mark.parametrize(
    "options",
    [{"nope": 1}, {"provider": "tpu"}, {"provider": None}, {"output_dir": "elsewhere"}, {"dtype": "bfloat16"}],
)
def test_options_that_no_export_takes_are_refused_before_training(options, tmp_path, monkeypatch):
    def export_onnx(model_or_path, output_dir, *, provider="cpu", dtype=None, overwrite=False):
        raise AssertionError

    monkeypatch.setitem(vars(qbl_trl), "export_onnx", export_onnx)
    folders = {"merged_output_dir": tmp_path / "m", "onnx_output_dir": tmp_path / "x"}
    with pytest.raises(ConfigError, match="|".join(map(str, options))):
        sft(tmp_path, QBLoRACallback(adapter(), onnx_options=options, **folders))


def test_a_tokenizer_for_the_export_that_is_not_there_is_named_before_training(tmp_path):
    pytest.importorskip("onnx", reason="neither [onnx] nor [onnx5] is installed")
    folders = {"merged_output_dir": tmp_path / "m", "onnx_output_dir": tmp_path / "x"}
    with pytest.raises(ConfigError, match=r"tokenizer='/no/where' is no folder, nor a model id"):
        sft(tmp_path, QBLoRACallback(adapter(), onnx_options={"tokenizer": "/no/where"}, **folders))


def test_a_second_training_does_not_find_out_at_its_end_that_the_first_ones_output_is_there(tmp_path):
    trainer = sft(tmp_path / "run", QBLoRACallback(adapter(), merged_output_dir=tmp_path / "m"))
    trainer.train()
    with pytest.raises(ConfigError, match="not empty"):
        trainer.train()


def test_an_export_that_fails_leaves_the_adapter_and_the_report(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setitem(vars(qbl_trl), "export_onnx", full)
    folders = {"merged_output_dir": tmp_path / "m", "onnx_output_dir": tmp_path / "x"}
    trainer = sft(tmp_path / "run", QBLoRACallback(adapter(), **folders))
    with pytest.raises(OSError, match="No space left") as raised:
        trainer.train()
    assert "adapter saved in" in raised.value.__notes__[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / REPORT).is_file()
    assert (tmp_path / "m" / "config.json").is_file()


def test_an_adapter_on_a_head_that_the_trainer_never_calls_is_refused(tmp_path):
    config = adapter(target_modules=["q_proj", "lm_head"], in_factor=32, quantization_aware=False)
    with pytest.raises(ConfigError, match="never calls it"):
        sft(tmp_path, QBLoRACallback(config))


def test_a_merge_that_disagrees_is_not_written_and_the_adapter_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(finish._TOLERANCE, torch.float32, -1.0)
    trainer = sft(tmp_path / "run", QBLoRACallback(adapter(), merged_output_dir=tmp_path / "m"))
    with pytest.raises(MergeError, match=r"(?s)differ from the trained model's .*\(adapter saved in"):
        trainer.train()
    assert not (tmp_path / "m").exists()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert "differ" in json.loads((tmp_path / "run" / REPORT).read_text())["merge"]["reason"]


def test_the_exporter_is_called_by_its_public_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(
        vars(qbl_trl), "export_onnx", lambda *args, **kwargs: calls.append((args, kwargs)) or Exported()
    )
    callback = QBLoRACallback(
        adapter(), merged_output_dir=tmp_path / "m", onnx_output_dir=tmp_path / "x", onnx_options={"provider": "cuda"}
    )
    sft(tmp_path, callback).train()
    assert calls == [((tmp_path / "m", tmp_path / "x"), {"overwrite": False, "provider": "cuda"})]


def test_a_chat_script_needs_two_changed_lines(tmp_path):
    trainer = sft(tmp_path, QBLoRACallback(adapter()), train_dataset=data.chats(), assistant_only_loss=True)
    trainer.train()
    assert len(losses(trainer)) == 4


def test_an_optimizer_from_before_the_adapters_is_refused(tmp_path):
    model = base()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="made before the adapters were there"):
        sft(tmp_path, QBLoRACallback(adapter()), model=model, optimizers=(optimizer, None))


def test_an_architecture_without_a_graph_is_refused_before_the_training(tmp_path):
    pytest.importorskip("onnxruntime")
    sizes = {"d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 96}
    model = quantize_model_(XLNetLMHeadModel(XLNetConfig(vocab_size=32, **sizes)), GroupQuantConfig())
    outputs = {"merged_output_dir": tmp_path / "merged", "onnx_output_dir": tmp_path / "onnx"}
    with pytest.raises(ConfigError, match=r"QBLoRACallback: onnx_output_dir: .* of type 'xlnet'"):
        sft(tmp_path, QBLoRACallback(adapter(target_modules="all-linear"), **outputs), model)
