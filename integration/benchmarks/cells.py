"""Train each method under the same conditions and judge it: one cell = (task, method, settings, rate, seed).

A cell trains adapters with AdamW (betas 0.9 and 0.999, no weight decay, gradients clipped at norm 1), the rate rising
linearly over the first tenth of the steps and falling linearly to zero, on mean cross-entropy of the answer tokens
and the end token. The seed sets A's start and the order of the questions; the same seed means the same questions for
every method. A cell is one JSON file named by its settings; what is there is not computed again, and an interrupted
plan goes on where it stopped.

All methods train with the same code (LoRA is QBLoRAConfig with p = e = 1). A 4-bit base is held as the float32 values
its codes stand for, to spare decoding them twice a step: the same function, and rows called merged are judged on the
packed model that `qbl_trl.merge` returns. Only the upper layers are adapted; what the lower ones make of a text is
computed once (tasks.Split).

| method | base | p | e | trained |
| --- | --- | --- | --- | --- |
| lora_float | float32 | 1 | 1 | A, B |
| qlora_nf4, qblora_nf4 | NF4, blocks of 64, double quantization (bitsandbytes) | 1, 2 | 1, 2 | A, B |
| loftq_nf4, qblora_error_nf4 | NF4, the adapter started at its error (one iteration of LoftQ) | 1, 2 | 1, 2 | A, B |
| pissa_nf4 | NF4 of what the largest singular vectors leave (PEFT's PiSSA) | 1 | 1 | A, B |
| lora_affine, qblora_affine | affine groups of g | 1, 2 | 1, 2 | A, B |
| affine_p2e1, affine_p1e2 | affine groups of g | 2, 1 | 1, 2 | A, B |
| affine_e2_writers, affine_e2_readers | affine groups of g | 1 | 2 on some layers, else 1 | A, B |
| qalora, qablora_e2, qablora_e4 | affine groups of g | g | 1, 2, 4 | A, B |
| qablora | affine groups of g | g | QBLoRAConfig's default: 2 up to half of full rank, else 1 | A, B |
| qahira_e1, qahira_e2 | affine groups of g | g | 1, 2 | D |

Two poolings are none of the package's: "tied" is the sum with A started as a plain LoRA's A would be (bound 1/sqrt(K),
not sqrt(p/K)), "half" lies half way to it from "rms". Both give B inputs of the variance that "rms" gives it; A learns
faster than under "rms", sqrt(p) times under "tied" and p^(1/4) times under "half".
"""

import copy
import dataclasses
import hashlib
import json
import platform
import random
import re
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from integration.benchmarks import tasks
from integration.demo.data import default_cache, smollm2
from qbl_trl.adapter.balance import default_out_factor
from qbl_trl.adapter.initialize import initialize_from_error_
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.config import POOLINGS as POOLINGS_OF_CONFIG
from qbl_trl.config import GroupQuantConfig, QBLoRAConfig
from qbl_trl.merging import merge, unwrap
from qbl_trl.quant.gptq import gptq_model_
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.targets import target_layers

RESULTS = Path(__file__).parent / "results" / "quality"
CALIBRATION = 128  # training prompts
POOLED = "g"  # in METHODS: p is the quantization group
BY_RANK = "by rank"  # in METHODS: e is what QBLoRAConfig chooses for a quantization-aware layer


@dataclass(frozen=True)
class Method:
    """What is trained, on what.

    Attributes:
        base: "float", "nf4" or "affine".
        p, e: the factors; p may be POOLED, e may be BY_RANK.
        start: "" (B = 0), "error" (LoftQ's) or "pissa".
        shared: regular expression, the layers whose outputs share; e is 1 elsewhere.
    """

    base: str
    p: int | str
    e: int | str
    adapter: str = "low_rank"
    start: str = ""
    shared: str = ".*"


READERS = r".*\.(q_proj|k_proj|v_proj|gate_proj|up_proj)"  # of the residual stream
WRITERS = r".*\.(o_proj|down_proj)"  # into it
METHODS = {
    "base_float": Method("float", 1, 1, "none"),
    "base_nf4": Method("nf4", 1, 1, "none"),
    "base_affine": Method("affine", 1, 1, "none"),
    "lora_float": Method("float", 1, 1),
    "qlora_nf4": Method("nf4", 1, 1),
    "qblora_nf4": Method("nf4", 2, 2),
    "loftq_nf4": Method("nf4", 1, 1, start="error"),
    "qblora_error_nf4": Method("nf4", 2, 2, start="error"),
    "pissa_nf4": Method("nf4", 1, 1, start="pissa"),
    "lora_affine": Method("affine", 1, 1),
    "affine_p2e1": Method("affine", 2, 1),
    "affine_p1e2": Method("affine", 1, 2),
    "qblora_affine": Method("affine", 2, 2),
    "affine_e2_writers": Method("affine", 1, 2, shared=WRITERS),
    "affine_e2_readers": Method("affine", 1, 2, shared=READERS),
    "qalora": Method("affine", POOLED, 1),
    "qablora_e2": Method("affine", POOLED, 2),
    "qablora": Method("affine", POOLED, BY_RANK),
    "qablora_e4": Method("affine", POOLED, 4),
    "qahira_e1": Method("affine", POOLED, 1, "block"),
    "qahira_e2": Method("affine", POOLED, 2, "block"),
}


@dataclass(frozen=True)
class Cell:
    """Everything that decides a cell's numbers.

    Attributes:
        pooling: "none" where p = 1: there is nothing to pool.
        tokens: bound on the length of a story.
        bits, group_size, algorithm: the affine base's.
        layers: how many of the model's layers, from the top, are adapted.
        pool: training rows; the seed sets their order.
        judged: rows of a split that are judged.
    """

    task: str
    method: str
    pooling: str = "none"
    lr: float = 1e-3
    seed: int = 0
    r: int = 8
    lora_alpha: int = 16
    steps: int = 60
    batch: int = 8
    tokens: int = 24
    bits: int = 4
    group_size: int = 32
    algorithm: str = "rtn"
    layers: int = 6
    pool: int = 480
    judged: int = 200

    @property
    def name(self) -> str:
        special = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        digest = hashlib.sha256(json.dumps(special, sort_keys=True).encode()).hexdigest()[:8]
        pooling = "" if self.pooling == "none" else f"-{self.pooling}"
        return f"{self.task}-{self.method}{pooling}-lr{self.lr:g}-seed{self.seed}-{digest}"

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def in_factor(self) -> int:
        p = METHODS[self.method].p
        return self.group_size if p == POOLED else int(p)

    @property
    def affine(self) -> GroupQuantConfig:
        return GroupQuantConfig(bits=self.bits, group_size=self.group_size, algorithm=self.algorithm)

    def out_factors(self, model: nn.Module) -> dict[str, int]:
        """e by layer, as `out_factor_pattern` takes it."""
        method = METHODS[self.method]
        if method.e != BY_RANK:
            return {method.shared: int(method.e)}
        sizes = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if hasattr(m, "in_features")}
        return {f"^{re.escape(n)}": default_out_factor(self.r, *size, self.in_factor) for n, size in sizes.items()}

    def adapter(self, model: nn.Module, quantization_aware: bool = False) -> QBLoRAConfig:
        method = METHODS[self.method]
        return QBLoRAConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            in_factor=self.in_factor,
            out_factor=1,
            out_factor_pattern=self.out_factors(model),
            pooling=self.pooling if self.pooling in POOLINGS_OF_CONFIG else "sum",
            adapter=method.adapter,
            quantization_aware=quantization_aware,
            task_type="CAUSAL_LM",
        )


# ---- the model


@cache
def tokenizer_() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2())


@cache
def task_(name: str, tokens: int) -> tasks.Task:
    return tasks.load(name, tokenizer_(), tokens)


def float_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


@cache
def base_split(kind: str, bits: int, group_size: int, algorithm: str, layers: int) -> tasks.Split:
    """The frozen base, its weights held as the float32 values that its codes stand for, and its cached lower part."""
    model = float_model()
    if kind == "nf4":
        for name in target_layers(model, GroupQuantConfig()):
            weight = model.get_submodule(name).weight
            weight.data = nf4_values(weight.data)
    elif kind == "affine":
        quantize_model_(model, GroupQuantConfig(bits=bits, group_size=group_size, algorithm=algorithm))
        as_float_(model)
    return tasks.Split(model.requires_grad_(False), layers)


def split_of(cell: Cell, kind: str | None = None) -> tasks.Split:
    """The split of the cell's base, or of another kind of base with the cell's settings."""
    kind = kind or METHODS[cell.method].base
    affine = (cell.bits, cell.group_size, cell.algorithm) if kind == "affine" else (0, 0, "")
    return base_split(kind, *affine, cell.layers)


def as_float_(model: PreTrainedModel) -> None:
    """Packed layers become linear layers of float32."""
    model.hf_quantizer._dequantize(model, torch.float32)
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False


def nf4_values(weight: Tensor) -> Tensor:
    """What QLoRA's storage makes of a weight: NF4 in blocks of 64, their scales quantized too."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(codes, state).to(weight.dtype).view_as(weight)


def adapted(cell: Cell, base: nn.Module) -> nn.Module:
    """Fresh adapters, started by the cell's seed, on a copy of the base."""
    torch.manual_seed(cell.seed)
    if METHODS[cell.method].start == "pissa":
        return pissa(cell)
    model = get_peft_model(tasks.sharing_copy(base), cell.adapter(base))
    if METHODS[cell.method].start == "error":
        initialize_from_error_(model, split_of(cell, "float").upper)
    share = {"tied": 0.5, "half": 0.25}.get(cell.pooling)
    if share is not None:
        for layer in adapter_layers(model).values():
            p = layer.in_factor["default"]
            layer.pooling_scale["default"] = p ** (share - 0.5)
            layer.lora_A["default"].weight.data /= p**share
    return model


def pissa(cell: Cell) -> nn.Module:
    """PEFT's PiSSA: A and B hold the largest singular vectors, and NF4 what is left of the weights."""
    base = copy.deepcopy(split_of(cell, "float").upper)
    targets = target_layers(base, GroupQuantConfig())
    options = {"r": cell.r, "lora_alpha": cell.lora_alpha, "target_modules": list(targets)}
    model = get_peft_model(base, LoraConfig(init_lora_weights="pissa", **options))
    for name in targets:
        weight = model.get_submodule(f"base_model.model.{name}.base_layer").weight
        weight.data = nf4_values(weight.data)
    return model


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


# ---- one cell


def train_(model: nn.Module, cell: Cell, split: tasks.Split, task: tasks.Task) -> tuple[list[float], float]:
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
        queries = [tasks.answer_query(tokenizer, i.prompt, i.choices[i.gold], end=task.ends) for i in batch]
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
        found = tasks.judge(where, judged, tokenizer_(), items, by_first_token=exam.by_first_token)
        measures = {key: round(value, 5) for key, value in found.measures.items()}
        result.setdefault("measures", {})[name] = measures
        write(cell.path, result)
        say(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in measures.items()))
    return result


def first_step(cell: Cell, split: tasks.Split, items: list[tasks.Item]) -> dict[str, float]:
    """Before any training: what Adam's first step gains, to first order, and the size of what B is given.

        gain = rate * sum |dloss / dB|          (the step is the rate times the gradient's sign; A's gradient is zero)

    Returns:
        gradient_l1: sum |dloss / dB| over all layers. h_rms: root mean square of gain * A pool(x), over all layers.
    """
    model = adapted(cell, split.upper)
    sizes: list[Tensor] = []
    for layer in adapter_layers(model).values():
        layer.lora_B["default"].register_forward_pre_hook(lambda _, h: sizes.append(h[0].detach().square().mean()))
    queries = [tasks.answer_query(tokenizer_(), i.prompt, i.choices[i.gold], end=True) for i in items]
    (-torch.cat(split.log_probs(unwrap(model), queries)).mean()).backward()
    gradients = [p.grad.abs().sum() for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None]
    return {
        "gradient_l1": round(float(torch.stack(gradients).sum()), 5),
        "h_rms": round(float(torch.stack(sizes).mean().sqrt()), 5),
    }


# ---- deployment at the affine base's bits


def deployed(cell: Cell, model: nn.Module, route: str) -> tuple[tasks.Split, nn.Module]:
    """A trained model on its way to affine groups of the cell's bits and size: the lower part and the packed upper one.

    - "merged": the adapters over the packed base, through qbl_trl.merge: exact.
    - an algorithm, "rtn", "mse", "hqq" or "gptq" (calibrated on training prompts): the adapters added to the weights
      they were trained on, and quantized again.
    - "float+" and an algorithm: added to the float weights instead, as merging scripts do that reload the float model.

    Layers without adapters, and the lower part, are the affine base's own.

    Raises:
        MergeError: if "merged" is asked of a method whose in_factor is no multiple of the group.
    """
    lower = split_of(cell, "affine")
    if route == "merged":
        packed = tasks.sharing_copy(split_of(cell, "float").upper)
        quantize_model_(packed, cell.affine)
        peft_model = get_peft_model(packed, cell.adapter(packed, quantization_aware=True))
        peft_model.load_state_dict(trained_tensors(model), strict=False)
        return lower, merge(peft_model)
    start, _, algorithm = route.rpartition("+")
    summed = tasks.sharing_copy(split_of(cell, start or METHODS[cell.method].base).upper)
    for name, layer in adapter_layers(unwrap(model)).items():
        target = summed.get_submodule(name)
        target.weight = nn.Parameter(target.weight + layer.get_delta_weight("default").detach(), requires_grad=False)
    if algorithm == "gptq":
        sequences = [
            tokenizer_()(item.prompt)["input_ids"] for item in task_(cell.task, cell.tokens).train[:CALIBRATION]
        ]
        calibration = [{"inputs_embeds": states[None]} for states in lower.hidden(sequences)]
        config = dataclasses.replace(cell, algorithm="gptq").affine
        config.calibration = calibration
        gptq_model_(summed, config, target_layers(summed, config))
        return lower, summed
    return lower, quantize_model_(summed, dataclasses.replace(cell, algorithm=algorithm).affine)


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
