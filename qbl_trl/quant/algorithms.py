"""How the codes, scales and zero points of a weight are chosen.

    w[n, k] ~ scales[n, j] * (codes[n, k] - zeros[n, j])        with      j = k // group_size

| algorithm | chosen to minimise | zeros | needs |
| --- | --- | --- | --- |
| "rtn" | nothing: the range of the group decides | integer | |
| "mse" | sum of squared weight errors: clip search, then least squares | integer | |
| "hqq" | sum of |weight error|**0.7, by half-quadratic steps on the zero point | float | |
| "gptq" | squared error of the layer's *output* on calibration data | integer | the input Hessian |

Every one of them rounds scales (and float zeros) to the dtype in which they are stored before the last codes are
chosen, so the codes are right for what is stored. Work goes a block of rows at a time: a row never sees another.

hqq keeps its zeros in the dtype of the scales: on SmolLM2 at 4 bits in groups of 128 the relative squared error is
0.00924 with float32, float16 and bfloat16 zeros alike, and 0.01087 with zeros rounded to integers, against 0.01085 of
rtn. Rounding gives the whole gain away, so there is no integer variant of it; the integer choice is "mse".

Left out: the collection of Hessians, see `calibration.py`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qbl_trl.allowed import ALGORITHMS
from qbl_trl.errors import ConfigError
from qbl_trl.quant.affine import Affine, encode, group_count, min_max, storable, to_groups
from qbl_trl.quant.gptq_solver import gptq
from qbl_trl.quant.packing import check_bits

_BLOCK_WEIGHTS = 1 << 18  # 1 MB of float32: the passes over one block stay in a core's cache
_SHRINKS = 24  # candidates for the clipped range, from 1 down to 1 / 3
_REFITS = 4  # least-squares rounds after the search; the error cannot grow in any of them
_QUICK = (3, 0.8, 1)  # candidates, the narrowest range and rounds of a search that takes an eighth of the time
_STEPS = 4  # a scale of fewer of them is off by an eighth and more

RowQuantizer = Callable[[Tensor], Affine]


def quantize(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    algorithm: str = "rtn",
    scale_dtype: torch.dtype = torch.float16,
    hessian: Tensor | None = None,
    quick: bool = False,
) -> Affine:
    """Quantize one weight matrix.

    Args:
        weight: (N, K) float.
        bits: 2, 4 or 8.
        group_size: weights along K that share a scale and a zero point; the last group may be ragged.
        symmetric: every zero point is 2**(bits-1).
        algorithm: "rtn", "mse", "hqq" or "gptq", see the table above.
        scale_dtype: float16, bfloat16 or float32; the dtype in which scales (and hqq's zeros) are stored.
        hessian: (K, K) float, sum or mean of x x^T over calibration inputs x; "gptq" only.
        quick: "gptq" only: a shorter search for the scales, for matrices with a row for every token.

    Returns:
        Affine: codes (N, K) uint8, scales (N, G) scale_dtype, zeros (N, G) uint8, or scale_dtype for "hqq".

    Raises:
        ConfigError: if the weight is not a finite matrix, or too small or large for `scale_dtype`, a setting is
            unknown, "hqq" is asked for symmetric codes (it has no zero point to choose), or the Hessian is missing,
            misshapen or not wanted.

    Source: HQQ, mobiusml.github.io/hqq_blog; GPTQ, arXiv:2210.17323.
    """
    check_bits(bits)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ConfigError(f"quantize: a weight of {tuple(weight.shape)} {weight.dtype}; give an (N, K) float matrix")
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"quantize: algorithm={algorithm!r} is not known; allowed: {', '.join(ALGORITHMS)}")
    if (hessian is None) == (algorithm == "gptq"):
        raise ConfigError(
            'quantize: algorithm="gptq" needs the hessian of the layer\'s inputs, (K, K); gptq_model_ collects it from '
            "calibration data"
            if hessian is None
            else f'quantize: a hessian was given, but algorithm={algorithm!r} does not use one; set algorithm="gptq"'
        )
    if algorithm == "hqq" and symmetric:
        raise ConfigError(
            'quantize: algorithm="hqq" optimises the zero point, and symmetric codes have none; use symmetric=False, '
            'or algorithm="mse"'
        )
    if not torch.isfinite(weight).all():
        raise ConfigError("quantize: the weight holds NaN or infinite values")
    _check_resolved(weight, bits, scale_dtype)
    if hessian is not None:
        grid = partial(clip_search, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype, quick=quick)
        return gptq(weight, hessian, grid=grid, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
    rows: RowQuantizer
    if algorithm == "rtn":
        rows = partial(min_max, group_size=group_size, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    elif algorithm == "mse":
        rows = partial(_mse, group_size=group_size, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    else:
        rows = partial(half_quadratic, group_size=group_size, bits=bits, scale_dtype=scale_dtype)
    return _by_rows(rows, weight, group_size)


def _check_resolved(weight: Tensor, bits: int, scale_dtype: torch.dtype) -> None:
    """Refuse a matrix whose every scale would be a few of the smallest steps of its dtype, or none.

    Groups of a larger matrix may vanish so: what they add to its output does, too.
    """
    kind = torch.finfo(scale_dtype)
    largest, step = float(weight.abs().max()), kind.smallest_normal * kind.eps
    if 0 < 2 * largest / ((1 << bits) - 1) < _STEPS * step:
        raise ConfigError(
            f"quantize: weights of at most {largest:.1e} have no scales of {bits} bits in "
            f'{str(scale_dtype).removeprefix("torch.")}; set scale_dtype="bfloat16" or "float32"'
        )


def clip_search(
    grouped: Tensor,
    *,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
    quick: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales and integer zeros of least squared error: a search over clipped ranges, then least squares.

        search:  s, z from the range [t_low low, t_high high], both ends together, then each end alone
        refit:   s = sum(h w (q - z)) / sum(h (q - z)^2)    for the nearest codes q, kept where the error shrinks

    Args:
        grouped: (N, G, group_size) float32.
        importance: (group_size,) or (G, group_size), h, the weight of each squared error; all 1 if not given.
        quick: fewer ranges, whose ends move together, and one round of least squares.

    Returns:
        scales (N, G) float32, rounded to `scale_dtype`; zeros (N, G) float32, whole numbers in [0, 2**bits).
    """
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    if symmetric:
        largest = torch.maximum(-low, high)
        flipped = torch.where(-low >= high, 1.0, -1.0)  # the extreme takes code 0, half a step further than the top
        low, high = -largest, largest
    top, half = (1 << bits) - 1, 1 << (bits - 1)

    def grid(t_low: Tensor | float, t_high: Tensor | float) -> tuple[Tensor, Tensor]:
        if symmetric:
            return storable(flipped * largest * t_low / half, scale_dtype), torch.full_like(low, half)
        scales = storable((high * t_high - low * t_low) / top, scale_dtype)
        return scales, (-low * t_low / scales).round_().clamp_(0, top)

    def error(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        s, z = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        steps = (grouped / s).add_(z).round_().clamp_(0, top).sub_(z)
        wrong = (steps * s).sub_(grouped).square_()
        return (wrong if importance is None else wrong.mul_(importance)).sum(-1), steps

    count, narrowest, refits = _QUICK if quick else (_SHRINKS, 1 / 3, _REFITS)
    ratios = torch.linspace(1.0, narrowest, count).tolist()
    best_low, best_high = torch.ones_like(low), torch.ones_like(low)
    scales, zeros = grid(best_low, best_high)
    least, _ = error(scales, zeros)
    for ends in ((True, True),) if symmetric or quick else ((True, True), (True, False), (False, True)):
        start_low, start_high = best_low.clone(), best_high.clone()
        for ratio in ratios[1:]:
            t_low = start_low * ratio if ends[0] else start_low
            t_high = start_high * ratio if ends[1] else start_high
            found = grid(t_low, t_high)
            wrong, _ = error(*found)
            better = wrong < least
            least = torch.where(better, wrong, least)
            scales, zeros = torch.where(better, found[0], scales), torch.where(better, found[1], zeros)
            best_low, best_high = torch.where(better, t_low, best_low), torch.where(better, t_high, best_high)
    for _ in range(refits):
        _, steps = error(scales, zeros)
        weighted = steps if importance is None else steps * importance
        fitted = (weighted * grouped).sum(-1) / (weighted * steps).sum(-1)
        fitted = storable(torch.where(torch.isfinite(fitted.to(scale_dtype)), fitted, scales), scale_dtype)
        wrong, _ = error(fitted, zeros)
        scales, least = torch.where(wrong < least, fitted, scales), torch.minimum(wrong, least)
    return scales, zeros


def half_quadratic(
    weight: Tensor,
    *,
    group_size: int,
    bits: int,
    scale_dtype: torch.dtype,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    steps: int = 20,
) -> Affine:
    """Scales from the range, zero points by half-quadratic splitting (HQQ): large errors count little.

        e = shrink(w - s (q - z)),   shrink(x) = sign(x) max(|x| - |x|**(norm - 1) / beta, 0)
        z = mean(q - (w - e) / s),   beta grows by kappa

    Source: github.com/mobiusml/hqq, hqq/core/optimize.py, optimize_weights_proximal_legacy.
    """
    grouped, top = to_groups(weight.float(), group_size), (1 << bits) - 1
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    s = storable((high - low) / top, scale_dtype)
    far = (low / s).abs() > torch.finfo(scale_dtype).max / 2  # a narrow range far from zero has no such zero point
    s = storable(torch.where(far, high.clamp(min=0) - low.clamp(max=0), high - low) / top, scale_dtype)
    z = -torch.where(far, low.clamp(max=0), low) / s
    best, least = z, torch.full_like(z, torch.inf)
    for _ in range(steps):
        codes = (grouped / s + z).round_().clamp_(0, top)
        wrong = grouped - s * (codes - z)
        total = wrong.abs().pow_(norm).sum(-1, keepdim=True)
        best, least = torch.where(total < least, z, best), torch.minimum(total, least)
        size = wrong.abs()
        shrunk = wrong.sign() * (size - size.pow(norm - 1) / beta).clamp_(min=0)
        z = (codes - (grouped - shrunk) / s).mean(-1, keepdim=True)
        beta *= kappa
    zeros = best.squeeze(-1).to(scale_dtype)
    scales = s.squeeze(-1)
    return Affine(encode(weight, scales, zeros, group_size, bits), scales.to(scale_dtype), zeros)


def _mse(weight: Tensor, *, group_size: int, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> Affine:
    scales, zeros = clip_search(
        to_groups(weight.float(), group_size), bits=bits, symmetric=symmetric, scale_dtype=scale_dtype
    )
    codes = encode(weight, scales, zeros, group_size, bits)
    return Affine(codes, scales.to(scale_dtype), zeros.to(torch.uint8))


def _by_rows(rows: RowQuantizer, weight: Tensor, group_size: int) -> Affine:
    """Quantize a block of rows at a time; on an accelerator the blocks are larger."""
    budget = _BLOCK_WEIGHTS if weight.device.type == "cpu" else _BLOCK_WEIGHTS * 64
    step = max(budget // (group_count(weight.shape[1], group_size) * group_size), 1)
    parts = [rows(block) for block in torch.split(weight, step)]
    return Affine(*(torch.cat(column) for column in zip(*parts, strict=True)))
