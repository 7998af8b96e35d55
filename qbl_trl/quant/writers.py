"""Packed models in other formats, where those store a float offset per group: HQQ and GGUF Q4_1.

A merged delta that is constant inside every group moves into the offset; codes and scales stay as they are.

| format | offset | merged model |
| --- | --- | --- |
| "hqq" | zero point, float32 | exact: one float32 rounding per group |
| "gguf" | m = D - s z, float16 | m is rounded, by at most \\|m\\| 2**-11 per weight; the report says how much |

A format with integer zero points (GPTQ, AWQ, compressed-tensors, GGUF Q4_0) has no place for the shift: refused.
"""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from torch import nn

from qbl_trl.errors import ConfigError, PackageError
from qbl_trl.folders import check_free
from qbl_trl.quant.hqq_writer import write_hqq
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
        return WriteReport(path, *write_hqq(model, path, overwrite))
    source = base_folder(model)
    if path.exists() and source is not None and path.resolve().parent == source.resolve() and not _is_gguf(path):
        raise ConfigError(f"write_checkpoint: {path} is a file of the model itself; choose another output")
    from qbl_trl.quant.gguf_writer import write_gguf  # needs the package gguf

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
    path = Path(os.path.expanduser(output))
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
