"""Blocks of GGUF matrices as codes, scales and zeros.

| type | a block | a group | a weight | ours |
| --- | --- | --- | --- | --- |
| Q4_0, Q5_0, Q8_0 | 32 weights | 32 | d (q - half), Q8_0 d q of signed q | symmetric |
| Q4_1, Q5_1 | 32 weights | 32 | d q + m | zeros -m / d in float32 |
| Q3_K, Q6_K | 256 weights | 16 | d s (q - half), s of 6 and 8 bits, signed | symmetric, scales d s in float32 |
| Q2_K | 256 weights | 16 | d s q - e m, s and m of 4 bits | scales d s, zeros e m / (d s) in float32 |
| Q4_K, Q5_K | 256 weights | 32 | the same, s and m of 6 bits | the same |

d, e and the m of Q4_1 and Q5_1 are float16, so d s and e m are exact in float32. A zero point is rounded once, to
float32: a weight moves by at most |offset| 2**-24. A group with scale 0 is constant, and no adapter would fold into its
zero point: it becomes scale offset, codes 0, zero point -1, or, at offset 0, zeros under the usual scale of the matrix.
Codes of 3 bits are stored in 4, those of 5 and 6 in 8.

Source: ggml, ggml-common.h (block_q4_0, ...) and ggml-quants.c (dequantize_row_q4_0, ...).
"""

import torch
from torch import Tensor

from qbl_trl.config import LayerFormat
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine

FORMATS = {
    "Q4_0": LayerFormat(4, 32, "none", "float16"),
    "Q4_1": LayerFormat(4, 32, "float32", "float16"),
    "Q5_0": LayerFormat(8, 32, "none", "float16"),
    "Q5_1": LayerFormat(8, 32, "float32", "float16"),
    "Q8_0": LayerFormat(8, 32, "none", "float16"),
    "Q2_K": LayerFormat(2, 16, "float32", "float32"),
    "Q3_K": LayerFormat(4, 16, "none", "float32"),
    "Q4_K": LayerFormat(4, 32, "float32", "float32"),
    "Q5_K": LayerFormat(8, 32, "float32", "float32"),
    "Q6_K": LayerFormat(8, 16, "none", "float32"),
}
_FIELDS = {  # bytes of a block, field by field
    "Q4_0": (2, 16),
    "Q4_1": (2, 2, 16),
    "Q5_0": (2, 4, 16),
    "Q5_1": (2, 2, 4, 16),
    "Q8_0": (2, 32),
    "Q2_K": (16, 64, 2, 2),
    "Q3_K": (32, 64, 8, 4, 2),
    "Q4_K": (2, 2, 12, 128),
    "Q5_K": (2, 2, 12, 32, 128),
    "Q6_K": (128, 64, 16, 2),
}


def split_blocks(data: Tensor, kind: str) -> Affine:
    """Blocks of a GGUF matrix as codes, scales and zeros, in the file's order of rows.

    Args:
        data: (N, bytes of a row) uint8.
        kind: a key of FORMATS.

    Returns:
        Affine: codes (N, K) uint8; scales (N, K / g) and zeros (N, K / g) in the dtypes of FORMATS, zeros of symmetric
        types uint8.

    Raises:
        CheckpointError: if a row is no whole number of blocks.
    """
    fields = _FIELDS[kind]
    if data.shape[1] % sum(fields):
        raise CheckpointError(f"a row of {data.shape[1]} bytes holds no whole blocks of {kind} ({sum(fields)} bytes)")
    parts = data.view(len(data), -1, sum(fields)).split(fields, dim=-1)
    match kind:
        case "Q4_0":
            d, low = parts
            return _symmetric(_planes(low, 4, 16), _half(d), 8, 4)
        case "Q5_0":
            d, high, low = parts
            return _symmetric(_planes(low, 4, 16) | _planes(high, 1, 1) << 4, _half(d), 16, 8)
        case "Q8_0":
            d, signed = parts
            return _symmetric(signed ^ 0x80, _half(d), 128, 8)  # two's complement plus 128
        case "Q4_1":
            d, m, low = parts
            return _offset(_planes(low, 4, 16), _half(d), _half(m))
        case "Q5_1":
            d, m, high, low = parts
            return _offset(_planes(low, 4, 16) | _planes(high, 1, 1) << 4, _half(d), _half(m))
        case "Q2_K":
            both, low, d, e = parts
            return _offset(_planes(low, 2, 32), _half(d).float() * (both & 15), -_half(e).float() * (both >> 4))
        case "Q3_K":
            high, low, s_low, s_high, d = parts
            s = (_planes(s_low, 4, 8) | _planes(s_high, 2, 4) << 4).float() - 32
            return _symmetric(_planes(low, 2, 32) | _planes(high, 1, 32) << 2, _half(d).float() * s, 4, 4)
        case "Q6_K":
            low, high, s, d = parts
            codes = _planes(low, 4, 64) | _planes(high, 2, 32) << 4
            return _symmetric(codes, _half(d).float() * s.view(torch.int8), 32, 8)
        case _:  # Q4_K, Q5_K
            d, e, six_bits, *high, low = parts
            first, second, both = six_bits.split(4, dim=-1)
            s = torch.cat([first & 63, both & 15 | first >> 2 & 48], dim=-1)
            m = torch.cat([second & 63, both >> 4 | second >> 2 & 48], dim=-1)
            codes = _planes(low, 4, 32)
            if high:
                codes |= _planes(high[0], 1, 32) << 4
            return _offset(codes, _half(d).float() * s, -_half(e).float() * m)


def _planes(data: Tensor, bits: int, span: int) -> Tensor:
    """Each run of `span` bytes as its lowest bits, then its next, ...: (.., B) bytes -> (.., B * 8 / bits) codes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    runs = data.unflatten(-1, (-1, 1, span))
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(-3)


def _half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16)


def _symmetric(codes: Tensor, scales: Tensor, middle: int, bits: int) -> Affine:
    """w = scales (codes - middle), with the middle moved to that of the stored width."""
    half = 1 << (bits - 1)
    scales = scales.flatten(1)
    zeros = torch.full_like(scales, half, dtype=torch.uint8)
    return _without_zero_scales(Affine((codes + (half - middle)).flatten(1), scales, zeros))


def _offset(codes: Tensor, scales: Tensor, offsets: Tensor) -> Affine:
    """w = scales codes + offsets."""
    codes, scales, offsets = codes.flatten(1), scales.flatten(1), offsets.flatten(1)
    constant = scales == 0
    zeros = torch.where(constant, -1.0, -offsets.float() / scales.float())
    codes = codes.masked_fill(_each(constant, codes), 0)
    return _without_zero_scales(Affine(codes, torch.where(constant, offsets, scales), zeros))


def _without_zero_scales(affine: Affine) -> Affine:
    codes, scales, zeros = affine
    zero = scales == 0
    if not zero.any():
        return affine
    usual = 1.0 if zero.all() else float(scales[~zero].float().abs().mean())
    if zeros.is_floating_point():
        zeros = zeros.masked_fill(zero, 0)
    return Affine(
        torch.where(_each(zero, codes), _each(zeros, codes).to(torch.uint8), codes),
        scales.masked_fill(zero, usual),
        zeros,
    )


def _each(groups: Tensor, codes: Tensor) -> Tensor:
    """(N, G) -> (N, K): what holds for a group, for each of its codes."""
    return groups.repeat_interleave(codes.shape[1] // groups.shape[1], dim=1)
