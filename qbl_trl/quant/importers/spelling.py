"""Experts under the names that files have for them, where a quantizer named them as it saw them.

Tools that separate the experts which transformers 5 stacks in one tensor save these layers under the names of the
module they made. A few models have other names in their files, which transformers 4.57 and 5 read:

| models | tools under transformers 5 | files |
| --- | --- | --- |
| Mixtral, MiniMax, PhiMoE | `mlp.` or `block_sparse_moe.` | `block_sparse_moe.` |
| these and LFM2-MoE | `experts.3.gate_proj`, `.up_proj`, `.down_proj` | `experts.3.w1`, `.w3`, `.w2` |
| PhiMoE | `mlp.router.weight` | `block_sparse_moe.gate.weight` |

Source: transformers 5, conversion_mapping.py.
"""

import re
from typing import Any

from torch import Tensor

from qbl_trl.config import LayerFormat
from qbl_trl.quant.importers.reader import Reader
from qbl_trl.quant.linear import GroupQuantLinear

_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(rf"(\.experts\.\d+\.)({'|'.join(_PARTS)})(?=\.|$)")
_MOVED = ("mixtral", "minimax", "minimax_m2", "phimoe")


def name_in_files(model_type: str, name: str) -> str:
    """The name that files of a model have for a tensor or layer (itself where a tool did not rename it)."""
    if model_type in _MOVED:
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if model_type == "phimoe":
            name = name.replace(".block_sparse_moe.router.", ".block_sparse_moe.gate.")
    elif model_type != "lfm2_moe":
        return name
    return _EXPERT.sub(lambda found: found[1] + _PARTS[found[2]], name)


class Respelled(Reader):
    """Another reader's checkpoint, under the names of `name_in_files`."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self.kind = reader, reader.kind
        model_type = str(reader.config().get("model_type"))
        names = [*reader.formats(), *reader.inside(), *reader.others()]
        self._theirs = {name_in_files(model_type, name): name for name in names}
        self._ours = {theirs: ours for ours, theirs in self._theirs.items()}

    def config(self) -> dict[str, Any]:
        return self._reader.config()

    def formats(self) -> dict[str, LayerFormat]:
        return {self._ours[name]: stored for name, stored in self._reader.formats().items()}

    def read_layer(self, name: str) -> GroupQuantLinear:
        return self._reader.layer(self._theirs[name])

    def inside(self) -> dict[str, tuple[int, ...]]:
        return {self._ours[name]: shape for name, shape in self._reader.inside().items()}

    def others(self) -> dict[str, tuple[int, ...]]:
        return {self._ours[name]: shape for name, shape in self._reader.others().items()}

    def tensor(self, name: str) -> Tensor:
        return self._reader.tensor(self._theirs[name])
