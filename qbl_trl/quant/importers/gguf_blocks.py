"""Blocks of GGUF matrices, each a group of 32 weights, as codes, scales and zeros.

| type | one group of 32 weights | weight | ours |
| --- | --- | --- | --- |
| Q4_0 | fp16 d, 16 bytes | d (q - 8) | scales d, symmetric 4-bit |
| Q4_1 | fp16 d, fp16 m, 16 bytes | d q + m | scales d, zeros -m / d in float32 |
| Q8_0 | fp16 d, 32 signed bytes | d q | scales d, codes q + 128, symmetric 8-bit |

The 16 bytes hold codes 0-15 in their low and 16-31 in their high nibbles. -m / d is rounded once in float32, so a
weight moves by at most |m| 2**-24. A group with d = 0 is constant; it becomes scale m, codes 0, zero point -1.

Source: ggml, ggml-quants.c (dequantize_row_q4_0, _q4_1, _q8_0).
"""

import torch
from torch import Tensor

from qbl_trl.config import LayerFormat
from qbl_trl.quant.affine import Affine

_GROUP = 32
FORMATS = {
    "Q4_0": LayerFormat(4, _GROUP, "none", "float16"),
    "Q4_1": LayerFormat(4, _GROUP, "float32", "float16"),
    "Q8_0": LayerFormat(8, _GROUP, "none", "float16"),
}


def split_blocks(data: Tensor, kind: str) -> Affine:
    """Blocks of a GGUF matrix as codes, scales and zeros, in the file's order of rows.

    Args:
        data: (N, bytes of a row) uint8.
        kind: "Q4_0", "Q4_1" or "Q8_0".

    Returns:
        Affine: codes (N, K) uint8, scales (N, K / 32) float16, zeros (N, K / 32) uint8 or, for Q4_1, float32.
    """
    width = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    blocks = data.view(len(data), -1, width)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if kind == "Q8_0":
        codes = blocks[..., 2:] ^ 0x80  # two's complement plus 128
        return Affine(codes.flatten(1), scales, torch.full_like(scales, 128, dtype=torch.uint8))
    nibbles = blocks[..., width - 16 :]
    codes = torch.cat([nibbles & 0x0F, nibbles >> 4], dim=-1)
    if kind == "Q4_0":
        return Affine(codes.flatten(1), scales, torch.full_like(scales, 8, dtype=torch.uint8))
    offsets = blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1)
    constant = scales == 0
    zeros = torch.where(constant, -1.0, -offsets.float() / scales.float())
    codes = codes.masked_fill(constant.unsqueeze(-1), 0)
    return Affine(codes.flatten(1), torch.where(constant, offsets, scales), zeros)
