"""The bases and adapters that the methods of cells.py name, on SmolLM2.

All methods train with the same code (LoRA is QBLoRAConfig with p = e = 1). A 4-bit base is held as the float32 values
its codes stand for, to spare decoding them twice a step: the same function. Only the upper layers are adapted; what the
lower ones make of a text is computed once (judging.Split).
"""

import copy
from functools import cache

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from integration.benchmarks import judging, tasks
from integration.benchmarks.cells import METHODS, Cell
from integration.demo.smollm2 import smollm2
from qbl_trl.adapter.initialize import initialize_from_error_
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.config import GroupQuantConfig
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.targets import target_layers


@cache
def tokenizer_() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2())


@cache
def task_(name: str, tokens: int) -> tasks.Task:
    return tasks.load(name, tokenizer_(), tokens)


def float_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


@cache
def base_split(kind: str, bits: int, group_size: int, algorithm: str, layers: int) -> judging.Split:
    """The frozen base, its weights held as the float32 values that its codes stand for, and its cached lower part."""
    model = float_model()
    if kind == "nf4":
        for name in target_layers(model, GroupQuantConfig()):
            weight = model.get_submodule(name).weight
            weight.data = nf4_values(weight.data)
    elif kind == "affine":
        quantize_model_(model, GroupQuantConfig(bits=bits, group_size=group_size, algorithm=algorithm))
        as_float_(model)
    return judging.Split(model.requires_grad_(False), layers)


def split_of(cell: Cell, kind: str | None = None) -> judging.Split:
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
    model = get_peft_model(judging.sharing_copy(base), cell.adapter(base))
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
