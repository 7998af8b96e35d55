"""The float weights of a folder by the names that a model has for their layers."""

import functools
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.quant.checkpoint import read_headers
from qbl_trl.quant.renaming import names_in_model
from qbl_trl.quant.stacks import set_apart


class FloatWeights:
    """Weights of layers as a folder's safetensors files hold them, in the files' own type and layout.

    They are read one at a time. A layer whose weight has no tensor of its own there (a head that is tied, experts that
    the files stack) is looked up in the float model, which is then loaded whole.

    Args:
        folder: of the float model that a quantized one was made from.
        model: the quantized one; adapters may sit on it.

    Raises:
        CheckpointError: if a file is cut short, its header is damaged, or a shard of the index is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        self.folder = Path(folder)
        self._kind = type(model)
        self._stored = read_headers(self.folder)
        own = names_in_model(model, self._stored) if isinstance(model, PreTrainedModel) else {}
        self._origins = {own.get(origin, origin): origin for origin in self._stored}

    def __bool__(self) -> bool:
        return bool(self._stored)

    def read(self, layer: str) -> Tensor | None:
        """The weight of a layer, None where the folder has none."""
        origin = self._origins.get(f"{layer}.weight")
        if origin is None:
            found = self._whole.get(layer)
            return None if found is None else found.weight.detach()  # type: ignore[union-attr, operator]
        with safe_open(self._stored[origin].file, framework="pt") as file:  # type: ignore[no-untyped-call]
            weight: Tensor = file.get_tensor(origin)
        return weight

    @functools.cached_property
    def _whole(self) -> dict[str, nn.Module]:
        """The linear layers of the float model by their names; none if the files are not whole."""
        kind: Any = self._kind
        if not issubclass(kind, PreTrainedModel):
            return {}
        try:
            model, found = kind.from_pretrained(self.folder, dtype="auto", output_loading_info=True)
        except (OSError, RuntimeError, ValueError):  # of another model
            return {}
        if found["missing_keys"]:
            return {}
        set_apart(model)
        return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
