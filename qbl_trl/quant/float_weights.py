"""The float weights of a folder by the names that a model has for their layers."""

import functools
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qbl_trl.json_files import json_if_there
from qbl_trl.quant.checkpoint import read_headers
from qbl_trl.quant.experts import Experts
from qbl_trl.quant.modules import empty_model, same_module_name
from qbl_trl.quant.renaming import names_in_model
from qbl_trl.quant.stacks import unstack_


class FloatWeights:
    """Weights of layers, (outputs, inputs), in the type that a folder's safetensors files hold them in.

    They are read one at a time; a head that the files lack is tied to the embedding. For experts that the files stack
    the float model is loaded whole.

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
        known = isinstance(model, PreTrainedModel)
        own = names_in_model(model, self._stored) if known else {}
        self._origins = {own.get(origin, origin): origin for origin in self._stored}
        plain = empty_model(type(model), model.config).named_modules() if known else ()
        self._transposed = {name for name, layer in plain if isinstance(layer, Conv1D)}
        self._experts = tuple(f"{path}." for path, layer in model.named_modules() if isinstance(layer, Experts))
        head, table = (getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("output", "input"))
        if known and isinstance(head, nn.Module) and isinstance(table, nn.Module):
            names = [f"{same_module_name(model, layer)}.weight" for layer in (head, table)]
            if names[0] not in self._origins and names[1] in self._origins:
                self._origins[names[0]] = self._origins[names[1]]

    def __bool__(self) -> bool:
        return bool(self._stored)

    def read(self, layer: str) -> Tensor | None:
        """The weight of a layer, None where the folder has none."""
        origin = self._origins.get(f"{layer}.weight")
        if origin is None:
            found = self._whole.get(layer) if layer.startswith(self._experts) else None
            return None if found is None else found.weight.detach()  # type: ignore[union-attr, operator]
        with safe_open(self._stored[origin].file, framework="pt") as file:  # type: ignore[no-untyped-call]
            weight: Tensor = file.get_tensor(origin)
        return weight.T if layer in self._transposed else weight

    @functools.cached_property
    def _whole(self) -> dict[str, nn.Module]:
        """The linear layers of the float model by their names; none if the files are of another one, or not whole."""
        kind: Any = self._kind
        stored = json_if_there(self.folder / "config.json")
        if not stored or "quantization_config" in stored:
            return {}
        try:
            model, found = kind.from_pretrained(self.folder, dtype="auto", output_loading_info=True)
        except (OSError, RuntimeError, ValueError):  # of another model
            return {}
        if found["missing_keys"]:
            return {}
        unstack_(model)
        return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
