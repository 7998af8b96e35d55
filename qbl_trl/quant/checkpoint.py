"""Strict reading of safetensors folders: what is wrong is said, with the file's name, before a tensor is loaded.

Only headers are read. A byte flipped inside the data is beyond this check; a cut file, a damaged header, a wrong shape,
a missing shard are not.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.packed import BESIDE_CODES

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Declared(NamedTuple):
    """One tensor as a file declares it."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Declared]:
    """Every tensor that transformers would load from a folder, by name: of its one file, or of those an index names.

    Raises:
        CheckpointError: if a file is cut short, its header is damaged, a shard of the index is missing, or two files
            without an index hold the same tensor.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():  # an index beside the one file is of an earlier save
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        found: dict[str, Declared] = {}
        for name, stored in _held(files):
            if name in found:
                raise CheckpointError(
                    f"{stored.file} and {found[name].file} both hold {name}, and no index says which of them counts"
                )
            found[name] = stored
        return found
    named = _index(index)
    return {name: stored for name, stored in _held(_shards(folder, named)) if name in named}  # the last of several


def read_files(files: Iterable[Path]) -> dict[str, Declared]:
    """Every tensor of these safetensors files, by name.

    Raises:
        CheckpointError: if one is cut short, or its header is damaged.
    """
    return dict(_held(files))


def check_tensors(
    folder: Path, stored: Mapping[str, Declared], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]
) -> None:
    """Compare what a folder holds with what the model's packed layers need.

    Args:
        folder: of safetensors files.
        stored: what it holds, by the tensor's name in the model.
        expected: shape and dtype (None: any) by the same names.

    Raises:
        CheckpointError: on a missing tensor, a wrong shape or a wrong dtype, and on one that a packed layer would
            leave out.
    """
    for name, (shape, dtype) in expected.items():
        if name not in stored:
            layer, _, part = name.rpartition(".")
            wrapped = f"{layer}.base_layer.{part}" in stored
            raise CheckpointError(
                f"{folder}: tensor {name!r} is missing although quantization_config in config.json calls for it"
                + "; the model was saved from under an adapter (base_layer)" * wrapped
            )
        file, found_dtype, found_shape = stored[name]
        if found_shape != shape or found_dtype != (dtype or found_dtype):
            raise CheckpointError(
                f"{file}: tensor {name!r} is {found_dtype} {found_shape}, quantization_config in config.json calls "
                f"for {dtype or 'any type of'} {shape}; the two do not belong together"
            )
    layers = {name.rpartition(".")[0] for name in expected}
    for name, (file, *_) in stored.items():
        layer, _, part = name.rpartition(".")
        if part in BESIDE_CODES and layer in layers and name not in expected:
            raise CheckpointError(
                f"{file}: tensor {name!r} has no place in what quantization_config in config.json describes, and the "
                "model computes something else without it; the two do not belong together"
            )


def _index(file: Path) -> dict[str, str]:
    """Shard by tensor, as the index says."""
    try:
        named = dict(json.loads(file.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a readable index of shards ({error})") from error
    for shard in named.values():
        if not isinstance(shard, str):
            raise CheckpointError(f"{file}: not a readable index of shards ({shard!r} is no file name)")
    return named


def _shards(folder: Path, named: Mapping[str, str]) -> list[Path]:
    shards = sorted(set(named.values()))
    for name in shards:
        if Path(name).name != name:
            raise CheckpointError(f"{folder}: the index names shard {name!r} outside the checkpoint's folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: this shard is named in the index but is missing")
    return [folder / name for name in shards]


def _held(files: Iterable[Path]) -> Iterator[tuple[str, Declared]]:
    """Name and place of every tensor, file by file."""
    return ((name, stored) for file in files for name, stored in _read_header(file).items())


def _read_header(file: Path) -> dict[str, Declared]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing although the index beside it names it; copy the whole folder")
    with file.open("rb"):  # may not be read: that is no damage
        pass
    try:
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call]
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Declared(file, _DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
                for name, part in parts.items()
            }
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: cut short or damaged, not a whole safetensors file ({error}); copy it again"
        ) from error
