"""Train a cell, judge it, write its file.

AdamW (betas 0.9 and 0.999, no weight decay, gradients clipped at norm 1), the rate rising linearly over the first tenth
of the steps and falling linearly to zero, on mean cross-entropy of the answer tokens and the end token. What a cell's
file holds is not computed again, and an interrupted plan goes on where it stopped. Rows called merged are judged on the
packed model that `qbl_trl.merge` returns.
"""

import dataclasses
import json
import platform
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from integration.benchmarks import judging, tasks
from integration.benchmarks.cells import METHODS, Cell
from integration.benchmarks.deployment import deployed
from integration.benchmarks.models import adapted, split_of, task_, tokenizer_, trained_tensors
from integration.demo.packages import default_cache
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.wrapped import unwrap


def train_(model: nn.Module, cell: Cell, split: judging.Split, task: tasks.Task) -> tuple[list[float], float]:
    """Train in place. Returns the mean loss of every ten steps and the median seconds of a step."""
    tokenizer, generator = tokenizer_(), random.Random(cell.seed)
    items = task.train[: cell.pool]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cell.lr, weight_decay=0.0)
    warmup = max(1, cell.steps // 10)
    causal = unwrap(model)
    losses: list[float] = []
    seconds: list[float] = []
    order: list[int] = []
    model.train()
    for step in range(cell.steps):
        began = time.perf_counter()
        if len(order) < cell.batch:
            order = generator.sample(range(len(items)), len(items))
        batch, order = [items[i] for i in order[: cell.batch]], order[cell.batch :]
        queries = [judging.answer_query(tokenizer, i.prompt, i.choices[i.gold], end=task.ends) for i in batch]
        loss = -torch.cat(split.log_probs(causal, queries)).mean()
        rising, falling = (step + 1) / warmup, (cell.steps - step) / (cell.steps - warmup)
        optimizer.param_groups[0]["lr"] = cell.lr * min(rising, falling)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        say(f"  {step + 1}/{cell.steps} steps, loss {losses[-1]:.3f}, {seconds[-1]:.1f} s", end="\r")
    chunks = [losses[i : i + 10] for i in range(0, len(losses), 10)]
    return [round(sum(c) / len(c), 4) for c in chunks], sorted(seconds)[len(seconds) // 2]


def run(cell: Cell, wanted: tuple[str, ...] = ("validation",), command: str = "") -> dict[str, Any]:
    """The cell's result, computed as far as its file does not hold it.

    Args:
        wanted: measures, each a split ("validation", "test") judged by the trained model, SPLIT/ROUTE by what ROUTE
            (see `deployed`) makes of it, TASK:SPLIT for an exam in another task, or "first_step".
    """
    result = json.loads(cell.path.read_text()) if cell.path.is_file() else {}
    missing = [name for name in wanted if name not in result.get("measures", {})]
    if not missing:
        return result
    say(f"{cell.name}: {', '.join(missing)}")
    split, task = split_of(cell), task_(cell.task, cell.tokens)
    if METHODS[cell.method].adapter == "none":
        model = split.upper
        result = result or header(cell, command) | {"trainable_parameters": 0}
    else:
        model = adapted(cell, split.upper)
        saved = default_cache() / "benchmarks" / "adapters" / f"{cell.name}.safetensors"
        if result and saved.is_file():
            model.load_state_dict(load_file(saved), strict=False)
        else:
            losses, seconds = train_(model, cell, split, task)
            if result.get("losses") != losses:  # not the adapter that the file's measures were taken of
                missing = [*result.get("measures", {}), *missing]
                result = header(cell, command) | {
                    "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                    "seconds_per_step": round(seconds, 3),
                    "losses": losses,
                }
            saved.parent.mkdir(parents=True, exist_ok=True)
            save_file(trained_tensors(model), saved)
    for name in missing:
        if name == "first_step":
            result["measures"][name] = first_step(cell, split, task.train[:32])
            write(cell.path, result)
            continue
        rows, _, route = name.partition("/")
        asked, _, part = rows.rpartition(":")
        exam = task_(asked, cell.tokens) if asked else task
        where, judged = deployed(cell, model, route) if route else (split, unwrap(model))
        items = getattr(exam, part)[: cell.judged]
        found = judging.judge(where, judged, tokenizer_(), items, by_first_token=exam.by_first_token)
        measures = {key: round(value, 5) for key, value in found.measures.items()}
        result.setdefault("measures", {})[name] = measures
        write(cell.path, result)
        say(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in measures.items()))
    return result


def first_step(cell: Cell, split: judging.Split, items: list[tasks.Item]) -> dict[str, float]:
    """Before any training: what Adam's first step gains, to first order, and the size of what B is given.

        gain = rate * sum |dloss / dB|          (the step is the rate times the gradient's sign; A's gradient is zero)

    Returns:
        gradient_l1: sum |dloss / dB| over all layers. h_rms: root mean square of gain * A pool(x), over all layers.
    """
    model = adapted(cell, split.upper)
    sizes: list[Tensor] = []
    for layer in adapter_layers(model).values():
        layer.lora_B["default"].register_forward_pre_hook(lambda _, h: sizes.append(h[0].detach().square().mean()))
    queries = [judging.answer_query(tokenizer_(), i.prompt, i.choices[i.gold], end=True) for i in items]
    (-torch.cat(split.log_probs(unwrap(model), queries)).mean()).backward()
    gradients = [p.grad.abs().sum() for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None]
    return {
        "gradient_l1": round(float(torch.stack(gradients).sum()), 5),
        "h_rms": round(float(torch.stack(sizes).mean().sqrt()), 5),
    }


def header(cell: Cell, command: str) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "settings": dataclasses.asdict(cell),
        "command": command,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, CPU",
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted run must not leave half a cell behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def say(line: str, end: str = "\n") -> None:
    if end == "\n" or sys.stdout.isatty():
        print(line, end=end, flush=True)
