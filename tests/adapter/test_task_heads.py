"""The head that a task trains whole gets no adapter, whatever the architecture and the base."""

import copy
import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_llama, tokens

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
MODELS = [
    (BertForTokenClassification, BertConfig, "TOKEN_CLS", "classifier"),
    (LlamaForTokenClassification, LlamaConfig, "TOKEN_CLS", "score"),
    (BertForQuestionAnswering, BertConfig, "QUESTION_ANS", "qa_outputs"),
    (LlamaForQuestionAnswering, LlamaConfig, "QUESTION_ANS", "qa_outputs"),
]


def outputs(model):
    with torch.no_grad():
        found = model(tokens())
    return found.logits if hasattr(found, "logits") else torch.stack((found.start_logits, found.end_logits), -1)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("model_class", "config_class", "task", "head"), MODELS)
def test_a_default_adapter_leaves_the_head_of_the_task_to_be_trained_whole(
    tmp_path, model_class, config_class, task, head, quantized
):
    torch.manual_seed(0)
    labels = {"num_labels": 3} if task == "TOKEN_CLS" else {}
    base = model_class(config_class(**SIZES, vocab_size=100, **labels)).eval()
    if quantized:
        quantize_model_(base, GroupQuantConfig())
    settings = {"r": 2, "in_factor": 32, "init_lora_weights": False, "task_type": task}
    model = get_peft_model(base, QBLoRAConfig(**settings)).eval()
    assert not any(head in name for name in adapter_layers(base))
    assert any(head in name for name, p in model.named_parameters() if p.requires_grad)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(merge(model)), expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    again = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    torch.testing.assert_close(outputs(again), expected, rtol=0, atol=0)


HEADS = {  # by where they are: beside the inner model, two layers deep, of a task that is no classification
    "score": (LlamaForSequenceClassification, LlamaConfig, {"num_labels": 1, "pad_token_id": 0}, "SEQ_CLS"),
    "classifier.dense, classifier.out_proj": (RobertaForSequenceClassification, RobertaConfig, {}, "SEQ_CLS"),
    "qa_outputs": (BertForQuestionAnswering, BertConfig, {}, "QUESTION_ANS"),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_no_task_type_names_stays_as_it_is_with_a_warning(head):
    model_class, config_class, settings, task = HEADS[head]
    base = model_class(config_class(**SIZES, vocab_size=100, **settings))
    with pytest.warns(UserWarning, match=rf"{re.escape(head)} of {model_class.__name__} gets no adapter .*{task}"):
        frozen = get_peft_model(copy.deepcopy(base), QBLoRAConfig(r=2))
    assert not any(head.partition(".")[0] in name for name, p in frozen.named_parameters() if p.requires_grad)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gets no adapter")
        trained = get_peft_model(base, QBLoRAConfig(r=2, task_type=task))
    whole = {
        name.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        for name, p in trained.named_parameters()
        if "modules_to_save" in name and p.requires_grad
    }
    assert {f"{part}.weight" for part in head.split(", ")} <= whole
    assert list(adapter_layers(trained)) == list(adapter_layers(frozen))


def test_a_head_under_another_name_than_peft_trains_whole_is_to_be_named():
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    base = BartForSequenceClassification(BartConfig(**sizes, d_model=64, vocab_size=100, num_labels=2))
    with pytest.warns(UserWarning, match="classification_head.dense, .* no adapter .* needs, name it in modules"):
        get_peft_model(copy.deepcopy(base), QBLoRAConfig(r=2, task_type="SEQ_CLS"))
    named = QBLoRAConfig(r=2, task_type="SEQ_CLS", modules_to_save=["classification_head"])
    trained = [name for name, p in get_peft_model(base, named).named_parameters() if p.requires_grad]
    assert any("classification_head.modules_to_save.default.dense.weight" in name for name in trained)


def test_a_second_adapter_leaves_the_head_of_the_first_alone():
    base = BertForTokenClassification(BertConfig(**SIZES, vocab_size=100, num_labels=3))
    model = get_peft_model(base, QBLoRAConfig(r=2, task_type="TOKEN_CLS"))
    model.add_adapter("second", QBLoRAConfig(r=2, task_type="TOKEN_CLS"))
    assert not any("classifier" in name for name in adapter_layers(base))


def test_a_module_that_is_to_be_trained_whole_gets_no_adapter_inside():
    model = get_peft_model(tiny_llama(), QBLoRAConfig(r=2, modules_to_save=["layers.1.mlp"]))
    names = list(adapter_layers(model.get_base_model()))
    assert "model.layers.0.mlp.up_proj" in names
    assert not any("layers.1.mlp" in name for name in names)
