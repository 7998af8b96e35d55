"""results/*.json -> RESULTS.md. Every number in the file comes from a cell; nothing is typed in by hand.

python -m integration.benchmarks.render_results
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from integration.benchmarks import render_speed
from integration.benchmarks.blocks import Block, Result, Row, blocks, is_base, load, spread, table, title, values
from integration.benchmarks.cells import METHODS, RESULTS, Cell
from integration.benchmarks.claims import CLAIMS, claims_table
from integration.benchmarks.dot_plot import dot_plot

OUTPUT = Path(__file__).parent / "RESULTS.md"
PLOTS = RESULTS.parent / "plots"
OURS, PEER, DEPLOYED = "#2b6cb0", "#7b8794", "#c05621"


def describe(conditions: dict[str, Any]) -> str:
    c = conditions
    length = f"stories of {c['tokens']} tokens, " if c["task"] == "r8" else ""
    rank = f"rank {c['r']}, " if c["r"] != Cell.r else ""
    return (
        f"{c['task']}: {c['steps']} steps of {c['batch']}, {length}{rank}"
        f"adapters on the upper {c['layers']} of 30 layers, "
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
    examined = bool(values(block.results, "mmlu:test", "accuracy"))
    for row in block.rows():
        found = block.of(row, None if is_base(block.of(row)[0]) else block.tested_rate(row))
        if values(found, "test", "nll"):
            rows.append(
                [
                    title(row),
                    f"{found[0]['trainable_parameters']:,}",
                    "" if is_base(found[0]) else f"{found[0]['settings']['lr']:g}",
                    *[spread(values(found, "test", key)) for key in measured(block)],
                    *[spread(values(found, "mmlu:test", "accuracy"))] * examined,
                ]
            )
    header = ["on the test split", "trained parameters", "rate", *measured(block).values()]
    header += ["MMLU accuracy, untouched"] * examined
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
                    *[spread(values(found, route, key)) for key in measured(block)],
                ]
            )
    return table(["deployed at the affine base's bits", "route", *measured(block).values()], rows) if rows else ""


def measured(block: Block) -> dict[str, str]:
    """What the block's task is judged by: key and title."""
    titles = {"nll": "NLL", "accuracy": "accuracy", "macro_recall": "macro recall", "perplexity": "perplexity"}
    return {key: title for key, title in titles.items() if any(values(block.results, "test", key))}


def plot(block: Block) -> tuple[str, str]:
    """Name and text of the block's picture: the test NLL of every row, trained and deployed; no text if none is."""
    rows = []
    for row in block.rows():
        if is_base(block.of(row)[0]):
            continue
        found = block.of(row, block.tested_rate(row))
        colour = OURS if "blora" in row[0] else PEER
        rows.append((title(row), colour, values(found, "test", "nll")))
        for route in sorted({name for r in found for name in r["measures"] if name.startswith("test/")}):
            at = f"{title(row)}, {route.removeprefix('test/')}"
            rows.append((at, DEPLOYED, values(found, route, "nll")))
    c = block.conditions
    special = [
        f"{key}{c[key]}" for key in ("r", "steps", "layers", "bits", "group_size") if c[key] != getattr(Cell, key)
    ]
    name = "-".join([c["task"], *special]) + ".svg"
    if not any(measured for _, _, measured in rows):
        return name, ""
    return name, dot_plot(
        describe(c).partition(", adapters")[0], "NLL of the right answer on the test split, nats", rows
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


# ---- the file

INTRODUCTION = """# What the methods reach at equal trainable parameters, and what they cost

Generated by `python -m integration.benchmarks.render_results` from `results/*.json`; every number of quality is a cell
that `python -m integration.benchmarks.quality` trained and judged, and can train again.

- **Model**: SmolLM2-135M-Instruct. Its published weights are already rounded to 4 bits (Q4_1, groups of 32), so the
  float32 base is no full-precision baseline.
- **Adapters**: on every linear layer of the upper layers named in each title; the layers below are frozen, and what
  they make of a text is computed once. Parameters are those of a LoRA of rank 8, alpha 16 (QA-HiRA has no rank: its
  count is given), unless a title names another rank. The same code trains every method; LoRA is p = e = 1.
- **Training**: AdamW, rate rising over a tenth of the steps and falling to zero, no weight decay, gradients clipped at
  1, cross-entropy of the answer and the end token, float32. 4-bit bases are held as the float32 values their codes
  stand for; rows called *merged* are judged on the packed 4-bit model that `qbl_trl.merge` returns.
- **Numbers**: mean ± standard deviation (number of seeds). A seed sets A's start and the order of the training rows,
  not which rows; the judged rows are the same for all. NLL is that of the right answer over the whole vocabulary, in
  nats. The rate is chosen on validation rows; in bold, the best among the rates with the most seeds
  (test tables: among those judged on test). "First step": what
  Adam's first step gains, sum |dloss/dB|, against LoRA's; A moves from the second step on, and "A's share" is how far
  a step of A moves A pool(x), against LoRA's.
- **Plots**: a dot for each seed, a stroke at the mean; grey for methods that share no outputs or are not ours, blue for
  balanced adapters, orange for what is deployed at 4 bits.
- **Verdicts** need three seeds that agree; they hold for this model, task and length of training, and no further.
"""

NOT_RUN = """## Not run

- Other models; all 30 layers wherever a title says fewer; training until nothing improves. Few steps favour what
  learns fast: the order of methods may change with longer training.
- Groups of 128 with a pooled input: SmolLM2's width of 576 is no multiple of 128.
- Tasks, bits, groups and lengths that no title above names: their loaders and plans are there (`--full`), the hours
  were not.
- IR-QLoRA, which PEFT does not offer; PEFT's own QA-LoRA, which takes GPTQ layers only.
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
        name, picture = plot(block)
        if picture:
            parts.append(f"![{describe(block.conditions)}](results/{PLOTS.name}/{name})\n")
    parts += [machine(results), NOT_RUN + unmeasured(blocks(results)), render_speed.render()]
    return "\n".join(parts)


def plots(results: list[Result]) -> dict[Path, str]:
    """Every picture of the file by its path."""
    drawn = (plot(block) for block in blocks(results))
    return {PLOTS / name: picture for name, picture in drawn if picture}


def main() -> None:
    OUTPUT.write_text(render(load()))
    PLOTS.mkdir(exist_ok=True)
    for path, picture in plots(load()).items():
        path.write_text(picture)
    print(f"{OUTPUT} and {PLOTS} written")


if __name__ == "__main__":
    main()
