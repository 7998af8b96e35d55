"""Which cells (see cells.py) answer which question, and the command that trains and judges them.

python -m integration.benchmarks.quality --quick           # one task, few steps
python -m integration.benchmarks.quality --full            # hours
python -m integration.benchmarks.quality --plan pooling    # one question; --help names them all
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from integration.benchmarks.cells import METHODS, POOLED, RESULTS, Cell
from integration.benchmarks.running import run, say

RATES = (3e-3, 1e-2)
POOLINGS = ("rms", "sum", "mean", "tied")

Job = tuple[Cell, tuple[str, ...]]  # a cell and what is to be measured of it
Row = tuple[str, str]  # method, pooling


def pooling_plan(
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    poolings: tuple[str, ...] = POOLINGS,
    task: str = "r8",
    **conditions: Any,
) -> Iterator[Job]:
    """Does one learning rate serve LoRA, Q-BLoRA and QA-BLoRA? On one base, so that only the adapter differs."""
    rows: list[Row] = [("lora_affine", "none")]
    rows += [(method, pooling) for pooling in poolings for method in ("qblora_affine", "qablora_e2")]
    for seed in seeds:
        for lr in rates:
            for method, pooling in rows:
                yield Cell(task, method, pooling, lr, seed, **conditions), ("validation",)


def methods_plan(
    rows: Sequence[Row], seeds: tuple[int, ...] = (0, 1, 2), rates: Sequence[float] = RATES, **conditions: Any
) -> Iterator[Job]:
    """Each method at its own best rate: the lowest mean validation NLL over all seeds.

    Only then is the test split judged, together with what the method's adapters become at the affine base's bits.
    """
    for row in rows:
        method, pooling = row
        yield Cell(method=f"base_{METHODS[method].base}", lr=0.0, **conditions), ("validation", "test")
        sweep = [[Cell(method=method, pooling=pooling, lr=lr, seed=s, **conditions) for s in seeds] for lr in rates]
        for cells in sweep:
            yield from ((cell, ("validation",)) for cell in cells)
        best = min(sweep, key=lambda cells: sum(run(cell)["measures"]["validation"]["nll"] for cell in cells))
        routes = ("merged",) if METHODS[method].p == POOLED else DEPLOYMENTS.get(method, ())
        yield from ((cell, ("validation", "test", *(f"test/{route}" for route in routes))) for cell in best)


DEFAULT_POOLING = "rms"
DEPLOYMENTS = {"lora_float": ("rtn",), "lora_affine": ("rtn",), "qlora_nf4": ("rtn", "float+rtn")}
ROWS: tuple[Row, ...] = (
    ("qlora_nf4", "none"),
    ("qblora_nf4", DEFAULT_POOLING),
    ("qalora", DEFAULT_POOLING),
    ("qablora_e2", DEFAULT_POOLING),
    ("lora_affine", "none"),
    ("qblora_affine", DEFAULT_POOLING),
    ("qblora_affine", "sum"),
    ("qablora_e4", DEFAULT_POOLING),
    ("lora_float", "none"),
    ("qahira_e2", DEFAULT_POOLING),
)
BY_RANK: Row = ("qablora", DEFAULT_POOLING)
FACTORS: tuple[Row, ...] = (
    ("affine_p2e1", DEFAULT_POOLING),
    ("affine_p1e2", "none"),
    ("lora_affine", "none"),
    ("qblora_affine", DEFAULT_POOLING),
    ("qahira_e1", DEFAULT_POOLING),
    ("qahira_e2", DEFAULT_POOLING),
)
WHERE: tuple[Row, ...] = (("affine_e2_writers", "none"), ("affine_e2_readers", "none"), ("lora_affine", "none"))
STARTS: tuple[Row, ...] = (("loftq_nf4", "none"), ("pissa_nf4", "none"), ("qblora_error_nf4", DEFAULT_POOLING))


CORE: tuple[tuple[str, str, float], ...] = (
    ("qalora", DEFAULT_POOLING, 1e-2),
    ("qablora_e2", DEFAULT_POOLING, 1e-2),
    ("lora_affine", "none", 3e-3),
    ("lora_affine", "none", 1e-2),
    ("qblora_affine", DEFAULT_POOLING, 3e-3),
    ("qblora_affine", "sum", 3e-3),
    ("qlora_nf4", "none", 3e-3),
    ("qblora_nf4", DEFAULT_POOLING, 3e-3),
)


def core_plan(seeds: tuple[int, ...] = (0, 1, 2)) -> Iterator[Job]:
    """Three seeds of the rows that the claims compare, each at the rate that its kind did best at in `pooling`."""
    for method, pooling, lr in CORE:
        for seed in seeds:
            routes = ("merged",) if METHODS[method].p == POOLED else DEPLOYMENTS.get(method, ())
            wanted = ("validation", "test", *(f"test/{route}" for route in routes))
            yield Cell("r8", method, pooling, lr, seed), wanted


def gptq_plan() -> Iterator[Job]:
    """The costly route, for the cells of `methods` that were judged on test."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if result["settings"]["method"] in DEPLOYMENTS and "test" in result["measures"]:
            yield Cell(**result["settings"]), ("test", "test/gptq")


def exam_plan(task: str) -> Iterator[Job]:
    """MMLU, which no cell trains on, by the cells of another task that compare the four methods."""
    asked = {method for method, _ in ROWS[:4]} | {"base_nf4", "base_affine"}
    for path in sorted(RESULTS.glob(f"{task}-*.json")):
        result = json.loads(path.read_text())
        cell = Cell(**result["settings"])
        if "test" in result["measures"] and cell.method in asked and (cell.r, cell.steps) == (Cell.r, Cell.steps):
            yield cell, ("test", "mmlu:test")


def first_step_plan() -> Iterator[Job]:
    """The theory of the pooling's scale against the model itself, one backward pass a cell."""
    return ((cell, ("first_step",)) for cell, _ in pooling_plan((0,), (1e-3,)))


PLANS: dict[str, Callable[[], Iterable[Job]]] = {
    "pooling": lambda: pooling_plan((0,), (1e-3, 3e-3, 1e-2)),
    "pooling_seeds": lambda: pooling_plan((1, 2), (1e-2, 3e-3), ("rms", "sum", "mean")),
    "first_step": first_step_plan,
    "half": lambda: pooling_plan((0,), (1e-2, 3e-3, 1e-3), ("half",)),
    "core": core_plan,
    "methods": lambda: methods_plan(ROWS, task="r8"),
    "gptq": gptq_plan,
    "groups64": lambda: methods_plan(ROWS[2:4], task="r8", group_size=64),
    "bits2": lambda: methods_plan(ROWS[:5], task="r8", bits=2),
    "long": lambda: methods_plan(ROWS[:4], task="r8", steps=240, pool=1920),
    "depth": lambda: methods_plan(ROWS[:4], rates=(1e-3, *RATES), task="r8", layers=30),
    "csqa": lambda: methods_plan(ROWS, task="csqa"),
    "csqa_factors": lambda: methods_plan(FACTORS, task="csqa"),
    "csqa_where": lambda: methods_plan(WHERE, task="csqa"),
    "csqa_rank2": lambda: methods_plan([*ROWS[:5], BY_RANK], task="csqa", r=2, lora_alpha=4),
    "rank2": lambda: methods_plan([*ROWS[:5], BY_RANK], task="r8", r=2, lora_alpha=4),
    "rank4": lambda: methods_plan(ROWS[2:4], task="r8", r=4, lora_alpha=8),
    "csqa_rank4": lambda: methods_plan(ROWS[2:4], task="csqa", r=4, lora_alpha=8),
    "rank1": lambda: methods_plan(ROWS[:4], task="r8", r=1, lora_alpha=2),
    "csqa_rank1": lambda: methods_plan(ROWS[:4], task="csqa", r=1, lora_alpha=2),
    "csqa_long": lambda: methods_plan(ROWS[:4], task="csqa", steps=240, pool=1920),
    "csqa_starts": lambda: methods_plan(STARTS, task="csqa"),
    "starts": lambda: methods_plan(STARTS, task="r8"),
    "csqa_pooling": lambda: pooling_plan((0, 1, 2), (3e-3, 1e-3, 1e-2), ("sum", "rms"), task="csqa"),
    "arc_easy": lambda: methods_plan(ROWS[:4], task="arc_easy"),
    "speeches": lambda: methods_plan(ROWS[:4], task="speeches"),
    "exam": lambda: exam_plan("csqa"),
}
QUICK = ("pooling", "pooling_seeds", "first_step", "core")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train and judge the cells of the quality benchmark.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true", help=f"the plans {', '.join(QUICK)}")
    what.add_argument("--full", action="store_true", help="every plan: hours")
    what.add_argument("--plan", choices=list(PLANS), action="append", help="one question; may be repeated")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    for plan in QUICK if chosen.quick else list(PLANS) if chosen.full else chosen.plan:
        for number, (cell, wanted) in enumerate(PLANS[plan](), start=1):
            say(f"[{plan} {number}] {cell.name}")
            run(cell, wanted, command=f"python -m integration.benchmarks.quality --plan {plan}")


if __name__ == "__main__":
    main()
