"""The speed and memory tables of RESULTS.md, from the JSON files that the other benchmarks wrote.

Every ratio is ours over the peer's in one run, except speeds of graphs, which are over ONNX Runtime GenAI's.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    """One benchmark's numbers; empty where it has not run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def table(titles: list[str], rows: list[list[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def training_step(found: dict[str, Any]) -> str:
    rows = [
        [row["shape"], row["system"], row["r"], f"{row['time_ratio_median']:.2f}", f"{row['saved_ratio_step']:.2f}"]
        for row in found["step"]
    ]
    layers = [[row["system"], row["r"], row["tokens"], f"{row['saved_ratio']:.3f}"] for row in found["layer_2048x2048"]]
    return (
        "## A training step, against PEFT's LoRA with as many parameters on the same base\n\n"
        f"`python -m integration.benchmarks.train_step`, {found['tokens']} tokens, {found['threads']} threads, "
        f"median of {found['pairs']} pairs.\n\n"
        + table(["layer shapes", "method", "r", "time", "bytes saved for backward, whole step"], rows)
        + "\nOne adapted linear layer of 2048 x 2048, bytes saved for backward:\n\n"
        + table(["method", "r", "tokens", "ratio"], layers)
    )


def base(found: dict[str, Any]) -> str:
    parts = [
        "## The 4-bit base\n",
        f"`python -m integration.benchmarks.base`, {found['environment']['threads']} threads.\n",
    ]
    sizes = [[name, f"{value:.4f}"] for name, value in found.get("bytes_per_weight", {}).items()]
    parts.append(table(["stored", "bytes per weight"], sizes))
    step = found.get("step_ms")
    if step:
        rows = [
            [name, values["float"], values["ours"], values["nf4"], values["ours / nf4"]]
            for name, values in step["layers"].items()
        ]
        parts.append(
            f"Forward and backward to x, {step['tokens']} tokens, median of {step['repeats']}, milliseconds:\n"
        )
        parts.append(table(["layer", "float32", "ours", "bitsandbytes NF4", "ours / NF4"], rows))
    losses = found.get("perplexity", {})
    rows = [
        [setting, name, value["perplexity"], value["share_won_back"], value["quantization_seconds"]]
        for setting, values in losses.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    if rows:
        parts.append(
            f"Perplexity on State of the Union addresses, {losses['tokens']} tokens; not quantized: "
            f"{losses['float']:.3f}. Won back: of what rtn loses, in nats.\n"
        )
        parts.append(table(["setting", "algorithm", "perplexity", "won back", "seconds to quantize"], rows))
    return "\n".join(parts)


DECODING = """## Graphs in ONNX Runtime

`python -m integration.benchmarks.decode`, speeds in tokens per second.

Where its weights come to lie in memory makes a session up to a tenth slower for as long as it lives: the graphs of a
loop are opened anew in every round, and generate side by side, 16 tokens of one, 16 of the next. Whole runs still
differ: others had 1.05, 1.17 and 0.98 for decoding where the first table has 1.06, 1.09 and 0.93 (the merged adapter
with float prompts and an int8 cache), 0.99, 0.98 and 0.88 on the AMD EPYC, and 0.93 to 1.10 for decoding and 1.19 to
1.49 for prompts on the Llama 1024 wide. The longer the text, the better (`--prompt 1500`): a growing cache is copied at
every step. Our int4 head is rounded to what it reads, in groups of 64 (a KL of 0.07 on news), GenAI's to nearest in
groups of 32 (0.18).
"""


def decoding(found: dict[str, Any]) -> str:
    return "\n".join([DECODING, *loops(found)])


def recurrent(found: dict[str, Any]) -> str:
    return "\n".join(
        ["## Layers that keep states\n", "`python -m integration.benchmarks.states`, as above.\n", *loops(found)]
    )


def loops(found: dict[str, Any]) -> list[str]:
    """What was measured and a table, for each model."""
    parts = []
    for name, entry in found.items():
        rows = [
            [
                row["loop"],
                row["graph"],
                f"{row['megabytes']:.1f}",
                *(f"{row[key]:.0f} ({row[key + '_ratio']:.2f})" for key in ("prefill", "decode")),
                f"{row['bandwidth']:.0%}",
            ]
            for row in entry["rows"]
        ]
        seconds = ", ".join(f"{graph} {taken:.0f} s" for graph, taken in entry["build_seconds"].items())
        built = f" Written in: {seconds}." if seconds else ""
        parts.append(
            f"{name}, {entry['threads']} threads, ONNX Runtime {entry['versions']['onnxruntime']}; in brackets the "
            f"ratio to the first graph of the loop ({_how(entry)}); the last column is the share of the "
            f"{entry['bandwidth_gb_s']:.0f} GB/s that this machine reads. The adapter's shifts are "
            f"{entry['adapter_steps']:.2f} of a step of the codes.{built}\n"
        )
        parts.append(table(["loop", "graph", "MB", "prefill", "decode", "of memory bandwidth"], rows))
    return parts


def _how(entry: dict[str, Any]) -> str:
    """How an entry's graphs took turns; older entries do not say in how many."""
    rounds = entry.get("rounds")
    return f"median over {rounds} rounds, side by side" if rounds else "median over whole generations in turn"


def callback(found: dict[str, Any]) -> str:
    return (
        "## The callback\n\n"
        f"`python -m integration.benchmarks.callback_overhead`: {found['overhead']:.2%} of a training step, logging "
        f"every {found['logging_steps']} steps; the probe before the first step {found['probe_seconds']:.1f} s, "
        f"merging and verifying at the end {found['merge_and_verify_seconds']:.1f} s "
        f"({found['blocks']} layers of SmolLM2-135M).\n"
    )


GROWING = {
    "step_seconds": "seconds of a training step",
    "step_peak_bytes": "peak memory of a step, above the model",
    "saved_bytes": "bytes saved for backward",
    "export_seconds": "seconds to export",
    "export_peak_bytes": "peak memory of the export, above the model",
    "graph_bytes": "bytes of the graph",
    "decode_seconds": "seconds of a decoding step",
}


def growth(found: dict[str, Any]) -> str:
    """Log-log slopes along each axis, with the values at both ends."""
    rows = []
    for axis in dict.fromkeys(row["axis"] for row in found["rows"]):
        for measure, words in GROWING.items():
            line = [axis, words]
            for method in ("lora", "ours"):
                points = [row for row in found["rows"] if (row["axis"], row["method"]) == (axis, method)]
                points = [row for row in points if measure in row]
                if not points:
                    line.append("")
                    continue
                values = [row[measure] for row in points]
                ends = f"{points[0][axis]}: {short(values[0])}, {points[-1][axis]}: {short(values[-1])}"
                line.append(f"**{slope([row[axis] for row in points], values):.2f}** ({ends})")
            if any(line[2:]):
                rows.append(line)
    start = ", ".join(f"{key} {value}" for key, value in found["start"].items())
    return (
        "## How cost grows\n\n"
        f"`python -m integration.benchmarks.growth`, {found['threads']} threads, medians of {found['steps']}. A Llama "
        f"of random weights over 4-bit groups of 32; each axis starts from {start}. In bold the slope of the "
        "logarithms (1: linear, 2: quadratic), in brackets the value at both ends.\n\n"
        + table(["axis", "cost", "LoRA", "QA-BLoRA"], rows)
    )


def short(value: float) -> str:
    """Bytes as MB, seconds as ms."""
    return f"{value / 1e6:.1f} MB" if value > 1e4 else f"{value * 1e3:.1f} ms"


def slope(xs: list[float], ys: list[float]) -> float:
    """Least squares of log y on log x."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def render() -> str:
    """Every table whose benchmark has run."""
    makers = {
        "train_step": training_step,
        "base": base,
        "decode": decoding,
        "states": recurrent,
        "callback_overhead": callback,
        "growth": growth,
    }
    return "\n".join(make(found) for name, make in makers.items() if (found := load(name)))
