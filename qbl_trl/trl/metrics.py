"""What an adapter has done to its base so far, in numbers that fit on one line of a training log.

    shift[n, j]    = delta[n // e, (j g) // p] / s[n, j]           zero-point shift, in code units
    stable rank    = ||delta||_F^2 / ||delta||_2^2                 from a Gram matrix of delta
    adapter norm   = sqrt(sum over layers of  p e ||delta||_F^2)   = ||dW||_F

A shift of half a code is what rounding the zero point could lose; layers beyond it have left the integer grid for good.
"""

import math
import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.errors import MergeError
from qbl_trl.quant.blocks import add_deltas
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.trl.checkpoints import last_whole_checkpoint
from qbl_trl.trl.layers import active, base_of

_HALF_A_CODE = 0.5
_EXACT_UP_TO = 64  # larger Gram matrices: by Rayleigh-Ritz in a Krylov space
_KRYLOV = 24  # dimensions: a hundredth of a per cent off where all eigenvalues are as those of a random matrix


@dataclass(frozen=True)
class LayerMetrics:
    """One adapted layer.

    Attributes:
        name: full name.  kind: its last part (q_proj, down_proj, ...).
        shift_max, shift_mean: absolute zero-point shift in code units; None over a base without zero points.
        norm: ||dW||_F, weight units.
        stable_rank: of dW; 0 where dW is zero.
    """

    name: str
    kind: str
    shift_max: float | None
    shift_mean: float | None
    norm: float
    stable_rank: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure(layers: dict[str, BalancedLinear]) -> list[LayerMetrics]:
    """Measure every layer, with two transfers from the device for each. Under FSDP, every process must call this."""
    rows, quantized = [], []
    for layer in layers.values():
        delta, (p, e) = _delta(layer)
        base = base_of(layer)
        packed = isinstance(base, GroupQuantLinear)
        shift = _shift(delta, base.scales, p, e, base.group_size) if isinstance(base, GroupQuantLinear) else delta[:0]
        total, top = _norms(delta)
        largest, mean = (shift.amax(), shift.mean()) if packed else (total, total)
        rows.append(torch.stack([largest, mean, (total * (p * e)).sqrt(), total / top.clamp_min(1e-30)]).cpu())
        quantized.append(packed)
    values = torch.stack(rows).tolist()
    return [
        LayerMetrics(
            name,
            kind=name.rpartition(".")[2],
            shift_max=largest if packed else None,
            shift_mean=mean if packed else None,
            norm=norm,
            stable_rank=rank,
        )
        for name, packed, (largest, mean, norm, rank) in zip(layers, quantized, values, strict=True)
    ]


def summarize(measured: list[LayerMetrics]) -> dict[str, float]:
    """The line for the log: names begin with "qbl/", so that reporters group them."""
    line = {"qbl/adapter_norm": math.sqrt(sum(m.norm**2 for m in measured))}
    shifted = [m for m in measured if m.shift_max is not None and m.shift_mean is not None]
    if shifted:
        line["qbl/zero_point_shift_max"] = max(m.shift_max or 0.0 for m in shifted)
        line["qbl/zero_point_shift_mean"] = sum(m.shift_mean or 0.0 for m in shifted) / len(shifted)
        beyond = sum((m.shift_max or 0.0) > _HALF_A_CODE for m in shifted)
        line["qbl/layers_beyond_half_a_code"] = beyond / len(shifted)
    for kind in dict.fromkeys(m.kind for m in measured):
        ranks = [m.stable_rank for m in measured if m.kind == kind]
        line[f"qbl/stable_rank/{kind}"] = sum(ranks) / len(ranks)
    return line


def is_finite(measured: list[LayerMetrics]) -> bool:
    """False once a weight of any adapter is NaN or infinite."""
    return all(math.isfinite(m.norm) for m in measured)


def check_finite(measured: list[LayerMetrics], step: int, output_dir: str | os.PathLike[str]) -> None:
    """Stop a run whose weights are lost.

    Raises:
        MergeError: naming the first layer, and the checkpoint to go back to.
    """
    broken = next((m.name for m in measured if not is_finite([m])), None)
    if broken is not None:
        raise MergeError(
            f"step {step}: the adapter of {broken} is no longer finite. Lower the learning rate, clip gradients "
            "(max_grad_norm), or train in bfloat16 instead of float16, and resume from "
            f"{last_whole_checkpoint(output_dir) or 'the start'}"
        )


def warn_of_untrained(layers: dict[str, BalancedLinear], measured: list[LayerMetrics], step: int) -> bool:
    """Name the layers whose adapters should train and are still where they began, at zero, once others are not.

    Returns:
        Whether any adapter has moved: before that nothing can be told.
    """
    still = [m.name for m in measured if m.norm == 0]
    if len(still) == len(measured):
        return False
    stuck = [name for name in still if any(parameter.requires_grad for parameter in layers[name].parameters())]
    if stuck:
        warnings.warn(
            f"step {step}: no gradient has reached the adapters of {len(stuck)} of {len(measured)} layers, they are "
            f"still zero: {', '.join(stuck[:3])}{', ...' if len(stuck) > 3 else ''}. Either nothing in the data so far "
            "has used them (experts, towers that see or hear), or the model reads their weights without calling them, "
            "as fused kernels do, and they will never train: name these in exclude_modules",
            stacklevel=2,
        )
    return True


def _delta(layer: BalancedLinear) -> tuple[Tensor, tuple[int, int]]:
    """Sum of the active adapters' block deltas, (N / e, K / p) float32, whole even where it is sharded."""
    total: tuple[Tensor, tuple[int, int]] | None = None
    for name in active(layer):
        delta = layer.block_delta(name)
        delta = delta.full_tensor() if isinstance(delta, DTensor) else delta
        factors = (layer.in_factor[name], layer.out_factor[name])
        total = (delta, factors) if total is None else add_deltas(*total, delta, factors)
    return total if total is not None else (torch.zeros(1, 1), (1, 1))


def _shift(delta: Tensor, scales: Tensor, p: int, e: int, g: int) -> Tensor:
    """|delta| in code units: blocks of delta beside the scales they fall on, (N / e, e, columns)."""
    unit = math.gcd(p, g)
    columns = delta if p == unit else delta.repeat_interleave(p // unit, dim=1)
    grid = scales if g == unit else scales.repeat_interleave(g // unit, dim=1)
    grid = grid[:, : columns.shape[1]].reshape(-1, e, columns.shape[1]).float().abs()
    return columns.abs().unsqueeze(1) / grid


def _norms(delta: Tensor) -> tuple[Tensor, Tensor]:
    """||delta||_F^2 and ||delta||_2^2."""
    gram = delta.T @ delta if delta.shape[0] >= delta.shape[1] else delta @ delta.T
    total = gram.diagonal().sum()
    if not torch.isfinite(total):
        return total, total
    gram = gram.cpu() if gram.device.type == "mps" else gram  # which has no such decompositions
    if gram.shape[0] <= _EXACT_UP_TO:
        return total, torch.linalg.eigvalsh(gram)[-1]
    vectors = [gram[:, gram.diagonal().argmax()]]
    for _ in range(_KRYLOV - 1):
        vectors.append(gram @ (vectors[-1] / vectors[-1].norm().clamp_min(1e-30)))
    space = torch.linalg.qr(torch.stack([vector / vector.norm().clamp_min(1e-30) for vector in vectors], 1))[0]
    return total, torch.linalg.eigvalsh(space.T @ gram @ space)[-1]
