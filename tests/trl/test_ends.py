"""However a run ends, its adapter is kept and nothing of the callback stays on the model."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from trl import RewardConfig, RewardTrainer

from qbl_trl import GroupQuantConfig, merge
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl import finish
from qbl_trl.trl.callback import REPORT, QBLoRACallback
from qbl_trl.trl.report import write_report
from qbl_trl.trl.tokens import FirstTokens
from tests.tiny import logits, tiny_gpt2, tiny_llama, tokens
from tests.trl import data
from tests.trl.runs import adapter, settings, sft


class Interrupting(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_packed_rows_longer_than_the_model_has_positions_are_cut_for_the_comparison(tmp_path):
    model = tiny_gpt2()
    model.resize_token_embeddings(32)
    options = {"packing": True, "max_length": 64, "per_device_train_batch_size": 3}
    callback = QBLoRACallback(adapter())
    sft(
        tmp_path, callback, model=quantize_model_(model, GroupQuantConfig()), train_dataset=data.texts(200), **options
    ).train()
    assert callback.record.merge["parity"]["tokens"] <= 64


def test_a_model_of_sound_keeps_no_first_tokens():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Wav2Vec2Config(
        **sizes,
        conv_dim=(16,),
        conv_stride=(4,),
        conv_kernel=(4,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    tokens_seen = FirstTokens(Wav2Vec2ForCTC(config))
    tokens_seen.remove()
    assert tokens_seen.ids is None


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_the_first_tokens_of_an_encoder_decoder_are_its_encoders(kind):
    sizes = {"T5": {"d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}, "Bart": {"encoder_layers": 1}}[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=32, d_model=64, decoder_start_token_id=0, **sizes)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    ids, seen = torch.arange(3, 13).view(2, 5), FirstTokens(model)
    model(input_ids=ids, labels=ids + 10)
    assert torch.equal(seen.ids, ids)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_encoder_decoder_is_compared_on_what_it_reads(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = quantize_model_(T5ForConditionalGeneration(config), GroupQuantConfig())
    rows = [{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": [6, 7, 8]}] * 8
    callback = QBLoRACallback(adapter(task_type="SEQ_2_SEQ_LM"), merged_output_dir=tmp_path / "merged")
    args = Seq2SeqTrainingArguments(**{**settings(tmp_path / "run"), "max_steps": 2})
    Seq2SeqTrainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    assert callback.record.merge["parity"]["max_abs_difference"] < 1e-4  # float32 on both sides
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_model_that_answers_to_no_token_ids_is_compared_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "logits_of", lambda model: lambda ids, mask: 1 / 0)
    callback = QBLoRACallback(adapter(), merged_output_dir=tmp_path / "merged")
    sft(tmp_path / "run", callback).train()
    merge_entry = json.loads((tmp_path / "run" / REPORT).read_text())["merge"]
    assert merge_entry["exact"] is True
    assert merge_entry["not_compared"] == (
        "a LlamaForCausalLM gives no logits for token ids alone (ZeroDivisionError: division by zero)"
    )
    assert (tmp_path / "merged" / "config.json").is_file()
    assert "gives no logits" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize("packed", [True, False])
def test_a_packed_embedding_is_compared_as_closely_and_counted_as_whole(packed):
    float_bytes = 2 * sum(p.numel() for p in {id(p): p for p in tiny_llama().parameters()}.values())
    frozen = quantize_model_(tiny_llama(), GroupQuantConfig(quantize_embeddings=packed))
    model = get_peft_model(frozen, adapter(init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    merged, entry = finish.merge_and_verify(model, tokens())
    largest = float(logits(model, tokens()).abs().max())
    assert entry["parity"]["tolerance"] == pytest.approx(1e-4 * max(1.0, largest))
    assert finish.sizes(model, merged)["float16"] == float_bytes


def test_an_adapter_on_other_layers_that_is_not_active_takes_no_part(tmp_path):
    model = get_peft_model(
        quantize_model_(tiny_llama(), GroupQuantConfig()),
        adapter(init_lora_weights=False, target_modules=["q_proj"]),
    )
    model.add_adapter("other", adapter(init_lora_weights=False, target_modules=["down_proj"]))
    for stored in (None, "float16"):
        merged, entry = finish.merge_and_verify(model, tokens(), stored)
        assert entry["exact"] is True
        assert merged.model.layers[0].mlp.down_proj.delta is None


def test_whatever_fails_at_the_end_the_adapter_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "merge", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        sft(tmp_path, QBLoRACallback(adapter())).train()
    assert caught.value.__notes__ == [f"(adapter saved in {tmp_path})"]
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / REPORT).read_text())["merge"]["reason"] == "division by zero"


def test_an_interrupted_rounded_run_merges_and_trains_on(tmp_path):
    interrupting = Interrupting()
    trainer = sft(tmp_path, QBLoRACallback(adapter(), stored_delta="int8"), callbacks=[interrupting])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    merged = merge(trainer.model)  # not rounded: what the factors say
    trainer.remove_callback(interrupting)
    trainer.train()
    assert not any(layer._forward_hooks for layer in adapter_layers(trainer.model).values())
    assert not torch.equal(logits(merged, tokens(vocabulary=32)), logits(trainer.model, tokens(vocabulary=32)))


def test_rounding_that_starts_later_is_in_the_graph_from_the_first_step(tmp_path):
    seen = []

    class Looking(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(all(layer._forward_hooks for layer in adapter_layers(model).values()))

    callback = QBLoRACallback(adapter(), stored_delta="int8", round_from_step=2)
    sft(tmp_path, callback, callbacks=[Looking()]).train()
    assert seen == [True] * 4  # a compiled model does not notice hooks that come later


def test_tokens_that_a_chat_template_brings_train_in_both_forms(tmp_path):
    tokenizer = data.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>", "<newer>"]})
    tokenizer.save_pretrained(tmp_path / "template")
    chosen = {"chat_template_path": str(tmp_path / "template"), "train_dataset": data.chats()}
    trained = []
    for name, config, peft in (("cb", adapter(), {}), ("peft", None, {"peft_config": adapter()})):
        trainer = sft(tmp_path / name, QBLoRACallback(config), **chosen, **peft)
        trained.append({n for n, p in trainer.model.named_parameters() if p.requires_grad})
        trainer.train()
    assert trained[0] == trained[1]
    assert any("trainable_tokens_delta" in name for name in trained[0])


def test_such_tokens_train_whatever_a_model_calls_its_embedding(tmp_path):
    tokenizer = data.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(tmp_path / "template")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = quantize_model_(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=33, **sizes)), GroupQuantConfig())
    chosen = {"chat_template_path": str(tmp_path / "template"), "train_dataset": data.chats()}
    trainer = sft(tmp_path, QBLoRACallback(adapter()), base, **chosen)
    trainer.train()
    trained = " ".join(n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert "embed_in.token_adapter.trainable_tokens_delta" in trained
    assert ("embed_out" if BEFORE_5 else "lm_head") + ".modules_to_save" in trained


def test_such_tokens_train_in_a_model_without_output_embeddings(tmp_path):
    tokenizer = data.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(tmp_path / "template")
    turns = {name: [{"role": "assistant", "content": word}] for name, word in (("chosen", "dog"), ("rejected", "cat"))}
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "who"}], **turns}] * 4)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=32, num_labels=1, pad_token_id=1, **sizes))
    args = RewardConfig(chat_template_path=str(tmp_path / "template"), **settings(tmp_path))
    callback = QBLoRACallback(adapter(task_type="SEQ_CLS", quantization_aware=False))
    made = {"train_dataset": rows, "processing_class": data.tokenizer(), "callbacks": [callback]}
    trainer = RewardTrainer(model, args, **made)
    trainer.train()
    trained = " ".join(n for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert "embed_tokens.token_adapter.trainable_tokens_delta" in trained


def test_a_merge_that_disagrees_names_where_the_adapter_is(tmp_path, monkeypatch):
    monkeypatch.setitem(finish._TOLERANCE, torch.float32, -1.0)
    with pytest.raises(MergeError) as caught:
        sft(tmp_path, QBLoRACallback(adapter())).train()
    assert caught.value.__notes__ == [f"(adapter saved in {tmp_path})"]


def tiny_t5(tied):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=tied))
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn(32, 64) / 8)
    return model


def test_an_encoder_decoder_with_a_head_of_its_own_merges_and_opens_again(tmp_path):
    tiny_t5(tied=False).save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base", quantization_config=GroupQuantConfig())
    model = get_peft_model(base, adapter(task_type="SEQ_2_SEQ_LM", init_lora_weights=False)).eval()
    merge(model).save_pretrained(tmp_path / "merged")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    read = {"input_ids": tokens(vocabulary=32), "decoder_input_ids": tokens(2, 4, vocabulary=32)}
    with torch.no_grad():
        torch.testing.assert_close(again(**read).logits, model(**read).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("trained", ["lm_head", "shared"])
def test_a_head_that_cannot_come_apart_is_said_before_the_first_step(tmp_path, trained):
    def trainer(callback):
        arguments = Seq2SeqTrainingArguments(**settings(tmp_path / "run", max_steps=1))
        base = quantize_model_(tiny_t5(tied=True), GroupQuantConfig())
        return Seq2SeqTrainer(base, arguments, train_dataset=rows, callbacks=[callback])

    rows = [{"input_ids": [3, 4, 5], "labels": [6, 7]}] * 4
    config = adapter(task_type="SEQ_2_SEQ_LM", modules_to_save=[trained])
    with pytest.raises(ConfigError, match=r"merged_output_dir: lm_head.weight trains apart from the embedding"):
        trainer(QBLoRACallback(config, merged_output_dir=tmp_path / "merged"))
    callback = QBLoRACallback(config)
    trainer(callback).train()
    assert callback.record.merge["exact"] is False
    assert "ties more than these two" in callback.record.merge["reason"]


@pytest.mark.parametrize("watched", [True, False])
def test_a_base_that_peft_has_prepared_as_one_of_bitsandbytes_trains(tmp_path, watched):
    base = prepare_model_for_kbit_training(quantize_model_(tiny_llama(), GroupQuantConfig()))
    model = get_peft_model(base, adapter())
    trainer = sft(tmp_path, QBLoRACallback() if watched else None, model, gradient_checkpointing=True)
    trainer.train()
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in adapter_layers(trainer.model).values())


def test_a_head_whose_adapter_is_not_active_keeps_its_place(tmp_path):
    settings = {"task_type": "SEQ_2_SEQ_LM", "init_lora_weights": False}
    model = get_peft_model(
        quantize_model_(tiny_t5(tied=True), GroupQuantConfig()),
        adapter(target_modules=["lm_head"], quantization_aware=False, out_factor=1, **settings),
    )
    model.add_adapter("other", adapter(target_modules=["q"], **settings))
    model.set_adapter("other")
    merged, entry = finish.merge_and_verify(model, None)
    assert merged is not None
    assert entry["exact"] is True


@pytest.mark.parametrize("wanted", [{"merged_output_dir": "m"}, {"save_merged": True}, {}])
def test_replicated_layers_are_said_before_the_first_step_where_a_merge_is_wanted(tmp_path, monkeypatch, wanted):
    monkeypatch.chdir(tmp_path)
    callback = QBLoRACallback(adapter(layer_replication=[[0, 2], [1, 2]]), **wanted)
    if wanted:
        with pytest.raises(ConfigError, match="layer_replication: replicated layers share weights"):
            sft(tmp_path / "run", callback)
        return
    sft(tmp_path / "run", callback, max_steps=1).train()
    assert callback.record.merge["exact"] is False
    assert "replicated layers share" in callback.record.merge["reason"]


def test_one_folder_for_the_merged_models_of_a_search_is_refused_before_its_first_trial(tmp_path):
    trainer = sft(tmp_path / "run", QBLoRACallback(adapter(), merged_output_dir=tmp_path / "m"), max_steps=1)
    trainer.state.is_hyper_param_search = True
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, QBLoRACallback))
    with pytest.raises(ConfigError, match="hold the model of the last trial"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_placing_adapters_takes_no_random_numbers_from_the_training(tmp_path):
    sft(tmp_path / "a", QBLoRACallback(adapter()))
    placed = torch.rand(1)
    sft(tmp_path / "b", None)
    assert torch.equal(torch.rand(1), placed)
