"""Affine group quantization as pure functions.

    w[n, k] = scales[n, j] * (codes[n, k] - zeros[n, j])        with      j = k // group_size

Codes are integers in [0, 2**bits); scales are weight units per code, negative where the largest weight of a symmetric
group is positive; zeros are in code units, integer for a fresh base and fractional after an adapter was folded in. The
last group of a row may be ragged (K not a multiple of the group size). How scales and zeros are *chosen* beyond min-max
lives in `algorithms.py`.

Source: QLoRA, arXiv:2305.14314, section 2 (block-wise quantization); QA-LoRA, arXiv:2309.14717, section 3.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qbl_trl.errors import ConfigError


class Affine(NamedTuple):
    """One quantized matrix: codes (N, K) uint8, scales (N, G) float, zeros (N, G) uint8 or float."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def group_count(in_features: int, group_size: int) -> int:
    """G, the number of groups along K, the last one possibly ragged."""
    return -(-in_features // group_size)


def to_groups(values: Tensor, group_size: int) -> Tensor:
    """(N, K) -> (N, G, group_size); a ragged last group is filled with copies of its last column.

    The copies change neither the minimum nor the maximum of the group.
    """
    missing = -values.shape[-1] % group_size
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], dim=-1)
    return values.unflatten(-1, (-1, group_size))


def from_groups(grouped: Tensor, in_features: int) -> Tensor:
    """(N, G, group_size) -> (N, K): drops the filling of a ragged last group."""
    return grouped.flatten(-2)[..., :in_features]


def min_max(weight: Tensor, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> Affine:
    """Quantize by the range of each group (round to nearest, "rtn").

        asymmetric: s = (max(w, 0) - min(w, 0)) / (2**bits - 1),    z = round(-min / s)
        symmetric:  s = signed extreme / -2**(bits-1),              z = 2**(bits-1)

    The range always contains zero, so that z is a code. Scales are rounded to `scale_dtype` before the codes are
    chosen: the codes are right for the scales that are stored.

    Args:
        weight: (N, K) float.

    Returns:
        Affine with integer zeros (uint8).

    Raises:
        ConfigError: if the weight holds a value that is not finite, or one that `scale_dtype` has no scale for.
    """
    grouped = to_groups(weight.float(), group_size)
    if not torch.isfinite(grouped).all():
        raise ConfigError("quantize: the weight holds NaN or infinite values")
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    half = 1 << (bits - 1)
    if symmetric:
        extreme = torch.where(low.abs() >= high, low, high)
        scales = storable(extreme / -half, scale_dtype)
        zeros = torch.full_like(scales, half)
    else:
        scales = storable((high - low) / ((1 << bits) - 1), scale_dtype)
        zeros = (-low / scales).round_().clamp_(0, (1 << bits) - 1)
    codes = encode(weight, scales, zeros, group_size, bits)
    return Affine(codes, scales.to(scale_dtype), zeros.to(torch.uint8))


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bits: int) -> Tensor:
    """Nearest codes for given scales and zeros: (N, K) float -> (N, K) uint8."""
    grouped = to_groups(weight.float(), group_size)
    codes = (grouped / scales.float().unsqueeze(-1) + zeros.float().unsqueeze(-1)).round_().clamp_(0, (1 << bits) - 1)
    return from_groups(codes, weight.shape[-1]).to(torch.uint8)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """w = scales * (codes - zeros), in float32.

    Args:
        codes: (N, K) uint8.
        scales: (N, G) float; zeros: (N, G) uint8 or float, in code units.

    Returns:
        (N, K) float32. With integer zeros the difference is exact, so each weight carries one rounding.
    """
    in_features = codes.shape[-1]
    grouped = to_groups(codes, group_size).float()
    grouped = grouped.sub_(zeros.float().unsqueeze(-1)).mul_(scales.float().unsqueeze(-1))
    return from_groups(grouped, in_features)


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored, never zero: a group of zeros keeps any scale, its codes are the zero point."""
    stored = scales.to(dtype).float()
    if not torch.isfinite(stored).all():
        raise ConfigError(
            f"quantize: a group's scale of {float(scales.abs().max()):.1e} is beyond "
            f"{str(dtype).removeprefix('torch.')}; "
            'set scale_dtype="bfloat16" or "float32"'
        )
    return torch.where(stored == 0, torch.ones_like(stored), stored)
