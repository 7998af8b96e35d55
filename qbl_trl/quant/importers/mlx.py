"""MLX checkpoints (mlx-lm), mode "affine", and what transformers 5 writes for Apple's GPUs (`MetalConfig`).

| tensor | shape | content |
| --- | --- | --- |
| weight | (N, K bits / 32) uint32 | codes along K, little-endian |
| scales | (N, G) float | s; a quantizer may make it negative |
| biases (Metal: qbiases) | (N, G) float | b: w = s q + b, so that the zero point is -b / s |

Embeddings are quantized as linear layers are. They become float32, which is exact, as heads do. Experts of a mixture
lie in one tensor of three dimensions, `switch_mlp.up_proj`, and become layers of their own.

Sources: mlx, python/mlx/nn/layers/quantized.py, and the documentation of mlx.core.quantize; transformers 5,
integrations/metal_quantization.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.checkpoint import Declared
from qbl_trl.quant.importers.folders import CODES_ARE_KEPT, FolderReader
from qbl_trl.quant.importers.reader import build, split_words
from qbl_trl.quant.importers.shards import Shards
from qbl_trl.quant.linear import GroupQuantLinear

_GROUP_SIZE, _BITS = 64, 4  # where none are stated
_STACKED, _EXPERT = ".switch_mlp.", re.compile(r"\.experts\.\d+\.")


class MLXReader(FolderReader):
    """Reads MLX folders, in which every quantized module has `scales`."""

    kind = "mlx"
    marker, parts, scales = "scales", ("weight", "scales", "biases"), "scales"
    words = (torch.float16, torch.bfloat16, torch.float32)

    def __init__(self, folder: Path, quantization: Mapping[str, Any]) -> None:
        super().__init__(folder, quantization, _ExpertsApart(folder))

    def check(self) -> None:
        modes = {self.quantization.get("mode")} | {self.own(name).get("mode") for name in self.quantization}
        others = sorted(str(mode) for mode in modes - {None, "affine"})
        if others:
            raise CheckpointError(
                f"{self.folder}: MLX mode {', '.join(others)} is not read; allowed: affine. {CODES_ARE_KEPT}"
            )

    @property
    def stated_group_size(self) -> int:
        return int(self.quantization.get("group_size") or _GROUP_SIZE)

    def own(self, name: str) -> dict[str, Any]:
        stated = self.quantization.get(_EXPERT.sub(_STACKED, name))
        return dict(stated) if isinstance(stated, dict) else {}

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in super().config().items() if key != "quantization"}

    def is_float(self, name: str) -> bool:
        last = name.rpartition(".")[2]
        return "embed" in last or last == "wte" or super().is_float(name)

    def geometry(self, name: str) -> tuple[int, int, int, int]:
        scales, offsets = f"{name}.{self.scales}", f"{name}.{self.parts[2]}"
        if self.shards.dtype(f"{name}.weight") != torch.uint32 or offsets not in self.shards:
            raise self.misshapen(name)
        if self.shards.shape(offsets) != self.shards.shape(scales):
            raise self.misshapen(name)
        bits = int(self.own(name).get("bits") or self.quantization.get("bits") or _BITS)
        out_features, words = self.shards.shape(f"{name}.weight")
        return bits, out_features, words * 32 // bits, self.shards.shape(f"{name}.scales")[1]

    def zeros_kind(self, name: str) -> str:
        return "float32"

    def read_layer(self, name: str) -> GroupQuantLinear:
        bits, own_size, size = self.sizes(name)
        codes = split_words(self.part(name, "weight").view(torch.int32), bits, 1)
        scales, offsets = self.part(name, "scales"), self.part(name, self.parts[2]).float()
        if bool(((scales == 0) & (offsets != 0)).any()):
            raise CheckpointError(
                f"{self.folder}: {name} has groups without a scale, whose weights no zero point gives. {CODES_ARE_KEPT}"
            )
        zeros = -offsets / scales.float().where(scales != 0, 1)
        affine = Affine(codes, scales, zeros)
        return build(affine, bits=bits, own_size=own_size, group_size=size, symmetric=False, bias=self.bias(name))


class MetalReader(MLXReader):
    """Reads what `MetalConfig` of transformers wrote: MLX's layers under another name for b."""

    kind = "metal"
    parts = ("weight", "scales", "qbiases")


class _ExpertsApart(Shards):
    """Tensors of a folder, those of stacked experts one by one: `switch_mlp.up_proj.weight` (E, ...) as
    `experts.3.up_proj.weight` (...)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._slices: dict[str, tuple[str, int]] = {}
        for name, (file, dtype, shape) in list(self._stored.items()):
            if _STACKED in name and shape:
                del self._stored[name]
                for index in range(shape[0]):
                    own = name.replace(_STACKED, f".experts.{index}.")
                    self._stored[own], self._slices[own] = Declared(file, dtype, shape[1:]), (name, index)

    def _read(self, file: Any, name: str) -> Tensor:
        if name not in self._slices:
            return super()._read(file, name)
        stacked, index = self._slices[name]
        tensor: Tensor = file.get_slice(stacked)[index]
        return tensor
