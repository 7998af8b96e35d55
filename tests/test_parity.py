"""verify: two models, one number after the other."""

import copy
import json
import math

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
)

from qbl_trl import QBLoRAConfig, verify
from qbl_trl.errors import ConfigError
from qbl_trl.parity import ParityReport, compare, logits_of, positions
from tests.tiny import tiny_llama, tokens

BERT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}


def test_a_model_agrees_with_itself_and_its_folder(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    report = verify(model, tmp_path, tokens())
    assert report.max_abs_difference == 0
    assert report.top1_agreement == 1
    assert report.tokens == 18


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, compiled, lambda model: model.base_model])
def test_a_wrapped_model_is_the_one_inside(wrap):
    model = get_peft_model(tiny_llama(), QBLoRAConfig(r=4, init_lora_weights=False)).eval()
    assert verify(model, wrap(model), tokens()).max_abs_difference < 1e-5  # float32 sums in another order


def test_comparisons_of_several_texts_are_joined_as_one_of_all_their_positions():
    first, second = (tiny_llama(seed=seed) for seed in (0, 1))
    texts = [tokens(1, length, seed=length) for length in (3, 9, 5)]
    apart = [
        (logits_of(first)(text, torch.ones_like(text)), logits_of(second)(text, torch.ones_like(text)))
        for text in texts
    ]
    whole = compare(*(torch.cat(sides, 1) for sides in zip(*apart, strict=True)))
    joined = ParityReport.joined([verify(first, second, text) for text in texts]).to_dict()
    assert joined == pytest.approx(whole.to_dict())


def test_the_figures_are_those_of_the_definition():
    reference = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    candidate = torch.tensor([[[2.5, 0.0], [2.0, 1.0]]])
    report = compare(reference, candidate)
    assert report.max_abs_difference == 2.0
    assert report.mean_abs_difference == pytest.approx(2.5 / 4)
    assert report.top1_agreement == 0.5

    def kl(a, b):
        p, q = torch.tensor(a).softmax(0), torch.tensor(b).softmax(0)
        return sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(p, q, strict=True))

    assert report.kl_per_token == pytest.approx((kl([2.0, 0.0], [2.5, 0.0]) + kl([0.0, 1.0], [2.0, 1.0])) / 2, rel=1e-5)


def test_a_disagreement_over_two_equal_tokens_is_a_tie():
    report = compare(torch.tensor([[[1.0, 1.0001]]]), torch.tensor([[[1.0002, 1.0]]]))
    assert (report.top1_agreement, report.ties) == (0, 1)


def test_a_disagreement_over_a_clear_best_token_is_none_however_large_the_difference():
    report = compare(torch.tensor([[[1.0, 1.01]]]), torch.tensor([[[9.0, 1.0]]]))
    assert (report.top1_agreement, report.ties) == (0, 0)


def test_padding_is_not_compared():
    reference, mask = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 1]])
    candidate = reference.clone()
    candidate[0, 0] = 9
    assert compare(reference, candidate, mask).max_abs_difference == 0


def test_positions_count_real_tokens_only():
    assert positions(torch.tensor([[0, 0, 1, 1]])).tolist() == [[0, 0, 0, 1]]


def test_a_training_model_stays_in_training():
    model = tiny_llama().train()
    logits_of(model)(tokens(), torch.ones_like(tokens()))
    assert model.training


def zeros(ids, mask):
    return torch.zeros(*ids.shape, 5)


def test_a_callable_and_a_single_row_are_fine():
    assert verify(zeros, zeros, tokens()[0, :3]).tokens == 3


def test_the_report_is_text_and_json():
    report = compare(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    assert json.loads(json.dumps(report.to_dict()))["tokens"] == 2
    assert "max difference 1.00e+00" in str(report)


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), "cannot be compared"),
        (torch.zeros(1, 2, 3), torch.full((1, 2, 3), math.nan), "NaN or infinite"),
    ],
)
def test_logits_that_do_not_fit_are_refused(reference, candidate, message):
    with pytest.raises(ConfigError, match=message):
        compare(reference, candidate)


def test_what_gives_no_logits_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a int gives no logits"):
        verify(3, 4, tokens())
    with pytest.raises(ConfigError, match="no such folder"):
        verify(tmp_path / "missing", 4, tokens())
    with pytest.raises(ConfigError, match="holds neither a model"):
        verify(tmp_path, 4, tokens())
    with pytest.raises(ConfigError, match="the attention mask is all zero"):
        compare(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2))


def test_a_model_that_was_trained_in_mixed_precision_is_compared_in_its_own():
    from accelerate import Accelerator

    model = tiny_llama().eval()
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(model))
    patched = prepared.forward
    assert verify(model, prepared, tokens()).max_abs_difference == 0
    assert prepared.forward is patched


def test_a_source_of_last_logits_is_compared_there():
    model = tiny_llama().eval()
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    everywhere = logits_of(model)

    def last(input_ids, attention_mask):
        return everywhere(input_ids, attention_mask)[torch.arange(2), [5, 8]].unsqueeze(1)

    report = verify(model, last, ids, mask)
    assert report.tokens == 2
    assert report.max_abs_difference == 0


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_ids_and_masks_of_any_integer_type_are_read(kind):
    model, ids = tiny_llama(), tokens()
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert verify(model, model, ids.to(kind), mask).max_abs_difference == 0


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(1, 4), None, r"input_ids of \(1, 4\) torch.float32; give token ids"),
        (torch.zeros(1, 0, dtype=torch.long), None, "at least one"),
        (torch.tensor([[-1, 2]]), None, "give token ids"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"of \(batch, tokens\)"),
        ("text", None, r"input_ids is 'text'; give a tensor of \(batch, tokens\) integers"),
        (None, None, "input_ids is None; give a tensor"),
        ([[1, 2], [3]], None, r"input_ids is \[\[1, 2\], \[3\]\]; give a tensor"),
        ([[1, 2]], "all", "attention_mask is 'all'; give a tensor"),
        ([[1, 100]], None, "token 100 is beyond the vocabulary of 100 tokens"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 5), r"an attention_mask of \(2, 5\) does not cover ids"),
    ],
)
def test_what_is_no_text_is_refused(ids, mask, message):
    with pytest.raises(ConfigError, match=message):
        verify(tiny_llama(), tiny_llama(), ids, mask)


@pytest.mark.parametrize("labels", [1, 3])
def test_classifiers_are_compared_row_by_row(labels):
    config = BertConfig(**BERT, num_labels=labels)
    first, second = BertForSequenceClassification(config), BertForSequenceClassification(config)
    assert verify(first, first, tokens()).max_abs_difference == 0
    report = verify(first, second, tokens())
    assert report.tokens == 2
    assert report.max_abs_difference > 0
    if labels == 1:  # one number for each text: nothing to be the best of
        assert (report.kl_per_token, report.top1_agreement) == (0, 1)


def test_what_gives_no_logits_for_token_ids_is_refused():
    for model in (BertModel(BertConfig(**BERT)), BertForQuestionAnswering(BertConfig(**BERT))):
        with pytest.raises(
            ConfigError, match=f"a {type(model).__name__} of this task gives no logits; pass a callable"
        ):
            verify(model, model, tokens())
    pictures = ViTForImageClassification(ViTConfig(**{**BERT, "image_size": 16, "patch_size": 8}))
    for model in (torch.nn.Linear(4, 4), pictures):
        with pytest.raises(ConfigError, match=f"a {type(model).__name__} reads no token ids; pass a callable"):
            verify(model, tiny_llama(), tokens())


def test_functions_of_the_caller_run_under_the_callers_defaults():
    torch.set_default_dtype(torch.float64)
    try:
        layer = torch.nn.Linear(100, 100)
        found = verify(*[lambda ids, mask: layer(torch.ones(*ids.shape, 100))] * 2, tokens())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.max_abs_difference == 0
