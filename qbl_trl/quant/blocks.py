"""Block structure of a weight change: constant on e outputs by p inputs.

    dW[n, k] = delta[n // e, k // p],      dW x = expand_e(delta sum_p(x))

`sum_p` adds p neighbouring inputs, `expand_e` repeats each output e times, neighbours together. A trained adapter and
a merged layer compute their change by these same functions.
"""

import torch
from torch import Tensor


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
