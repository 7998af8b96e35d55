"""Time and memory of one training step, balanced adapters against PEFT's LoRA with as many parameters on the same base.

    OMP_NUM_THREADS=2 python integration/benchmarks/train_step.py
    OMP_NUM_THREADS=1 python integration/benchmarks/train_step.py --pairs 3 --shapes smollm2-135m

A step is forward, loss, backward and AdamW over one decoder layer of the named model's shapes, in float32. Steps are
timed in interleaved pairs (LoRA, ours, ours, LoRA, ...), so that whatever else the machine does falls on both; the
ratio is the median over pairs, by the wall clock and, for a busy machine, by the processor's. Saved bytes are what
autograd keeps for backward, each storage once, without parameters and the base's own buffers. Everything is written to
results/train_step.json by this script.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRAConfig
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.linear import GroupQuantLinear

RESULTS = Path(__file__).parent / "results" / "train_step.json"
SHAPES = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
}
GROUP = 32


def nf4_(model: nn.Module) -> nn.Module:
    """Replace every linear layer but the head by its NF4 form, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to("cpu"))
    return model


def groups_(model: nn.Module) -> nn.Module:
    """Replace every linear layer but the head by 4-bit groups, in place."""
    return quantize_model_(model, GroupQuantConfig(bits=4, group_size=GROUP))


SYSTEMS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[int], QBLoRAConfig]]] = {
    "Q-BLoRA over NF4": (nf4_, lambda r: QBLoRAConfig(r=r, in_factor=2, out_factor=2)),
    "QA-BLoRA over 4-bit groups": (groups_, lambda r: QBLoRAConfig(r=r, quantization_aware=True, out_factor=2)),
}


def build(shape: str, base: Callable[[nn.Module], nn.Module], config: peft.LoraConfig) -> nn.Module:
    """One decoder layer of the given shapes over a small vocabulary, quantized, with an adapter."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=256, **SHAPES[shape]))
    return peft.get_peft_model(base(model), config).train()


def lora(r: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=16, target_modules="all-linear")


class SavedBytes:
    """Counts what autograd keeps for backward: every storage once, none of a module's own tensors."""

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.storages: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def hooks(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def saved_by_layer(base: Callable[[nn.Module], nn.Module], config: peft.LoraConfig, tokens: int) -> int:
    """Bytes one adapted linear layer of 2048 x 2048 keeps for backward."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.layer = nn.Linear(2048, 2048, bias=False)
    config.target_modules = {"layer"}
    model = peft.inject_adapter_in_model(config, _quantized(holder, base))
    x = torch.randn(1, tokens, 2048, requires_grad=True)
    counter = SavedBytes(model)
    with counter.hooks():
        kept = model.layer(x)
    del kept
    return counter.total


def _quantized(holder: nn.Module, base: Callable[[nn.Module], nn.Module]) -> nn.Module:
    if base is nf4_:
        return nf4_(holder)
    affine = quantize(holder.layer.weight.data, bits=4, group_size=GROUP, symmetric=False)  # type: ignore
    holder.layer = GroupQuantLinear.from_affine(affine, bits=4, group_size=GROUP)
    return holder


def stepper(model: nn.Module, ids: Tensor) -> Callable[[], tuple[float, float]]:
    """A function that runs one whole training step and returns its seconds: of the wall clock and of the processor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> tuple[float, float]:
        start, work = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, time.process_time() - work

    return step


def compare(shape: str, system: str, r: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: both methods over one base, timed in pairs."""
    base, ours = SYSTEMS[system]
    models = {"lora": build(shape, base, lora(r)), "ours": build(shape, base, ours(r))}
    ids = torch.randint(0, 256, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    saved = {}
    for name, model in models.items():
        counter = SavedBytes(model)
        with counter.hooks():
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        saved[name] = counter.total
    steps = {name: stepper(model, ids) for name, model in models.items()}
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {"lora": [], "ours": []}
    for pair in range(args.pairs):
        for name in ("lora", "ours") if pair % 2 == 0 else ("ours", "lora"):
            times[name].append(steps[name]())
    wall, work = (
        [ours[clock] / lora[clock] for ours, lora in zip(times["ours"], times["lora"], strict=True)] for clock in (0, 1)
    )
    trainable = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    return {
        "shape": shape,
        "system": system,
        "r": r,
        "trainable_parameters": trainable,
        "seconds_median": {name: round(statistics.median(v[0] for v in values), 4) for name, values in times.items()},
        "time_ratio_median": round(statistics.median(wall), 4),
        "time_ratio_pairs": [round(ratio, 4) for ratio in wall],
        "processor_time_ratio_median": round(statistics.median(work), 4),
        "saved_bytes_step": saved,
        "saved_ratio_step": round(saved["ours"] / saved["lora"], 4),
    }


def layer_memory(system: str, r: int, tokens: int) -> dict[str, Any]:
    base, ours = SYSTEMS[system]
    saved = {"lora": saved_by_layer(base, lora(r), tokens), "ours": saved_by_layer(base, ours(r), tokens)}
    return {
        "system": system,
        "r": r,
        "tokens": tokens,
        "saved_bytes": saved,
        "saved_ratio": round(saved["ours"] / saved["lora"], 4),
    }


def main(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)},
        },
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "tokens": args.batch * args.length,
        "pairs": args.pairs,
        "layer_2048x2048": [layer_memory(system, r, t) for system in SYSTEMS for r in args.ranks for t in (128, 1024)],
        "step": [],
    }
    for row in report["layer_2048x2048"]:
        print(row, flush=True)
    for shape in args.shapes:
        for system in SYSTEMS:
            for r in args.ranks:
                row = compare(shape, system, r, args)
                report["step"].append(row)
                print({key: value for key, value in row.items() if key != "time_ratio_pairs"}, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
