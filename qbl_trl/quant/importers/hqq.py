"""HQQ checkpoints in safetensors (transformers' and hqq's own); zero points are floats.

| tensor | shape | content |
| --- | --- | --- |
| W_q | (N G bits / 8, group_size) uint8 | one group per row; the first rows sit in the highest bits of a byte |
| W_q of 3 bits | (ceil(N G / 10), group_size) int32 | the same with 10 rows to a word |
| scale, zero | (N G, 1) float | w = (q - zero) scale |
| nbits, shape, axis, packing, ... | scalars, byte strings | the layer's own settings |

Only axis = 1 (groups along K) has the layout of this package; axis = 0 is refused.

Source: hqq, hqq/core/bitpack.py and quantize.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.importers.folders import CODES_ARE_KEPT, FolderReader
from qbl_trl.quant.importers.reader import build, dtype_name
from qbl_trl.quant.linear import GroupQuantLinear

PACKINGS = {"1bit_u8": 1, "2bit_u8": 2, "3bit_32": 3, "4bit_u8": 4, "8bit_u8": 8}  # codes of 5 and 6 bits: the last
_SETTINGS = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)


class HQQReader(FolderReader):
    """Reads HQQ folders."""

    kind = "hqq"
    marker, scales = "W_q", "scale"
    words = (torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32)  # the last: view_as_float
    parts = ("W_q", "scale", "zero", *_SETTINGS)

    def check(self) -> None:
        return None  # every layer states its own settings

    @property
    def stated_group_size(self) -> int:
        return -1  # follows from the shapes

    def group_size_of(self, name: str) -> int:
        return int(self._setting(name, "group_size") or -1)

    def geometry(self, name: str) -> tuple[int, int, int, int]:
        where = f"{self.folder}: {name}"
        if self._setting(name, "axis") != 1:
            raise CheckpointError(f"{where}: HQQ with axis=0 groups along the outputs. {CODES_ARE_KEPT}, or use axis=1")
        if self._setting(name, "quant_scale") or self._setting(name, "quant_zero"):
            raise CheckpointError(f"{where}: its scales or zeros are quantized themselves. {CODES_ARE_KEPT}")
        packing = self._text(name, "packing")
        if packing not in PACKINGS:
            raise CheckpointError(
                f"{where}: HQQ packing {packing!r} is not read; allowed: {', '.join(PACKINGS)}. {CODES_ARE_KEPT}"
            )
        bits = PACKINGS[packing]
        rows, columns = self.part(name, "shape").tolist()
        size = self.group_size_of(name)
        if size > 0 and columns % size:
            raise CheckpointError(
                f"{where}: groups of {size} weights go on from row to row of {columns}. {CODES_ARE_KEPT}"
            )
        packed = self.shards.dtype(f"{name}.W_q")
        shape, item = self.shards.shape(f"{name}.W_q"), packed.itemsize if packed is not None else 0
        wide = size if size > 0 else columns
        per_word, width = _words(bits)
        lines = -(-rows * columns // wide // per_word)  # those of 3 bits are filled up
        if math.prod(shape) * item != lines * wide * width.itemsize or shape[-1] * item != wide * width.itemsize:
            raise self.misshapen(name)
        return bits, rows, columns, self.shards.shape(f"{name}.scale")[0] // rows

    def zeros_kind(self, name: str) -> str:
        return dtype_name(f"{self.folder}: {name}.zero", self.shards.dtype(f"{name}.zero"))

    def read_layer(self, name: str) -> GroupQuantLinear:
        bits, own_size, size = self.sizes(name)
        rows, columns = self.part(name, "shape").tolist()
        packed = self.part(name, "W_q")
        if packed.is_floating_point():  # view_as_float: the same bytes under a float dtype
            packed = packed.view(_words(bits)[1])
        codes = _split_rows(packed, bits)[: rows * columns // own_size].reshape(rows, columns)
        scales, zeros = (self.part(name, part).reshape(rows, -1) for part in ("scale", "zero"))
        affine = Affine(codes, scales, zeros)
        return build(affine, bits=bits, own_size=own_size, group_size=size, symmetric=False, bias=self.bias(name))

    def _setting(self, name: str, key: str) -> Any:
        if f"{name}.{key}" in self.shards and math.prod(self.shards.shape(f"{name}.{key}")) != 1:
            raise self.misshapen(name, f" ({key} is no single value)")
        return self.part(name, key).item() if f"{name}.{key}" in self.shards else 0

    def _text(self, name: str, key: str) -> str:
        return bytes(self.part(name, key).tolist()).decode()


def _split_rows(packed: Tensor, bits: int) -> Tensor:
    """(R, C) words -> (R * codes in a word, C) codes; the first R rows sit in the highest bits."""
    mask, highest = (1 << bits) - 1, bits * (_words(bits)[0] - 1)
    return torch.cat([((packed >> shift) & mask).to(torch.uint8) for shift in range(highest, -1, -bits)])


def _words(bits: int) -> tuple[int, torch.dtype]:
    """How many codes are in a word, and what holds it."""
    return (10, torch.int32) if bits == 3 else (8 // bits, torch.uint8)
