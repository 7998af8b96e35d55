"""Where the weight change of an adapter goes, exactly: block deltas, their sums, and the zero points of the base.

    z'[n, j] = z[n, j] - delta[n // e, (j g) // p] / s[n, j]         for p a multiple of g

Codes and scales stay as they are. z' is fractional: rounding it would cost up to s / 2 per weight.

Source: QA-LoRA, arXiv:2309.14717, section 3.3; arXiv:2407.17029, section 3.
"""

import math

from torch import Tensor

from qbl_trl.errors import FoldError
from qbl_trl.quant.blocks import expand_delta


def fold(zeros: Tensor, scales: Tensor, delta: Tensor, in_factor: int, out_factor: int, group_size: int) -> Tensor:
    """Move a block delta into the zero points.

        (q - z') * s == (q - z) * s + delta[n // e, k // p]

    Args:
        zeros, scales: (N, G); zeros in code units, scales in weight units per code.
        delta: (N / e, K / p) weight units.
        in_factor, out_factor, group_size: p, e and g.

    Returns:
        (N, G) float32 zero points.

    Raises:
        FoldError: if p is not a multiple of g (delta would vary inside a group), or the shapes disagree.
    """
    if in_factor % group_size:
        raise FoldError(
            f"fold: in_factor={in_factor} is no multiple of the quantization group of {group_size}, so the change "
            "varies inside a group and is not a shift of its zero point; train with in_factor a multiple of "
            f"{group_size}, or export with the low-rank branch kept"
        )
    groups_per_block = in_factor // group_size
    if (
        zeros.shape != scales.shape
        or delta.shape[0] * out_factor != scales.shape[0]
        or delta.shape[1] * groups_per_block != scales.shape[1]
    ):
        raise FoldError(
            f"fold: zeros {tuple(zeros.shape)}, scales {tuple(scales.shape)} and delta {tuple(delta.shape)} with "
            f"in_factor={in_factor}, out_factor={out_factor}, group_size={group_size} do not describe one layer"
        )
    return zeros.float() - expand_delta(delta.float(), groups_per_block, out_factor) / scales.float()


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
