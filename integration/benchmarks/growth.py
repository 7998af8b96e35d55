"""How cost grows with width, depth, rank and sequence length: a log-log slope of each, LoRA and QA-BLoRA side by side.

    OMP_NUM_THREADS=2 python -m integration.benchmarks.growth

One point is a Llama of random weights over 4-bit groups of 32; along an axis one of its four numbers grows and the
others stay as in START. Every point and method runs in a process of its own, so that its peak is its own: a training
step (forward, backward, AdamW) as in train_step.py, and, where width or depth grow, merging and export and a decoding
step of the merged graph. A slope of 1 is linear growth, 2 quadratic. Written to results/growth.json.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import peft
import torch
import transformers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from integration.benchmarks.loops import head_size, session, step
from integration.benchmarks.train_step import SavedBytes, groups_, lora, stepper
from qbl_trl import QBLoRAConfig, export_onnx, merge

RESULTS = Path(__file__).parent / "results" / "growth.json"
_VOCABULARY, _BATCH = 256, 2


@dataclass(frozen=True)
class Point:
    """The four numbers whose growth is asked for; the feed-forward part is four times as wide."""

    width: int = 512
    depth: int = 4
    rank: int = 16
    length: int = 256


START = Point()
AXES = {
    "width": (256, 512, 1024, 2048),
    "depth": (2, 4, 8, 16),
    "rank": (8, 16, 32, 64),
    "length": (128, 256, 512, 1024),
}
EXPORTED = ("width", "depth")


def points() -> list[tuple[str, Point]]:
    """Every point with its axis; START belongs to each axis."""
    return [(axis, dataclasses.replace(START, **{axis: value})) for axis, values in AXES.items() for value in values]


def measure(point: Point, method: str, steps: int, export: bool) -> dict[str, float]:
    """Seconds, bytes and tokens per second of one point, in this process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=point.width,
        intermediate_size=4 * point.width,
        num_hidden_layers=point.depth,
        num_attention_heads=point.width // 64,
        num_key_value_heads=point.width // 64,
    )
    ours = QBLoRAConfig(r=point.rank, quantization_aware=True, out_factor=2)
    model = peft.get_peft_model(groups_(LlamaForCausalLM(config)), ours if method == "ours" else lora(point.rank))
    ids = torch.randint(0, _VOCABULARY, (_BATCH, point.length), generator=torch.Generator().manual_seed(0))
    peak = PeakMemory()
    counter = SavedBytes(model.train())
    with counter.hooks():
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    run = stepper(model, ids)
    run()
    found = {"step_seconds": median(run()[0] for _ in range(steps)), "saved_bytes": counter.total}
    found["step_peak_bytes"] = peak.above_start()
    if export:
        found |= exported(merge(model.eval()), steps)
    return found


def exported(merged: Any, steps: int) -> dict[str, float]:
    """What it costs to write and to run the merged graph."""
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        export_onnx(merged, Path(folder) / "out")
        found = {"export_seconds": time.perf_counter() - start, "export_peak_bytes": peak.above_start()}
        found["graph_bytes"] = sum(path.stat().st_size for path in (Path(folder) / "out").glob("model.onnx*"))
        opened = session(Path(folder) / "out", torch.get_num_threads())
        prompt = np.arange(128)[None] % _VOCABULARY
        _, cache = step(opened, prompt, 128, head_size(Path(folder) / "out"))
        seconds = []
        for length in range(129, 129 + 8 * steps):
            taken, cache = step(opened, prompt[:, :1], length, cache)
            seconds.append(taken)
    return found | {"decode_seconds": median(seconds)}


class PeakMemory:
    """The most memory held from here on, above what is held now. Linux: the kernel's own high-water mark, reset."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._start = self._read("VmRSS")

    @staticmethod
    def _read(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    def above_start(self) -> int:
        return self._read("VmHWM") - self._start


def main(args: argparse.Namespace) -> None:
    if args.point:
        point = Point(**json.loads(args.point))
        print(json.dumps(measure(point, args.method, args.steps, args.export)))
        return
    rows = []
    for axis, point in tqdm(points(), desc="growth"):
        for method in ("lora", "ours"):
            command = [sys.executable, "-m", __spec__.name, "--point", json.dumps(dataclasses.asdict(point))]
            command += ["--method", method, "--steps", str(args.steps)]
            command += ["--export"] if axis in EXPORTED and method == "ours" else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"axis": axis, "method": method, **dataclasses.asdict(point), **found})
    modules = (torch, transformers, peft, onnxruntime)
    report = {
        "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "steps": args.steps,
        "start": dataclasses.asdict(START),
        "rows": rows,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{args.output} written")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, of which the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    one = parser.add_argument_group("one point, in this process, printed as JSON")
    one.add_argument("--point", help='such as {"width": 1024}; what it leaves out is as in the start')
    one.add_argument("--method", choices=("lora", "ours"), default="ours")
    one.add_argument("--export", action="store_true", help="merge, export and decode too")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
