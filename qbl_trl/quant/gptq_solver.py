"""GPTQ: codes that minimise the error of a layer's output instead of the error of its weight.

    min over codes of  tr((W - Wq) H (W - Wq)^T),      H = sum of x x^T over calibration inputs x

Columns are rounded one after the other; the error of each is pushed onto the columns that follow, along the rows of
U, the upper Cholesky factor of H^-1 = U^T U:

    e = (w[:, i] - wq[:, i]) / U[i, i],      w[:, i:] -= e U[i, i:]

Groups are visited by falling importance (their largest diagonal value of H), and so are the columns inside a group;
each group's scales and zeros are chosen when it is reached. Groups stay contiguous along K, so nothing is stored
beside codes, scales and zeros: "act order" without a permutation.

Source: GPTQ, arXiv:2210.17323; group-aware ordering as in GPTQModel (`act_group_aware`).
"""

from typing import Protocol

import torch
from torch import Tensor

from qbl_trl.errors import ConfigError
from qbl_trl.quant.affine import Affine, group_count

_BLOCK_ROWS = 8192  # rounded at once on a CPU: enough that its many short steps do not count
_DAMP_LIMIT = 1.0  # times the mean of the diagonal: then errors hardly travel and the result is rounding


class Grid(Protocol):
    """Chooses scales and zeros for groups: (N, 1, group_size) float32 -> two (N, 1) float32."""

    def __call__(self, grouped: Tensor, *, importance: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    grid: Grid,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    damp: float = 0.01,
) -> Affine:
    """Round `weight` with error feedback.

    Args:
        weight: (N, K) float.
        hessian: (K, K) float32 or float64, symmetric, positive semi-definite; its scale does not matter.
        grid: chooses scales (already rounded to `scale_dtype`) and integer zeros of one group.
        damp: share of the mean diagonal added to the diagonal; grows tenfold while the Hessian is not definite.

    Returns:
        Affine: codes (N, K) uint8, scales (N, G) scale_dtype, zeros (N, G) uint8.

    Raises:
        ConfigError: if the Hessian is not (K, K), not finite, or not positive definite under any damping.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ConfigError(f"gptq: a hessian of {tuple(hessian.shape)} for {columns} inputs; it must be (K, K)")
    if not torch.isfinite(hessian).all():
        raise ConfigError("gptq: the hessian holds NaN or infinite values; check the calibration data")
    groups = group_count(columns, group_size)
    diagonal = hessian.diagonal()
    members = [torch.arange(g * group_size, min((g + 1) * group_size, columns)) for g in range(groups)]
    members = [ids[diagonal[ids.to(diagonal.device)].argsort(descending=True, stable=True).cpu()] for ids in members]
    visits = sorted(range(groups), key=lambda g: (-float(diagonal[members[g][0]]), g))
    order = torch.cat([members[g] for g in visits]).to(weight.device)
    upper = inverse_factor(hessian[order][:, order], damp)
    sizes = [len(members[g]) for g in visits]
    rows = _BLOCK_ROWS if weight.device.type == "cpu" else _BLOCK_ROWS * 16
    blocks = weight.split(rows)  # a row never sees another
    parts = [_round(block, order, upper, sizes, grid, (1 << bits) - 1, scale_dtype) for block in blocks]
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    visited = torch.tensor(visits, device=weight.device).argsort()
    return Affine(codes, scales[:, visited], zeros[:, visited])


def _round(
    weight: Tensor, order: Tensor, upper: Tensor, sizes: list[int], grid: Grid, top: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K) of rows, and scales and zeros (N, G) in the order of visits: groups of `sizes` along `order`."""
    work = weight.T[order].to(upper.dtype)  # (K, N): one input of all rows lies together in memory
    codes = torch.empty_like(work, dtype=torch.uint8)
    scales, zeros = [], []
    importance = 1 / upper.diagonal() ** 2  # what rounding one input costs once those behind it have adapted
    start = 0
    for size in sizes:
        stop = start + size
        block, factor = work[start:stop], upper[start:stop, start:stop]
        s, z = grid(block.float().T.contiguous().unsqueeze(1), importance=importance[start:stop].float())
        scales.append(s.to(scale_dtype))
        zeros.append(z.to(torch.uint8))
        s, z = s[:, 0].to(work.dtype), z[:, 0].to(work.dtype)
        errors = torch.empty_like(block)
        for i in range(size):
            code = (block[i] / s + z).round_().clamp_(0, top)
            codes[start + i] = code.to(torch.uint8)
            errors[i] = (block[i] - s * (code - z)) / factor[i, i]
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T, torch.cat(scales, 1), torch.cat(zeros, 1)


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damp mean(diag H) I)^-1, without forming the inverse.

    With J the reversal of rows and columns and J H J = L L^T, the factor is U = (J L J)^-1.
    Inputs that calibration never switched on get the mean diagonal: their columns are simply rounded.

    Raises:
        ConfigError: if no damping up to the mean diagonal makes the Hessian definite.
    """
    mean = hessian.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while damp <= _DAMP_LIMIT:
        damped = hessian / mean
        dead = hessian.diagonal() == 0
        damped.diagonal().add_(dead.to(damped.dtype)).add_(damp)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return upper
        damp *= 10
    raise ConfigError(
        "gptq: the hessian is not positive definite under any damping; give more, and more varied, calibration texts"
    )
