"""Named tensors of a foreign checkpoint: of a safetensors folder, opened one at a time, or of a loaded module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.checkpoint import Declared, read_headers


class Shards:
    """The tensors of one folder, by name.

    Raises:
        CheckpointError: if there is no safetensors file, a shard is missing, or a header is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored = read_headers(folder)
        self._open: dict[Path, Any] = {}
        if not self._stored:
            raise CheckpointError(
                f"{folder}: no *.safetensors file. Pickled weights (*.bin, *.pt) are not read: load the model with "
                "the library that wrote it and save it as safetensors"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> list[str]:
        """Every tensor's name, in the order of the files."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header; nothing is loaded."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype from the header; None for one that torch lacks."""
        return self._find(name).dtype

    def get(self, name: str) -> Tensor:
        """One tensor, copied out of its file."""
        file = self._find(name).file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            return self._read(self._open[file], name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read: {error}; fetch the file again") from error

    def _read(self, file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        return tensor

    def _find(self, name: str) -> Declared:
        if name not in self._stored:
            raise CheckpointError(f"{self.folder}: no tensor is called {name}; the checkpoint is incomplete")
        return self._stored[name]


class LoadedTensors(Shards):
    """The same view of tensors that are in memory.

    Args:
        source: what to call them in messages.
    """

    def __init__(self, source: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder, self._tensors = source, tensors
        self._stored = {name: Declared(source, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU, not copied where it is there already."""
        self._find(name)
        return self._tensors[name].detach().cpu()
