"""Block structure of a weight change: constant on e outputs by p inputs.

    dW[n, k] = delta[n // e, k // p],      dW x = expand_e(delta sum_p(x))

`sum_p` adds p neighbouring inputs, `expand_e` repeats each output e times, neighbours together. What a merged layer
adds to its codes is computed so, what an adapter trains by products of its own (`qbl_trl.adapter.products`).

Over whole groups the change is a shift of their zero points:

    z'[n, j] = z[n, j] - delta[n // e, (j g) // p] / s[n, j]         for p a multiple of g

Codes and scales stay as they are. z' is fractional: rounding it would cost up to s / 2 per weight.

Source: QA-LoRA, arXiv:2309.14717, section 3.3; arXiv:2407.17029, section 3.
"""

import math

import torch
from torch import Tensor

from qbl_trl.arithmetic import in_float64
from qbl_trl.errors import FoldError


def pool(x: Tensor, in_factor: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of p neighbouring features: (..., K) -> (..., K / p), added up in `dtype`; x is not kept for backward."""
    if in_factor == 1:
        return x if dtype is None else x.to(dtype)
    return x.unflatten(-1, (-1, in_factor)).sum(-1, dtype=dtype)


def add_expanded(y: Tensor, update: Tensor, out_factor: int) -> Tensor:
    """y + expand_e(update): (..., N) and (..., N / e) -> (..., N), without writing the expansion out."""
    update = update.to(y.dtype)
    if out_factor == 1:
        return y + update
    return (y.unflatten(-1, (-1, out_factor)) + update.unsqueeze(-1)).flatten(-2)


def expand_delta(delta: Tensor, in_factor: int, out_factor: int) -> Tensor:
    """Block delta to full weight change: (N / e, K / p) -> (N, K)."""
    rows, columns = delta.shape
    blocks = delta[:, None, :, None].expand(rows, out_factor, columns, in_factor)
    return blocks.reshape(rows * out_factor, columns * in_factor)


def fold(zeros: Tensor, scales: Tensor, delta: Tensor, in_factor: int, out_factor: int, group_size: int) -> Tensor:
    """Move a block delta into the zero points.

        (q - z') * s == (q - z) * s + delta[n // e, k // p]

    Args:
        zeros, scales: (N, G); zeros in code units, scales in weight units per code.
        delta: (N / e, K / p) weight units.
        in_factor, out_factor, group_size: p, e and g.

    Returns:
        (N, G) float32 zero points, rounded once.

    Raises:
        FoldError: if p is not a multiple of g (delta would vary inside a group), or the shapes disagree.
    """
    if in_factor % group_size:
        raise FoldError(
            f"a delta with in_factor={in_factor} varies inside groups of {group_size}: it is no shift of the zero "
            "point. Export to ONNX keeps it exact; for other formats train with quantization_aware=True"
        )
    groups_per_block = in_factor // group_size
    if (
        zeros.shape != scales.shape
        or delta.shape[0] * out_factor != scales.shape[0]
        or delta.shape[1] * groups_per_block != scales.shape[1]
    ):
        raise FoldError(
            f"zeros {tuple(zeros.shape)}, scales {tuple(scales.shape)} and delta {tuple(delta.shape)} with "
            f"in_factor={in_factor}, out_factor={out_factor}, group_size={group_size} do not describe one layer"
        )
    wide_delta, wide_scales, wide_zeros = in_float64(delta, scales, zeros)
    shift = expand_delta(wide_delta, groups_per_block, out_factor) / wide_scales
    return (wide_zeros - shift).float().to(zeros.device)


def add_deltas(
    first: Tensor, first_factors: tuple[int, int], second: Tensor, second_factors: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Sum of two block deltas of one layer, on the coarsest blocks that hold both.

    Args:
        first, second: (N / e, K / p) each with its own (p, e).

    Returns:
        The sum and its (p, e): the greatest common divisors of the two.
    """
    p = math.gcd(first_factors[0], second_factors[0])
    e = math.gcd(first_factors[1], second_factors[1])
    refined = [
        expand_delta(delta, factors[0] // p, factors[1] // e)
        for delta, factors in ((first, first_factors), (second, second_factors))
    ]
    return refined[0] + refined[1], (p, e)
