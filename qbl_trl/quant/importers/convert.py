"""A foreign checkpoint becomes a folder of ours: the same codes in our layout, beside the rest of the model.

Layers are read, packed and written one by one; memory holds one shard. The folder appears under its name only when
it is complete.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qbl_trl.config import GroupQuantConfig
from qbl_trl.folders import check_apart, check_free, new_folder
from qbl_trl.progress import progress
from qbl_trl.quant.importers.open import describe, open_reader
from qbl_trl.quant.importers.places import check_places
from qbl_trl.quant.importers.reader import Reader
from qbl_trl.quant.stored import with_dtype
from qbl_trl.tokenizers import TOKENIZER_FILES, copy_files, holds_tokenizer

logger = logging.getLogger(__name__)

_SHARD_BYTES = 1 << 29
_COPIED = (*TOKENIZER_FILES, "*.json", "*.jinja", "*.txt")
_NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def convert_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a GPTQ, AWQ, AutoRound, HQQ, compressed-tensors, MLX or GGUF checkpoint as a folder for `from_pretrained`.

    Codes and scales are taken over bit for bit; see the reader of each format for zero points.

    Args:
        source: a checkpoint folder, or a GGUF file.
        output_dir: a folder that does not exist yet, or is empty, or may be overwritten.
        tokenizer: folder to copy tokenizer files from; by default the folder of the source.
        dtype: dtype of the tensors that are not quantized; None keeps the file's (float32 for a GGUF file).

    Returns:
        output_dir.

    Raises:
        CheckpointError: if the source cannot be read exactly.
        ConfigError: if output_dir holds anything and `overwrite` is false, or holds the source.
    """
    check_free(output_dir, overwrite)
    check_apart(output_dir, source)
    reader, path = open_reader(source), Path(source)
    check_places(path, reader.config(), reader.inside(), reader.others())
    with new_folder(output_dir, overwrite) as built:
        _write_weights(reader, built, dtype)
        config = reader.config()
        if dtype is not None:
            config = with_dtype(config, str(dtype).removeprefix("torch."))
        config |= {"quantization_config": GroupQuantConfig(**describe(reader)).to_dict()}
        (built / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        beside = Path(tokenizer) if tokenizer else path if path.is_dir() else path.parent
        indices = [file.name for file in beside.glob("*.index.json")]
        copy_files(beside, built, _COPIED + ("*.py",) * ("auto_map" in config), (*_NOT_COPIED, *indices))
        if not holds_tokenizer(built):
            logger.warning("%s has no tokenizer beside it; copy that of the original model into %s", beside, output_dir)
    return Path(output_dir)


def _write_weights(reader: Reader, folder: Path, dtype: torch.dtype | None) -> None:
    """Safetensors shards with an index, or one file."""
    metadata = {"format": "pt", "converted_from": reader.kind}
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards)}", metadata=metadata)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in _tensors(reader, dtype):
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > _SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor
        size, total = size + bytes_, total + bytes_
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(reader: Reader, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name in _shown(list(reader.formats())):
        for part, tensor in reader.layer(name).state_dict().items():
            cast = part == "bias" and dtype is not None
            yield f"{name}.{part}", (tensor.to(dtype) if cast else tensor).contiguous()
    for name in reader.others():
        tensor = reader.tensor(name)
        yield name, tensor.to(dtype).contiguous() if dtype and tensor.is_floating_point() else tensor.contiguous()


def _shown(names: list[str]) -> Iterator[str]:
    with progress(len(names), "converting", "layer") as bar:
        for name in names:
            yield name
            bar.update()
