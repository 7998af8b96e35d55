"""What commands share: opening the model that was named, writing one, and saying what was written."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qbl_trl.errors import FULL, OTHERS_DEPLOYED, ConfigError, first_line
from qbl_trl.folders import is_adapter, refuse_graph

NEW = "a new or empty folder"
OVERWRITE = "replace what the output folder holds"


def check_exists(name: str) -> None:
    """A path that is not there is no model id."""
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise ConfigError(f"{name}: no such file or folder")


@contextmanager
def fetched(name: str) -> Iterator[None]:
    """A name that is no folder is a model id, or was mistyped: what failed to be fetched is said with both in mind."""
    try:
        yield
    except OSError as error:
        if Path(name).exists() or error.errno in FULL:
            raise
        first = first_line(error) or type(error).__name__
        raise ConfigError(f"{name} is no folder here, and no model that could be fetched: {first}") from error


def check_holds_model(name: str) -> None:
    """A folder is opened for its weights."""
    folder = Path(name)
    refuse_graph(folder)
    if is_adapter(folder):
        from qbl_trl.config import QBLoRAConfig
        from qbl_trl.loading import saved_adapter

        saved = saved_adapter(folder)
        if not isinstance(saved, QBLoRAConfig):
            method = getattr(saved.peft_type, "value", "unnamed")
            raise ConfigError(f"{name} is an adapter of another PEFT method ({method}): {OTHERS_DEPLOYED}")
        raise ConfigError(f"{name} is an adapter; `qbl-trl merge {name} MERGED` makes a model of it and its base")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{name} holds no model (no config.json)")


def load(name: str, dtype: str = "float32", settings: Any = None, whole: bool = True) -> Any:
    import torch

    from qbl_trl.loading import open_model, open_whole
    from qbl_trl.quant.checkpoint import read_headers

    check_exists(name)
    check_holds_model(name)
    if Path(name).is_dir():
        read_headers(Path(name))  # names a file that is cut short
    wanted = getattr(torch, dtype)
    quantize = {} if settings is None else {"quantization_config": settings}  # an explicit None hides a stored one
    with fetched(name):
        return (open_whole if whole else open_model)(name, dtype=wanted, **quantize)


def save(model: Any, tokenizer_of: str, output: Path, overwrite: bool) -> None:
    """The model and the tokenizer beside it; a folder's tokenizer files are copied as they are."""
    from qbl_trl.folders import new_folder
    from qbl_trl.model_files import save_model
    from qbl_trl.tokenizers import save_tokenizer

    with new_folder(output, overwrite) as draft:
        save_model(model, draft)
        save_tokenizer(tokenizer_of, draft)


def written(output: Path, source: str | None, began: float) -> str:
    """One line: the folder, its packed layers, bytes of weights before (if they lie in a folder) and after, seconds."""
    from qbl_trl.quant.checkpoint import read_headers

    names = read_headers(output)
    packed, merged = (sum(name.endswith(f".{part}") for name in names) for part in ("scales", "delta"))
    layers = f"{packed} packed layers" * bool(packed) + f" ({merged} with a merged adapter)" * bool(merged)
    before = _weights(Path(source)) if source else 0
    size = f"{before / 1e6:.1f} MB -> " * bool(before) + f"{_weights(output) / 1e6:.1f} MB"
    return f"{output}: " + ", ".join([*[layers] * bool(layers), size, f"{time.perf_counter() - began:.1f} s"])


def _weights(path: Path) -> int:
    """Bytes of a weights file, or of those of a folder; 0 for a model id."""
    files = (
        [path] if path.is_file() else [file for kind in ("safetensors", "bin", "pt") for file in path.glob(f"*.{kind}")]
    )
    return sum(file.stat().st_size for file in files)
