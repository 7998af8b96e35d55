"""Packed models in other formats, where those store a float offset per group: HQQ and GGUF Q4_1.

A merged delta that is constant inside every group moves into the offset; codes and scales stay as they are.

| format | offset | merged model |
| --- | --- | --- |
| "hqq" | zero point, float32 | exact: one float32 rounding per group |
| "gguf" | m = D - s z, float16 | m is rounded, by at most \\|m\\| 2**-11 per weight; the report says how much |

A format with integer zero points (GPTQ, AWQ, compressed-tensors, GGUF Q4_0) has no place for the shift: refused.
"""

import copy
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbl_trl.errors import ConfigError, PackageError
from qbl_trl.folders import check_free, new_folder
from qbl_trl.model_files import generation_settings, valid_generation
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.blocks import fold
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.packed import PackedWeight
from qbl_trl.quant.stored import with_dtype
from qbl_trl.wrapped import base_folder

FORMATS = ("hqq", "gguf")
_INTEGER_FORMATS = ("gptq", "awq", "auto-round", "compressed-tensors", "q4_0")


class WriteReport(NamedTuple):
    """What a writer did: where, how many layers, and the largest change of a weight (weight units; 0 where exact)."""

    path: Path
    layers: int
    largest_rounding: float


def write_checkpoint(
    model: nn.Module,
    output: str | os.PathLike[str],
    format: str,
    *,
    template: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> WriteReport:
    """Write a (merged) model of GroupQuantLinear layers for another program.

    Args:
        model: a transformers model; its layers are read, never changed.
        output: for "hqq" a folder that is new or empty (weights and settings; save the tokenizer beside them), for
            "gguf" a new file.
        format: "hqq" or "gguf".
        template: for "gguf", a GGUF file of the same model in any type: its metadata and tokenizer are taken over.
        overwrite: replace an output that exists.

    Raises:
        ConfigError: if the format has integer zero points or is not known, output exists and `overwrite` is false, the
            template is missing, of no use or would be replaced, or a layer has bits or groups that the format lacks.
        FoldError: if a merged delta varies inside a group.
        PackageError: for "gguf", if that package is missing.
    """
    path = check_request(output, format, template, overwrite)
    if template is None or format == "hqq":
        return _write_hqq(model, path, overwrite)
    source = base_folder(model)
    if path.exists() and source is not None and path.resolve().parent == source.resolve() and not _is_gguf(path):
        raise ConfigError(f"write_checkpoint: {path} is a file of the model itself; choose another output")
    from qbl_trl.quant.gguf_writer import write_gguf

    return WriteReport(path, *write_gguf(model, path, Path(template)))


def check_request(
    output: str | os.PathLike[str],
    format: str,
    template: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """What can be refused before a model is read: the output as a Path, or write_checkpoint's ConfigError."""
    if format in _INTEGER_FORMATS:
        raise ConfigError(
            f"write_checkpoint: {format} is not written. It stores integer zero points, and a merged adapter shifts "
            'them by fractions: rounding would cost up to half a code per weight. Exact: format="hqq" or export to '
            "ONNX. Lossy: model.dequantize(), and quantize that with a library of the format"
        )
    if format not in FORMATS:
        raise ConfigError(f"write_checkpoint: format={format!r} is not known; allowed: {', '.join(FORMATS)}")
    path = Path(output)
    if format == "hqq" and template is not None:
        raise ConfigError('write_checkpoint: template= is for format="gguf"; leave it out for "hqq"')
    if format == "hqq":
        check_free(path, overwrite)
    elif path.is_dir():
        raise ConfigError(f"write_checkpoint: {path} is a folder; name a new GGUF file")
    elif path.exists() and not overwrite:
        raise ConfigError(f"write_checkpoint: {path} exists already; choose another output, or set overwrite")
    elif path.exists() and not path.is_file():
        raise ConfigError(f"write_checkpoint: {path} is no file; name a new GGUF file")
    if format == "gguf" and importlib.util.find_spec("gguf") is None:
        raise PackageError('write_checkpoint: format="gguf" needs gguf: pip install "qbl-trl[gguf]"')
    if format == "gguf" and (template is None or not Path(template).is_file()):
        raise ConfigError(
            'write_checkpoint: format="gguf" needs template=, a GGUF file of the same model, for metadata and '
            f"tokenizer; {'none was named' if template is None else f'{template} is no file'}"
        )
    if format == "gguf" and path.exists() and path.samefile(template):  # type: ignore[arg-type]
        raise ConfigError(f"write_checkpoint: {path} is the template itself; choose another output")
    return path


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def folded(layer: PackedWeight) -> Affine:
    """Codes and scales as stored, zeros in float32 with the merged delta moved in: z - D / s.

    Returns:
        Affine: codes (N, K) uint8, scales (N, G) as stored, zeros (N, G) float32.

    Raises:
        FoldError: if the delta varies inside a group (in_factor is no multiple of the group size).
    """
    codes, scales, zeros = layer.affine()
    if layer.delta is None:
        return Affine(codes, scales, zeros.float())
    p, e = layer.format.in_factor or 1, layer.format.out_factor or 1
    return Affine(codes, scales, fold(zeros, scales, layer.delta, p, e, layer.group_size))


def packed_layers(model: nn.Module) -> dict[str, GroupQuantLinear]:
    """Full name -> layer.

    Raises:
        ConfigError: if there is none, another packed module (an embedding) is present, or one holds NaN or infinite
            values.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    other = [name for name, module in found.items() if not isinstance(module, GroupQuantLinear)]
    if other:
        raise ConfigError(f"write_checkpoint: {other[0]} is a packed embedding; only linear layers can be written")
    if not found:
        raise ConfigError("write_checkpoint: the model has no GroupQuantLinear layer")
    for name, module in found.items():
        floats = [t for t in (module.scales, module.zeros, module.delta) if t is not None and t.is_floating_point()]
        if not all(bool(values.isfinite().all()) for values in floats):
            raise ConfigError(f"write_checkpoint: {name} holds NaN or infinite values; the model is damaged")
    return {name: module for name, module in found.items() if isinstance(module, GroupQuantLinear)}


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


def _write_hqq(model: nn.Module, path: Path, overwrite: bool) -> WriteReport:
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
    return WriteReport(path, len(layers), 0.0)
