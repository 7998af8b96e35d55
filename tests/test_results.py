"""RESULTS.md is what its cells say, and the quality benchmark measures what it claims to."""

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from integration.benchmarks import blocks, cells, claims, judging, models, render_results, running, tasks, turns
from qbl_trl.config import GroupQuantConfig
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.targets import target_layers
from qbl_trl.wrapped import unwrap

LAYERS, VOCABULARY = 4, 97


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Letters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % VOCABULARY for character in text]}


def oracle(model: LlamaForCausalLM, ids: list[int], wanted: list[int]) -> float:
    """Log probability of the wanted tokens after ids, one unpadded forward per token."""
    total = 0.0
    for token in wanted:
        total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids = [*ids, token]
    return total


# ---- the file


def test_results_md_is_what_the_cells_say():
    assert render_results.OUTPUT.read_text() == render_results.render(blocks.load()), (
        "run python -m integration.benchmarks.render_results"
    )
    drawn = render_results.plots(blocks.load())
    assert {path: path.read_text() for path in render_results.PLOTS.iterdir()} == drawn


def test_every_cell_is_named_by_its_settings():
    for result in blocks.load():
        cell = cells.Cell(**result["settings"])
        assert cell.path.is_file(), cell.name


def test_a_new_setting_with_a_default_does_not_rename_the_cells_there_are():
    cell = cells.Cell("r8", "qlora_nf4")
    explicit = cells.Cell(**dataclasses.asdict(cell))
    assert cell.name == explicit.name
    assert cell.name != dataclasses.replace(cell, steps=61).name


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([-0.1, -0.2, -0.1], "holds"),
        ([-0.1, -0.2], "undecided"),
        ([-0.1, 0.1, -0.1], "undecided"),
        ([0.1, 0.2, 0.3], "does not hold: the other is better"),
    ],
)
def test_a_claim_needs_three_seeds_that_agree(differences, expected):
    assert claims.verdict(claims.CLAIMS[0], differences) == expected


def test_the_best_rate_is_chosen_on_validation_among_the_rates_with_the_most_seeds():
    def result(lr, seed, nll):
        cell = cells.Cell("r8", "qlora_nf4", lr=lr, seed=seed)
        measures = {"validation": {"nll": nll}, "test": {"nll": -nll}}
        return {"settings": dataclasses.asdict(cell), "measures": measures}

    lucky = [result(3e-3, 0, 0.1)]
    (block,) = blocks.blocks([result(1e-3, s, 0.5) for s in (0, 1)] + [result(1e-2, s, 0.6) for s in (0, 1)] + lucky)
    assert block.best_rate(("qlora_nf4", "none")) == 1e-3


def test_ratios_are_those_of_the_same_round():
    found = {"peer": [(1.0, 1.0), (2.0, 4.0), (1.0, 1.0)], "ours": [(0.5, 2.0), (1.0, 2.0), (2.0, 2.0)]}
    peer, ours = turns.rows_of("bare session", {"peer": 10, "ours": 20}, found, prompt=100, bandwidth=100.0)
    assert (peer.prefill_ratio, peer.decode_ratio) == (1.0, 1.0)
    assert (ours.prefill_ratio, ours.decode_ratio) == (2.0, 0.5)
    assert (ours.prefill, ours.decode, ours.bandwidth) == (100.0, 0.5, 0.1)


def test_graphs_take_turns_by_blocks_and_none_is_timed_cold():
    played, last = [], [""]

    class Player:
        """A prefill behind another graph's, and the first steps of every block, take a hundred times as long."""

        def __init__(self, name):
            self.name, self.seconds = name, {"peer": 1.0, "ours": 2.0}[name]

        def prefill(self):
            cold, last[0] = last[0] != self.name, self.name
            return self.seconds * (1000 if cold else 10)

        def steps(self, count):
            played.append(self.name)
            warm = count - turns.WARM_UP
            return [100.0] * turns.WARM_UP + [self.seconds] * warm

        def close(self):
            played.append(f"{self.name} closed")

    opened = {name: functools.partial(Player, name) for name in ("peer", "ours")}
    found = turns.take_turns("loop", opened, rounds=2, new=2 * turns.BLOCK)
    assert found == {"peer": [(10.0, 1.0)] * 2, "ours": [(20.0, 2.0)] * 2}
    there, back = ["peer", "ours"], ["ours", "peer"]
    closed = [[f"{name} closed" for name in names] for names in (there, back)]
    assert played == [*there, *back, *closed[0], *back, *there, *closed[1]]


# ---- the measurement


@pytest.mark.parametrize("layers", [1, 3, LAYERS])
def test_a_split_model_gives_the_log_probabilities_of_the_whole(model, layers):
    queries = [judging.answer_query(Letters(), "a story: ", answer, end=True) for answer in ("x", "long answer")]
    found = judging.Split(model, layers)
    for query, values in zip(queries, found.log_probs(found.upper, queries), strict=True):
        start = query.positions[0] + 1
        torch.testing.assert_close(
            float(values.sum()), oracle(model, query.ids[:start], query.tokens), rtol=1e-4, atol=1e-4
        )  # float32 rounding, summed over the answer


def test_splitting_leaves_the_model_as_it_was(model):
    judging.Split(model, 1)
    assert len(model.model.layers) == model.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("by_first_token", [False, True])
def test_the_judge_agrees_with_the_oracle(model, by_first_token):
    items = [tasks.Item("one: ", (" ab", " cde"), 1), tasks.Item("a longer one: ", (" ab", " cde"), 0)]
    items = [dataclasses.replace(item, choices=tuple(c.strip() for c in item.choices)) for item in items]
    split = judging.Split(model, 2)
    judgement = judging.judge(split, split.upper, Letters(), items, by_first_token=by_first_token, batch_size=2)
    for item, scores in zip(items, judgement.scores, strict=True):
        ids = Letters()(item.prompt)["input_ids"]
        answers = [Letters()(choice)["input_ids"][: 1 if by_first_token else None] for choice in item.choices]
        expected = torch.tensor([oracle(model, ids, answer) for answer in answers])
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)  # float32 rounding


def test_measures_of_a_judgement():
    judgement = judging.Judgement([torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])], [0, 0], classes=2)
    measures = judgement.measures
    assert measures["rows"] == 2
    assert measures["nll"] == 2.0
    assert measures["accuracy"] == measures["macro_recall"] == 0.5


@pytest.mark.parametrize("method", [n for n, m in cells.METHODS.items() if m.adapter != "none" and not m.start])
def test_a_fresh_adapter_changes_nothing_and_has_the_parameters_of_lora(model, method):
    cell = cells.Cell("r8", method, "none" if cells.METHODS[method].p == 1 else "sum", r=2)
    upper = judging.Split(model, 2).upper
    adapted = models.adapted(cell, upper)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(unwrap(adapted)(ids).logits, upper(ids).logits, rtol=0, atol=1e-5)
    if cells.METHODS[method].adapter == "low_rank":
        plain = models.adapted(cells.Cell("r8", "lora_float", r=2), upper)
        ours, theirs = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (adapted, plain))
        assert ours == pytest.approx(theirs, rel=0.1)  # ranks are whole numbers, and this model is tiny


def test_text_to_continue_is_judged_by_its_perplexity(model):
    items = [tasks.Item("one: ", ("two",), 0), tasks.Item("three: ", ("four five",), 0)]
    split = judging.Split(model, 2)
    found = judging.judge(split, split.upper, Letters(), items).measures
    logs = [oracle(model, Letters()(i.prompt)["input_ids"], Letters()(i.choices[0])["input_ids"]) for i in items]
    assert found["perplexity"] == pytest.approx(math.exp(-sum(logs) / (3 + 9)), rel=1e-4)  # float32 rounding
    assert set(found) == {"rows", "nll", "perplexity"}


@pytest.mark.parametrize("method", [n for n, m in cells.METHODS.items() if m.start])
def test_a_start_that_knows_the_float_weights_begins_nearer_to_them(model, method, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(models, "split_of", lambda cell, kind=None: judging.Split(copy.deepcopy(model), 2))
    exact, rounded = (judging.Split(copy.deepcopy(model), 2).upper for _ in range(2))
    names = list(target_layers(exact, GroupQuantConfig()))
    for name in names:
        weight = rounded.get_submodule(name).weight
        weight.data = models.nf4_values(weight.data)
    started = unwrap(models.adapted(cells.Cell("r8", method, r=4), rounded))
    for name in names:
        layer, weight = started.get_submodule(name), exact.get_submodule(name).weight
        found = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert (found - weight).norm() < (rounded.get_submodule(name).weight - weight).norm()
    plain = unwrap(models.adapted(cells.Cell("r8", "lora_float", r=4), rounded))
    ours, theirs = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (started, plain))
    assert ours == pytest.approx(theirs, rel=0.1)  # ranks are whole numbers, and this model is tiny


def test_a_base_held_as_float_computes_what_its_codes_do(model):
    packed = quantize_model_(judging.sharing_copy(model), GroupQuantConfig(group_size=32))
    held = judging.sharing_copy(packed)
    models.as_float_(held)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(held(ids).logits, packed(ids).logits, rtol=0, atol=1e-4)  # float32 rounding


@pytest.mark.parametrize("again", [[1.0], [2.0]])
def test_a_lost_adapter_is_trained_again_and_its_measures_hold_only_if_it_is_the_same(again, tmp_path, monkeypatch):
    cell = cells.Cell("r8", "qlora_nf4")
    judged = []

    def judge(*args, **kwargs):
        judged.append(1)
        return SimpleNamespace(measures={"nll": 1.0})

    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    monkeypatch.setattr(running, "default_cache", lambda: tmp_path)
    monkeypatch.setattr(running, "split_of", lambda cell: SimpleNamespace(upper=None))
    monkeypatch.setattr(running, "task_", lambda *a: SimpleNamespace(validation=[], test=[], by_first_token=True))
    monkeypatch.setattr(running, "adapted", lambda *a: torch.nn.Linear(1, 1))
    monkeypatch.setattr(running, "unwrap", lambda model: model)
    monkeypatch.setattr(running.judging, "judge", judge)
    monkeypatch.setattr(running, "train_", lambda *a: ([1.0], 0.1))
    running.run(cell, ("validation",))
    running.run(cell, ("validation",))
    assert len(judged) == 1
    next(tmp_path.rglob("*.safetensors")).unlink()
    monkeypatch.setattr(running, "train_", lambda *a: (again, 0.1))
    found = running.run(cell, ("test",))
    assert found["losses"] == again
    assert set(found["measures"]) == {"validation", "test"}
    assert len(judged) == (2 if again == [1.0] else 3)
