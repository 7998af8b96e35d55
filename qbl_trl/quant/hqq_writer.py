"""A packed model in HQQ's layers, as transformers opens it: zero points in float32 take a merged delta in."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbl_trl.errors import ConfigError
from qbl_trl.folders import new_folder
from qbl_trl.model_files import generation_settings, valid_generation
from qbl_trl.quant.float_offsets import folded, packed_layers
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.stored import with_dtype


def write_hqq(model: nn.Module, path: Path, overwrite: bool) -> tuple[int, float]:
    """Write a folder; returns how many layers it holds packed, and the largest change of a weight: none.

    Raises:
        ConfigError: if a layer has no HQQ layout, or the output exists and `overwrite` is false.
        FoldError: if a merged delta varies inside a group.
    """
    layers = packed_layers(model)
    _refuse_transposed(model, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= hqq_tensors(layer, name)
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in layers and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())  # tied weights are written once
            tensors[name] = tensor.contiguous()
    first = next(iter(layers.values()))
    weights = {"nbits": first.bits, "channel_wise": True, "group_size": first.group_size, "optimize": False}
    weights |= {"round_zero": False, "axis": 1, "view_as_float": False}
    settings = {"offload_meta": False, "weight_quant_params": weights}
    settings |= {"scale_quant_params": None, "zero_quant_params": None}
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    floats = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": settings, "skip_modules": floats}
    config = with_dtype(config, "float32")
    with new_folder(path, overwrite) as built:
        save_file(tensors, built / "model.safetensors", metadata={"format": "pt"})
        (built / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        if (generation := valid_generation(generation_settings(model))) is not None:
            generation.save_pretrained(built)
    return len(layers), 0.0


def hqq_tensors(layer: GroupQuantLinear, name: str) -> dict[str, Tensor]:
    """One layer as HQQLinear's encoded state dict, for compute_dtype float32.

    Raises:
        ConfigError: if the codes cannot be split over bytes the way HQQ does, or the last group is ragged.
    """
    codes, scales, zeros = folded(layer)
    rows, columns = codes.shape
    bits, size = layer.bits, layer.group_size
    per_byte = 8 // bits
    if columns % size or codes.numel() // size % per_byte:
        raise ConfigError(
            f"write_checkpoint: {name} ({rows}, {columns}) in groups of {size} has no HQQ layout; K must be a multiple "
            f"of the group, and the number of groups a multiple of {per_byte}"
        )
    lanes = codes.reshape(per_byte, -1, size)  # the first rows go to the highest bits
    packed = torch.zeros_like(lanes[0])
    for lane in lanes:
        packed = (packed << bits) | lane if per_byte > 1 else lane
    settings: dict[str, Any] = {"nbits": bits, "group_size": size, "axis": 1}
    flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1}
    flags |= {"stores_quant_config": 1, "channel_wise": 1, "optimize": 0, "round_zero": 0}
    texts = {"packing": f"{bits}bit_u8", "unpack_view_dtype": "torch.uint8", "compute_dtype": "torch.float32"}
    tensors = {
        "W_q": packed,
        "scale": scales.float().reshape(-1, 1),
        "zero": zeros.reshape(-1, 1),
        "shape": torch.tensor([rows, columns]),
    }
    tensors |= {key: torch.tensor(value, dtype=torch.int32) for key, value in settings.items()}
    tensors |= {key: torch.tensor(value, dtype=torch.uint8) for key, value in flags.items()}
    tensors |= {key: torch.tensor(list(value.encode()), dtype=torch.uint8) for key, value in texts.items()}
    if layer.bias is not None:
        tensors["bias"] = layer.bias.data
    return {f"{name}.{key}": value.contiguous() for key, value in tensors.items()}


def _refuse_transposed(model: Any, layers: dict[str, GroupQuantLinear]) -> None:
    """transformers puts HQQ layers in the place of nn.Linear alone."""
    with init_empty_weights():
        plain = type(model)(copy.deepcopy(model.config))
    found = next((name for name in layers if isinstance(plain.get_submodule(name), Conv1D)), None)
    if found is not None:
        raise ConfigError(
            f"write_checkpoint: {found} is a Conv1D layer of {type(model).__name__}, where transformers loads no HQQ "
            'layer; allowed for it: format="gguf", or ONNX export'
        )
