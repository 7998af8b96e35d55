"""The whole path on a real model, on two CPU cores: `python -m integration.demo` (or `make demo`).

SmolLM2-135M learns the eight topics of Reuters R8: quantize to 4 bits, measure, train with
`accelerate launch recipes/sft_qablora.py`, merge, export to ONNX, run in ONNX Runtime, measure again. Ends with one
table, `outputs/demo/demo.json` with the same numbers and `outputs/demo/demo.png`.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.demo.figure import draw
from integration.demo.judge import classify, logits_of
from integration.demo.packages import DemoDataError
from integration.demo.smollm2 import smollm2
from integration.demo.stories import R8_LABELS, reuters_r8, sample, sft_rows
from qbl_trl import GroupQuantConfig, export_onnx, verify
from qbl_trl.errors import ConfigError, said
from qbl_trl.folders import check_free

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "sft_qablora.py"
SINGLE = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu")
STORIES = 200
DECODE_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="a new or empty folder (default: outputs/demo, made anew)")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for torch and ONNX Runtime alike")
    args = parser.parse_args()
    output = args.output or ROOT / "outputs" / "demo"
    try:
        check_free(output, args.overwrite or args.output is None)
    except ConfigError as error:
        raise SystemExit(f"demo: {said(error)}") from error
    # torch and ONNX Runtime each start a pool; left alone, the two fight over the same cores.
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    try:
        folder, (_, test) = smollm2(), reuters_r8()
    except DemoDataError as error:
        raise SystemExit(f"demo: {error}") from error
    numbers = run(folder, sample(test, STORIES), output, args.threads)
    (output / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    draw(numbers, output / "demo.png")
    print(table(numbers))
    for name, what in (
        ("demo.json", "these numbers"),
        ("demo.png", "drawn"),
        ("merged", "the 4-bit model for torch"),
        ("onnx", "its graph"),
    ):
        print(f"{output / name}  {what}")
    print(f"qbl-trl report {output}  makes a page about the training")


def run(folder: Path, stories: list[dict[str, str]], output: Path, threads: int) -> dict[str, Any]:
    """Every stage in turn; what each took and what it measured."""
    started = time.time()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = sft_rows(stories, tokenizer)

    step("1/6  quantize to 4 bits and measure before training")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=GroupQuantConfig())
    before = classify(logits_of(base), tokenizer, rows)

    step("2/6  train: accelerate launch recipes/sft_qablora.py")
    shutil.rmtree(output, ignore_errors=True)
    train_started = time.time()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", *SINGLE, str(RECIPE)]
    launch += ["--config", str(ROOT / "recipes" / "configs" / "demo.yaml")]
    launch += ["--use_cpu", "true", "--output_dir", str(output)]
    if subprocess.run(launch, cwd=ROOT).returncode:
        raise SystemExit("demo: the training failed; why stands above")
    train_seconds = time.time() - train_started

    step("3/6  training model against merged model")
    trained = PeftModel.from_pretrained(base, str(output)).eval()
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    probe = tokenizer([row["prompt"] for row in rows[:16]], return_tensors="pt", padding=True, padding_side="right")
    merge_parity = verify(trained, merged, probe.input_ids, probe.attention_mask)
    after_torch = classify(logits_of(merged), tokenizer, rows)

    step("4/6  export to ONNX at 4 bits")
    export_started = time.time()
    report = export_onnx(output / "merged", output / "onnx", overwrite=True)
    export_seconds = time.time() - export_started

    step("5/6  measure in ONNX Runtime")
    deployed = ort_model(output / "onnx", threads)
    onnx_parity = verify(trained, deployed, probe.input_ids, probe.attention_mask)
    after_onnx = classify(logits_of(deployed), tokenizer, rows)

    step("6/6  decode speed beside an Optimum fp32 export of the same base")
    fp32 = fp32_export(folder, output / "fp32")
    prompt = tokenizer(rows[0]["prompt"], return_tensors="pt")
    speed = {
        "onnx_4bit": decode_speed(deployed, prompt),
        "optimum_fp32": decode_speed(ort_model(fp32, threads), prompt),
    }
    sizes = {"onnx_4bit": folder_bytes(output / "onnx"), "optimum_fp32": folder_bytes(fp32)}
    shutil.rmtree(fp32)

    return {
        "model": folder.name,
        "stories": len(rows),
        "before": {"accuracy": before.accuracy, "nll": before.nll},
        "merged_torch": {"accuracy": after_torch.accuracy, "nll": after_torch.nll},
        "onnx": {"accuracy": after_onnx.accuracy, "nll": after_onnx.nll},
        "always_earn": sum(row["completion"].strip() == "earn" for row in rows) / len(rows),
        "same_label": sum(a == b for a, b in zip(after_torch.predictions, after_onnx.predictions, strict=True)),
        "labels": list(R8_LABELS),
        "logit_difference": {"merged": merge_parity.max_abs_difference, "onnx": onnx_parity.max_abs_difference},
        "bytes": sizes,
        "decode_tokens_per_second": speed,
        "lowerings": report.lowerings(),
        "loss": [entry for entry in history(output) if "loss" in entry],
        "seconds": {"train": train_seconds, "export": export_seconds, "total": time.time() - started},
        "threads": threads,
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "command": "make demo",
    }


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def history(output: Path) -> list[dict[str, Any]]:
    """The trainer's log, as the callback's report keeps it."""
    report = json.loads((output / "qblora_report.json").read_text())
    entries: list[dict[str, Any]] = report["log_history"]
    return entries


def ort_model(folder: Path, threads: int) -> Any:
    """The graph in ONNX Runtime, with as many threads as torch has."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return ORTModelForCausalLM.from_pretrained(folder, session_options=options)


def fp32_export(folder: Path, output: Path) -> Path:
    """What Optimum alone makes of the float base."""
    from optimum.exporters.onnx import onnx_export_from_model

    model = AutoModelForCausalLM.from_pretrained(folder)
    onnx_export_from_model(model, output, task="text-generation-with-past", do_validation=False)
    return output


def decode_speed(model: Any, prompt: Any, runs: int = 3) -> float:
    """New tokens per second of greedy generation, prompt included; the median of a few runs."""
    settings = {"max_new_tokens": DECODE_TOKENS, "min_new_tokens": DECODE_TOKENS, "do_sample": False}
    model.generate(**prompt, **settings)
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        model.generate(**prompt, **settings)
        seconds.append(time.perf_counter() - start)
    return DECODE_TOKENS / sorted(seconds)[runs // 2]


def folder_bytes(folder: Path) -> int:
    """Bytes of the graph and its weights."""
    return sum(file.stat().st_size for file in folder.iterdir() if ".onnx" in file.name)


def table(n: dict[str, Any]) -> str:
    """The numbers a person wants, one to a line."""
    size, speed, difference = n["bytes"], n["decode_tokens_per_second"], n["logit_difference"]
    lines = [
        ("accuracy before training", f"{n['before']['accuracy']:.3f}", f"always 'earn': {n['always_earn']:.3f}"),
        ("accuracy, merged 4-bit torch", f"{n['merged_torch']['accuracy']:.3f}", f"{n['stories']} held-out stories"),
        ("accuracy, ONNX 4-bit", f"{n['onnx']['accuracy']:.3f}", f"same label: {n['same_label']}/{n['stories']}"),
        ("largest logit difference, merged", f"{difference['merged']:.1e}", "to the training model, fp32"),
        ("largest logit difference, ONNX", f"{difference['onnx']:.1e}", "to the training model, fp32"),
        ("graph and weights, 4-bit", f"{size['onnx_4bit'] / 1e6:.0f} MB", f"fp32: {size['optimum_fp32'] / 1e6:.0f} MB"),
        ("decode, 4-bit", f"{speed['onnx_4bit']:.1f} tok/s", f"fp32: {speed['optimum_fp32']:.1f} tok/s"),
        ("training", f"{n['seconds']['train']:.0f} s", f"all stages: {n['seconds']['total']:.0f} s"),
    ]
    width = max(len(name) for name, _, _ in lines)
    return "\n" + "\n".join(f"{name:<{width}}  {value:>10}   {note}" for name, value, note in lines)


if __name__ == "__main__":
    main()
