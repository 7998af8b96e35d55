"""results/*.json -> RESULTS.md. Every number in the file comes from a cell; nothing is typed in by hand.

    python -m integration.benchmarks.render_results

A block is all that was measured under one set of conditions (task, depth, steps, base). Inside it a row is a method
with its pooling; its rate is the one with the lowest mean validation NLL, and only then is its test split looked at.
Comparisons are paired by seed: the same seed means the same questions in the same order.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from integration.benchmarks import render_speed
from integration.benchmarks.cells import METHODS, RESULTS

OUTPUT = Path(__file__).parent / "RESULTS.md"
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
    "lora_affine": "LoRA, affine base",
    "qblora_affine": "Q-BLoRA p=e=2, affine base",
    "qalora": "QA-LoRA p=g, e=1",
    "qablora_e2": "QA-BLoRA p=g, e=2",
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


def describe(conditions: dict[str, Any]) -> str:
    c = conditions
    length = f"stories of {c['tokens']} tokens, " if c["task"] == "r8" else ""
    return (
        f"{c['task']}: {c['steps']} steps of {c['batch']}, {length}adapters on the upper {c['layers']} of 30 layers, "
        f"{c['bits']}-bit groups of {c['group_size']} ({c['algorithm']})"
    )


def rates_table(block: Block) -> str:
    rates = block.rates()
    rows = []
    for row in block.rows():
        if not is_base(block.of(row)[0]):
            cells = [spread(values(block.of(row, lr), "validation", "nll")) for lr in rates]
            best = block.best_rate(row)
            rows.append([title(row), *[f"**{c}**" if lr == best else c for lr, c in zip(rates, cells, strict=True)]])
    return table(["validation NLL at rate", *[f"{lr:g}" for lr in rates]], rows)


def test_table(block: Block) -> str:
    rows = []
    for row in block.rows():
        found = block.of(row, None if is_base(block.of(row)[0]) else block.tested_rate(row))
        if values(found, "test", "nll"):
            rows.append(
                [
                    title(row),
                    f"{found[0]['trainable_parameters']:,}",
                    "" if is_base(found[0]) else f"{found[0]['settings']['lr']:g}",
                    *[spread(values(found, "test", key)) for key in ("nll", "accuracy", "macro_recall")],
                ]
            )
    header = ["on the test split", "trained parameters", "rate", "NLL", "accuracy", "macro recall"]
    return table(header, rows) if rows else ""


def deployed_table(block: Block) -> str:
    rows = []
    for row in block.rows():
        if is_base(block.of(row)[0]):
            continue
        found = block.of(row, block.tested_rate(row))
        routes = sorted({name for r in found for name in r["measures"] if name.startswith("test/")})
        for route in routes:
            rows.append(
                [
                    title(row),
                    route.removeprefix("test/"),
                    *[spread(values(found, route, key)) for key in ("nll", "accuracy", "macro_recall")],
                ]
            )
    return (
        table(["deployed at the affine base's bits", "route", "NLL", "accuracy", "macro recall"], rows) if rows else ""
    )


PLAIN: Row = ("lora_affine", "none")


def transfer_table(block: Block) -> str:
    """Each pooling at its own best rate, and how far theory and the model itself say that one step takes it."""
    pooled = [row for row in block.rows() if row[0] in ("qblora_affine", "qablora_e2") and row[1] != "none"]
    first = {
        row: [r["measures"]["first_step"] for r in block.of(row) if "first_step" in r["measures"]]
        for row in block.rows()
    }
    if PLAIN not in block.rows() or not pooled or not first[PLAIN]:
        return ""
    rows = []
    for row in [PLAIN, *pooled]:
        best = block.best_rate(row)
        own = f"{spread(values(block.of(row, best), 'validation', 'nll'))} at {best:g}"
        through_b, through_a = progress_ratios(row)
        measured = [
            f"{first[row][0][key] / first[PLAIN][0][key]:.2f}" if first[row] else "" for key in ("gradient_l1", "h_rms")
        ]
        rows.append([title(row), own, f"{through_b:.2f}", measured[0], measured[1], f"{through_a:.2f}"])
    header = ["against LoRA at the same rate", "validation NLL at its own best rate"]
    header += ["first step, theory", "first step, measured", "size of A pool(x), measured", "A's share, theory"]
    return table(header, rows)


def excess_table(block: Block) -> str:
    """How far each pooling stays behind plain LoRA at the same rate: mean difference by method and rate."""
    pooled = [row for row in block.rows() if row[0] in ("qblora_affine", "qablora_e2") and row[1] != "none"]
    if PLAIN not in block.rows() or not pooled:
        return ""
    rates = block.rates()
    columns = [(method, lr) for method in ("qblora_affine", "qablora_e2") for lr in rates]
    found: dict[str, list[float | None]] = {}
    for pooling in sorted({row[1] for row in pooled}):
        found[pooling] = [paired(block, (method, pooling), PLAIN, lr) for method, lr in columns]
    worst = {pooling: max(d for d in differences if d is not None) for pooling, differences in found.items()}
    rows = [
        [pooling, *["" if d is None else f"{d:+.2f}" for d in found[pooling]], f"{worst[pooling]:+.2f}"]
        for pooling in sorted(found, key=lambda pooling: worst[pooling])
    ]
    header = [f"{'Q-BLoRA' if method == 'qblora_affine' else 'QA-BLoRA'} at {lr:g}" for method, lr in columns]
    caption = (
        "Validation NLL against LoRA's at the same rate, over the seeds that both have, see above (negative: better). "
        f"The smallest worst case: **{rows[0][0]}**."
    )
    return caption + "\n\n" + table(["pooling", *header, "worst"], rows)


def paired(block: Block, ours: Row, theirs: Row, lr: float) -> float | None:
    """Mean difference in validation NLL over the seeds that both rows have at this rate."""
    sides = [
        {r["settings"]["seed"]: r["measures"]["validation"]["nll"] for r in block.of(row, lr)} for row in (ours, theirs)
    ]
    differences = [sides[0][seed] - sides[1][seed] for seed in sides[0].keys() & sides[1].keys()]
    return mean(differences) if differences else None


def progress_ratios(row: Row) -> tuple[float, float]:
    """How far one Adam step moves the output, against LoRA's at the same rate, through B and through A.

        B: (R / r) e^-1/2 s sqrt(p)     A: s / sqrt(p)      with s = c; see cells.py for "tied" and "half"

    c is the pooling's factor on the sum, 1/p, 1/sqrt(p) or 1. For a square layer and uncorrelated inputs: A pool(x) has
    c sqrt(p) times LoRA's size; an entry of A moves by the rate whatever p is, and a row of A has only K/p of them.
    """
    if row == PLAIN:
        return 1.0, 1.0
    p, e = (2 if METHODS[row[0]].p == 2 else 32), METHODS[row[0]].e
    rank = 2 / (1 / p + 1 / e)
    powers = {"mean": (-1.0, -1.0), "rms": (-0.5, -0.5), "half": (-0.5, -0.25), "tied": (-0.5, 0.0), "sum": (0.0, 0.0)}
    through_b, through_a = (p**power for power in powers[row[1]])
    return rank * e**-0.5 * through_b * p**0.5, through_a * p**-0.5


# ---- comparisons

MERGED, TRAINED = "test/merged", "test"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`ours` has a lower test NLL than `theirs`, each at its own best rate; a side is (method, measure)."""

    text: str
    ours: tuple[str, str]
    theirs: tuple[str, str]


CLAIMS = (
    Claim("Q-BLoRA is better than QLoRA (NF4)", ("qblora_nf4", TRAINED), ("qlora_nf4", TRAINED)),
    Claim("Q-BLoRA is better than LoRA (affine base)", ("qblora_affine", TRAINED), ("lora_affine", TRAINED)),
    Claim("QA-BLoRA (e=2) is better than QA-LoRA", ("qablora_e2", TRAINED), ("qalora", TRAINED)),
    Claim("QA-BLoRA (e=4) is better than QA-LoRA", ("qablora_e4", TRAINED), ("qalora", TRAINED)),
    Claim("QA-BLoRA (e=2) is better than QLoRA", ("qablora_e2", TRAINED), ("qlora_nf4", TRAINED)),
    Claim("QA-BLoRA (e=2) is better than QA-HiRA (e=2)", ("qablora_e2", TRAINED), ("qahira_e2", TRAINED)),
    Claim("merging QA-BLoRA loses nothing", ("qablora_e2", MERGED), ("qablora_e2", TRAINED)),
    Claim("merged QA-BLoRA is better than QLoRA, rtn", ("qablora_e2", MERGED), ("qlora_nf4", "test/rtn")),
    Claim(
        "merged QA-BLoRA is better than LoRA on the affine base, rtn",
        ("qablora_e2", MERGED),
        ("lora_affine", "test/rtn"),
    ),
    Claim(
        "merged QA-BLoRA is better than QLoRA on float, rtn", ("qablora_e2", MERGED), ("qlora_nf4", "test/float+rtn")
    ),
    Claim("merged QA-BLoRA is better than QLoRA, gptq", ("qablora_e2", MERGED), ("qlora_nf4", "test/gptq")),
    Claim("merged QA-BLoRA is better than LoRA on float, rtn", ("qablora_e2", MERGED), ("lora_float", "test/rtn")),
    Claim("merged QA-BLoRA is better than LoRA on float, gptq", ("qablora_e2", MERGED), ("lora_float", "test/gptq")),
)


def claims_table(block: Block) -> str:
    rows = []
    for claim in CLAIMS:
        for ours in (row for row in block.rows() if row[0] == claim.ours[0]):
            theirs = next((r for r in block.rows() if r[0] == claim.theirs[0] and r[1] in ("none", ours[1])), None)
            if theirs is None:
                continue
            sides = [
                {
                    r["settings"]["seed"]: r["measures"][m]["nll"]
                    for r in block.of(s, block.tested_rate(s))
                    if m in r["measures"]
                }
                for s, m in ((ours, claim.ours[1]), (theirs, claim.theirs[1]))
            ]
            differences = [sides[0][seed] - sides[1][seed] for seed in sorted(sides[0].keys() & sides[1].keys())]
            if differences:
                rows.append([claim.text, ours[1], spread(differences), verdict(claim, differences)])
    return table(["claim", "pooling", "difference in test NLL, paired by seed", "verdict"], rows) if rows else ""


def verdict(claim: Claim, differences: list[float]) -> str:
    """Decided by at least three seeds that agree; by nothing less."""
    if claim.ours[0] == claim.theirs[0]:
        return "holds" if max(map(abs, differences)) < 1e-3 else "does not hold"
    if len(differences) < 3 or min(differences) < 0 < max(differences):
        return "undecided"
    return "holds" if max(differences) < 0 else "does not hold: the other is better"


# ---- the file

INTRODUCTION = """# What the methods reach at equal trainable parameters, and what they cost

Generated by `python -m integration.benchmarks.render_results` from `results/*.json`; every number of quality is a cell
that `python -m integration.benchmarks.quality` trained and judged, and can train again.

- **Model**: SmolLM2-135M-Instruct. Its published weights are already rounded to 4 bits (Q4_1, groups of 32), so the
  float32 base is no full-precision baseline.
- **Adapters**: on every linear layer of the upper layers named in each title; the layers below are frozen, and what
  they make of a text is computed once. Parameters are those of a LoRA of rank 8, alpha 16 (QA-HiRA has no rank: its
  count is given). The same code trains every method; LoRA is p = e = 1.
- **Training**: AdamW, rate rising over a tenth of the steps and falling to zero, no weight decay, gradients clipped at
  1, cross-entropy of the answer and the end token, float32. 4-bit bases are held as the float32 values their codes
  stand for; rows called *merged* are judged on the packed 4-bit model that `qbl_trl.merge` returns.
- **Numbers**: mean ± standard deviation (number of seeds). A seed sets A's start and the order of the training rows,
  not which rows; the judged rows are the same for all. NLL is that of the right answer over the whole vocabulary, in
  nats. The rate is chosen on validation rows; in bold, the best among the rates with the most seeds
  (test tables: among those judged on test). "First step": what
  Adam's first step gains, sum |dloss/dB|, against LoRA's; A moves from the second step on, and "A's share" is how far
  a step of A moves A pool(x), against LoRA's.
- **Verdicts** need three seeds that agree; they hold for this model, task and length of training, and no further.
"""

NOT_RUN = """## Not run

- Other models; all 30 layers wherever a title says fewer; training until nothing improves. Few steps favour what
  learns fast: the order of methods may change with longer training.
- Groups of 128 with a pooled input: SmolLM2's width of 576 is no multiple of 128.
- CommonsenseQA, ARC-Easy, the MMLU exam and groups of 64 or 2 bits, unless a title above names them: their loaders and
  plans are there (`--full`), the hours were not.
- IR-QLoRA, LoftQ and PiSSA; PEFT's own QA-LoRA (GPTQ layers only); perplexity after training.
- 4-bit NF4 kernels: the NF4 base is held as the values bitsandbytes dequantizes it to.
"""


def unmeasured(found: list[Block]) -> str:
    """The claims that no block has the numbers for."""
    tables = [claims_table(block) for block in found]
    open_claims = [claim.text for claim in CLAIMS if not any(f"| {claim.text} |" in text for text in tables)]
    return "".join(f"- Not measured yet: {text}.\n" for text in open_claims)


def machine(results: list[Result]) -> str:
    found = sorted({json.dumps([r["versions"], r["threads"], r["machine"]], sort_keys=True) for r in results})
    lines = []
    for one in found:
        versions, threads, name = json.loads(one)
        packages = ", ".join(f"{package} {number}" for package, number in versions.items())
        lines.append(f"- {name}, {threads} thread{'s' if threads > 1 else ''}, beside other work; {packages}")
    commands = sorted({r["command"] for r in results})
    lines += [f"- `{command}`" for command in commands]
    return "## How it was run\n\n" + "\n".join(lines) + "\n"


def render(results: list[Result]) -> str:
    parts = [INTRODUCTION]
    for block in blocks(results):
        tables = [rates_table, excess_table, transfer_table, test_table, deployed_table, claims_table]
        parts.append(f"## {describe(block.conditions)}\n")
        parts += [text + "\n" for make in tables if (text := make(block))]
    parts += [machine(results), NOT_RUN + unmeasured(blocks(results)), render_speed.render()]
    return "\n".join(parts)


def main() -> None:
    OUTPUT.write_text(render(load()))
    print(f"{OUTPUT} written")


if __name__ == "__main__":
    main()
