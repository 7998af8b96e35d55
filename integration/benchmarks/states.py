"""Prefill and decode speed of a decoder with a delta rule, Qwen 3.5 of random weights, beside GenAI's graph of it.

    python -m integration.benchmarks.states

As decode.py measures, with transformers 5: our graph holds a merged adapter, GenAI's the base, both an int4 embedding
and head and 8-bit activations; `base` is ours without the adapter. The results are written to results/states.json.
"""

import argparse
import sys
from pathlib import Path

import torch

from integration.benchmarks.decode import add_measuring, check, default_model, entry_name, entry_of, table, write
from integration.benchmarks.graphs import genai_build, once, ours, random_qwen
from integration.benchmarks.loops import bare_sessions, genai_loop, memory_bandwidth
from integration.benchmarks.turns import Row

RESULTS = Path(__file__).parent / "results" / "states.json"


def make_parser() -> argparse.ArgumentParser:
    """What this benchmark can be told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=default_model(), help="whose tokenizer the model gets")
    parser.add_argument("--random", default="1024x24", help="HIDDENxLAYERS")
    add_measuring(parser, Path("outputs/states"), RESULTS)
    return parser


def main(args: argparse.Namespace) -> None:
    """Build what is missing, measure, print, write."""
    check(args)
    torch.set_num_threads(args.threads)
    source, work = random_qwen(args.random, args.work, args.model), args.work / args.random
    folders: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    quick = {"accuracy_level": 4, "logits": "last"}
    last = "prune_lm_head=true"
    for name, make in {
        "genai int4, last logits": lambda out: genai_build(sys.executable, source, out, last),
        "ours, last logits": lambda out: ours(source, out, merged=True, **quick),
        "ours, float prompts, last logits": lambda out: ours(source, out, True, **quick, prompt_accuracy_level=0),
        "base, last logits": lambda out: ours(source, out, merged=False, **quick),
    }.items():
        once(work / name, make, folders, seconds)
    bandwidth, rows = memory_bandwidth(args.threads), list[Row]()
    for loop in (bare_sessions, genai_loop):
        measured = loop(folders, args, bandwidth)
        print(table(measured), flush=True)
        rows += measured
        write(args.output, entry_name(source, args), entry_of(source, args, bandwidth, seconds, rows))


if __name__ == "__main__":
    main(make_parser().parse_args())
