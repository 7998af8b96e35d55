"""Which format a checkpoint has, and what it holds."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qbl_trl.config import QUANT_METHOD
from qbl_trl.errors import CheckpointError
from qbl_trl.json_files import read_json
from qbl_trl.quant.importers.awq import AWQReader
from qbl_trl.quant.importers.compressed import CompressedReader
from qbl_trl.quant.importers.gptq import GPTQReader
from qbl_trl.quant.importers.hqq import HQQReader
from qbl_trl.quant.importers.mlx import MetalReader, MLXReader
from qbl_trl.quant.importers.reader import Reader
from qbl_trl.quant.importers.shards import Shards
from qbl_trl.quant.importers.spelling import Respelled
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.stored import summarized

KINDS = "GPTQ, AWQ, AutoRound, HQQ, compressed-tensors, MLX, Metal (folders), GGUF (a file or a folder with one)"
_READERS: dict[str, Callable[[Path, dict[str, Any]], Reader]] = {
    "gptq": GPTQReader,
    "awq": AWQReader,
    "hqq": HQQReader,
    "compressed-tensors": CompressedReader,
    "mlx": MLXReader,
    "metal": MetalReader,
}
_AUTO_ROUND = ("auto-round", "auto_round", "intel/auto-round")  # in the packing of GPTQ or AWQ
_METHODS = (*_READERS, *_AUTO_ROUND)


def holds_codes(stored: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of a format whose codes are read; compressed-tensors may hold narrow floats."""
    groups = (stored.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, dict)]
    return stored.get("quant_method") in _METHODS and not any(part.get("type") == "float" for part in weights)


_OLD_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ, AutoAWQ before config.json held it


def open_reader(source: str | os.PathLike[str]) -> Reader:
    """A reader for a checkpoint folder or a GGUF file.

    Raises:
        CheckpointError: if the source is missing, damaged, of an unknown format, or cannot be read exactly.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint is the path of a folder or a GGUF file, not {source!r}")
    path = Path(source)
    if path.is_file():
        return _gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; download the checkpoint first and give its folder")
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(f"{path}: no config.json and {len(files)} GGUF files; name the one file to import")
        return _gguf(files[0])
    quantization = _quantization(path)
    if not quantization:
        raise CheckpointError(f"{path}: config.json states no quantization; allowed: {KINDS}")
    method = str(quantization.get("quant_method", "")).lower()
    if method in _AUTO_ROUND:
        packing = quantization.get("packing_format", quantization.get("backend"))  # its name before 0.5
        method = next((known for known in ("awq", "mlx") if known in str(packing)), "gptq")
        if packing not in (None, "auto"):
            quantization = quantization | {"packing_format": packing}
    if method == QUANT_METHOD:
        raise CheckpointError(f"{path} is in this package's own format already; from_pretrained opens it")
    if method not in _READERS:
        raise CheckpointError(f"{path}: quantization method {method!r} cannot be imported; allowed: {KINDS}")
    return Respelled(_READERS[method](path, quantization))


def describe(reader: Reader) -> dict[str, Any]:
    """The fields of GroupQuantConfig that state how a checkpoint's layers are stored.

    The commonest format of a layer is the configuration; `layers` names those that differ, and
    `modules_to_not_convert` the matrices that the checkpoint keeps in float.
    """
    common, special = summarized(reader.formats())
    kept = [
        name.removesuffix(".weight")
        for name, shape in reader.others().items()
        if name.endswith(".weight") and len(shape) == 2
    ]
    keys = ("bits", "group_size", "zeros", "scale_dtype")
    return {key: getattr(common, key) for key in keys} | {
        "symmetric": common.zeros == "none",
        "modules_to_not_convert": sorted(kept),
        "layers": special,
    }


def describe_checkpoint(source: str | os.PathLike[str]) -> dict[str, Any]:
    """`describe` for a checkpoint on disk; only headers and small tensors are read.

    Raises:
        CheckpointError: see `open_reader`.
    """
    return describe(open_reader(source))


def read_layers(source: str | os.PathLike[str]) -> Iterator[tuple[str, GroupQuantLinear | Tensor]]:
    """Stream a checkpoint: (module name, GroupQuantLinear) for quantized layers, (tensor name, Tensor) for the rest.

    Raises:
        CheckpointError: see `open_reader`; also where a layer's codes cannot be taken over exactly.
    """
    reader = open_reader(source)
    for name in reader.formats():
        yield name, reader.layer(name)
    for name in reader.others():
        yield name, reader.tensor(name)


def _gguf(path: Path) -> Reader:
    from qbl_trl.quant.importers.gguf import GGUFReader  # loads transformers' modelling code

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file; allowed: {KINDS}")
    reader = GGUFReader(path)
    reader.check_codes()
    return reader


def _quantization(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    names = ("quantization_config", "compression_config")  # the second: compressed-tensors before 0.5
    parts = (config, config.get("text_config") or {})  # the second alone: Kimi K2.5, whose tower is float
    found = next((part[name] for part in parts for name in names if isinstance(part.get(name), dict)), None)
    if isinstance(config.get("quantization"), dict):
        return {"quant_method": "mlx"} | config["quantization"] | (found or {})
    if found is not None:
        return {"quant_method": "none"} | found
    for name in _OLD_FILES:
        if (folder / name).is_file():
            method = "awq" if name == "quant_config.json" else "gptq"
            return {"quant_method": method} | read_json(folder / name)
    own = any(name.endswith(f".{HQQReader.marker}") for name in Shards(folder).names())
    return {"quant_method": "hqq"} if own else {}  # hqq's own safetensors: every layer states its settings
