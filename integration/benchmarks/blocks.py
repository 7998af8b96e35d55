"""The cells that were measured, in blocks that differ in method, pooling, rate and seed only.

A row is a method with its pooling; its rate is the one with the lowest mean validation NLL, and only then is its test
split looked at.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from integration.benchmarks.cells import METHODS, RESULTS

VARIED = ("method", "pooling", "lr", "seed")

Result = dict[str, Any]
Row = tuple[str, str]  # method, pooling

NAMES = {
    "base_float": "float32, not trained",
    "base_nf4": "NF4, not trained",
    "base_affine": "affine groups, not trained",
    "lora_float": "LoRA, float32 base",
    "qlora_nf4": "QLoRA (NF4)",
    "qblora_nf4": "Q-BLoRA p=e=2 (NF4)",
    "loftq_nf4": "QLoRA started at the error (LoftQ)",
    "qblora_error_nf4": "Q-BLoRA p=e=2 (NF4) started at the error",
    "pissa_nf4": "QLoRA started by PiSSA",
    "lora_affine": "LoRA, affine base",
    "affine_p2e1": "p=2, e=1, affine base",
    "affine_p1e2": "p=1, e=2, affine base",
    "qblora_affine": "Q-BLoRA p=e=2, affine base",
    "affine_e2_writers": "p=1, e=2 on o and down, affine base",
    "affine_e2_readers": "p=1, e=2 on q, k, v, gate and up, affine base",
    "qalora": "QA-LoRA p=g, e=1",
    "qablora_e2": "QA-BLoRA p=g, e=2",
    "qablora": "QA-BLoRA p=g, e by rank",
    "qablora_e4": "QA-BLoRA p=g, e=4",
    "qahira_e1": "QA-HiRA p=g, e=1",
    "qahira_e2": "QA-HiRA p=g, e=2",
}


@dataclasses.dataclass(frozen=True)
class Block:
    """Results that differ in method, pooling, rate and seed only."""

    conditions: dict[str, Any]
    results: tuple[Result, ...]

    def rows(self) -> list[Row]:
        found = {(r["settings"]["method"], r["settings"]["pooling"]) for r in self.results}
        return sorted(found, key=lambda row: (list(METHODS).index(row[0]), row[1]))

    def rates(self) -> list[float]:
        return sorted({r["settings"]["lr"] for r in self.results if not is_base(r)})

    def of(self, row: Row, lr: float | None = None) -> list[Result]:
        """The results of a row, at one rate or all, by seed."""
        chosen = [
            r
            for r in self.results
            if (r["settings"]["method"], r["settings"]["pooling"]) == row and lr in (None, r["settings"]["lr"])
        ]
        return sorted(chosen, key=lambda r: r["settings"]["seed"])

    def best_rate(self, row: Row) -> float:
        """The lowest mean validation NLL among the rates with the most seeds."""
        by_rate = {
            lr: values(self.of(row, lr), "validation", "nll") for lr in {r["settings"]["lr"] for r in self.of(row)}
        }
        most = max(len(v) for v in by_rate.values())
        return min((lr for lr, v in by_rate.items() if len(v) == most), key=lambda lr: mean(by_rate[lr]))

    def tested_rate(self, row: Row) -> float:
        """The best rate on validation among those that were judged on test; the best rate if none was."""
        tested = [r for r in self.of(row) if "test" in r["measures"]]
        return Block(self.conditions, tuple(tested or self.of(row))).best_rate(row)


def is_base(result: Result) -> bool:
    return METHODS[result["settings"]["method"]].adapter == "none"


def values(results: Iterable[Result], measure: str, key: str) -> list[float]:
    return [r["measures"][measure][key] for r in results if key in r["measures"].get(measure, {})]


def load(folder: Path = RESULTS) -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def blocks(results: list[Result]) -> list[Block]:
    grouped: dict[str, list[Result]] = {}
    for result in results:
        conditions = {key: value for key, value in result["settings"].items() if key not in VARIED}
        if is_base(result):
            conditions["steps"] = None
        grouped.setdefault(json.dumps(conditions, sort_keys=True), []).append(result)
    found = []
    for key, members in grouped.items():
        conditions = json.loads(key)
        if conditions["steps"] is None:
            continue
        untrained = grouped.get(json.dumps(conditions | {"steps": None}, sort_keys=True), [])
        found.append(Block(conditions, tuple(members + untrained)))
    return sorted(found, key=lambda block: (-len(block.results), json.dumps(block.conditions, sort_keys=True)))


# ---- text


def spread(numbers: list[float], digits: int = 3) -> str:
    """Mean, standard deviation where there is more than one, and how many."""
    if not numbers:
        return ""
    deviation = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{deviation} ({len(numbers)})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(row: Row) -> str:
    return NAMES[row[0]] + ("" if row[1] == "none" else f", {row[1]}")
