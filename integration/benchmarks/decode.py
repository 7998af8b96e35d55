"""Prefill and decode speed of exported folders, beside ONNX Runtime GenAI's builder, Optimum's fp32 export and torch.

    python -m integration.benchmarks.decode --genai_python /path/to/genai/env/bin/python

GenAI's builder needs transformers 5, so it runs in an environment of its own; without one its rows are left out. All
graphs of one loop are open at once and generate in turn, by a few steps each (turns.py); speeds are medians, and ratios
medians of the ratios within a round. Our graphs hold a merged adapter (one value per
block of 32 by 2 weights, as large as training makes them) and an int4 embedding and head, which GenAI's has too; `base`
is the same without the adapter: the difference is what it costs. llama.cpp runs SmolLM2 from its GGUF file, as
published and with a merged adapter (`qbl-trl convert --to gguf`); torch runs the float model and the packed one over
a cache. The results are written to integration/benchmarks/results/decode.json.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from integration.benchmarks.graphs import ADAPTER_STEPS, build, random_llama
from integration.benchmarks.loops import (
    bare_sessions,
    genai_loop,
    llama_loop,
    memory_bandwidth,
    optimum_loop,
    torch_loop,
)
from integration.benchmarks.turns import BLOCK, Row

RESULTS = Path(__file__).parent / "results" / "decode.json"


def make_parser() -> argparse.ArgumentParser:
    """What this benchmark can be told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model", type=Path, default=default_model(), help="float folder; see integration/demo/data.py"
    )
    parser.add_argument("--random", help="HIDDENxLAYERS of a Llama with random weights instead, such as 1024x16")
    parser.add_argument("--graphs", nargs="+", help="names of those to measure, the first of them GenAI's; all of them")
    parser.add_argument("--genai_python", help="interpreter with onnxruntime-genai and transformers 5")
    add_measuring(parser, Path("outputs/decode"), RESULTS)
    return parser


def add_measuring(parser: argparse.ArgumentParser, work: Path, output: Path) -> None:
    """Options of how it is measured, with where graphs and results go by default."""
    parser.add_argument("--work", type=Path, default=work, help="where graphs are kept between runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of ONNX Runtime and of torch")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128, help=f"tokens, in whole blocks of {BLOCK}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--machine", help="a name for this machine: its rows are kept beside those of others")
    parser.add_argument("--output", type=Path, default=output)


def main(args: argparse.Namespace) -> None:
    """Build what is missing, measure, print, write."""
    check(args)
    torch.set_num_threads(args.threads)
    if args.random:
        args.model = random_llama(args.random, args.work, args.model)
    source = args.model
    name = entry_name(source, args)
    seconds = known_seconds(args.output, name)
    folders = build(source, args.work / source.name, args.genai_python, seconds, args.graphs)
    if not folders:
        raise SystemExit(f"--graphs {' '.join(args.graphs)}: no graph of this comparison has such a name")
    bandwidth = memory_bandwidth(args.threads)
    rows: list[Row] = []
    for loop in (bare_sessions, optimum_loop, genai_loop, llama_loop, torch_loop):
        measured = loop(folders, args, bandwidth)
        print(table(measured), flush=True)
        rows += measured
        # After every loop: a runtime that dies takes no other's figures along.
        write(args.output, name, entry_of(source, args, bandwidth, seconds, rows))


def check(args: argparse.Namespace) -> None:
    """Refuse what would measure nothing."""
    if args.new < BLOCK or args.rounds < 1:
        raise SystemExit(f"--new {args.new} --rounds {args.rounds}: at least {BLOCK} tokens and one round")


def default_model() -> Path:
    """Where integration/demo/data.py puts SmolLM2."""
    cache = Path(os.environ.get("QBL_CACHE") or "~/.cache/qbl_trl").expanduser()
    return cache / "models/smollm2-135m-instruct"


def entry_name(source: Path, args: argparse.Namespace) -> str:
    """What the rows of one model are called among the results."""
    return f"{source.name} on {args.machine}" if args.machine else source.name


def entry_of(
    source: Path, args: argparse.Namespace, bandwidth: float, seconds: dict[str, float], rows: list[Row]
) -> dict[str, Any]:
    """What is written of one model."""
    return {
        "model": source.name,
        "machine": args.machine or platform.processor() or platform.machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[0],
        "bandwidth_gb_s": bandwidth / 1e9,
        "adapter_steps": ADAPTER_STEPS,
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
        "build_seconds": seconds,
        "rows": [asdict(row) for row in rows],
    }


def known_seconds(output: Path, name: str) -> dict[str, float]:
    """How long the graphs of an earlier run took to write: those that are kept are not written again."""
    return dict(read(output).get(name, {}).get("build_seconds", {}))


def read(output: Path) -> dict[str, Any]:
    """All models' entries."""
    return dict(json.loads(output.read_text())) if output.is_file() else {}


def write(output: Path, name: str, entry: dict[str, Any]) -> None:
    """Replace one model's entry."""
    known = read(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**known, name: entry}, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Text, with ratios to the first graph of each loop."""
    if not rows:
        return "(left out: not installed)"
    titles = ("loop", "graph", "MB", "prefill/s", "ratio", "decode/s", "ratio", "of RAM")
    lines = ["{:<20} {:<36} {:>7} {:>10} {:>6} {:>9} {:>6} {:>7}".format(*titles)]
    for row in rows:
        lines.append(
            f"{row.loop:<20} {row.graph:<36} {row.megabytes:>7.1f} {row.prefill:>10.1f} {row.prefill_ratio:>6.2f} "
            f"{row.decode:>9.1f} {row.decode_ratio:>6.2f} {row.bandwidth:>7.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(make_parser().parse_args())
