"""Root-mean-square norms, recognized by what they compute and not by their names alone."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (silu, torch.sigmoid)  # of gates


@dataclass
class Norm:
    """y = x / sqrt(mean(x^2) + epsilon) * weight, with weight (K,)."""

    weight: Tensor
    epsilon: float


@dataclass
class GatedNorm:
    """y = norm(x a(gate)), or norm(x) a(gate): see `GatedNormMarker`."""

    norm: Norm
    activation: Callable[[Tensor], Tensor]
    gate_first: bool


def rms_norm(module: nn.Module) -> Norm | None:
    """The norm that a module is, or None."""
    found = _weight_and_epsilon(module)
    if found is None or _takes_gate(module):
        return None
    (weight, epsilon), (x, _) = found, _probes(found[0])
    with torch.no_grad():
        y = module(x.to(weight)).float().cpu()
    gains = weight.detach().float().cpu()
    for gain in (gains, gains + 1):  # Gemma stores its weight minus one
        if _close(_normed(x, epsilon) * gain, y, weight.dtype):
            return Norm(gain, epsilon)
    return None


def gated_norm(module: nn.Module) -> GatedNorm | None:
    """The norm with a gate that a module is, or None, as where it norms groups of features."""
    found = _weight_and_epsilon(module)
    if found is None or not _takes_gate(module):
        return None
    (weight, epsilon), (x, gate) = found, _probes(found[0])
    with torch.no_grad():
        y = module(x.to(weight), gate.to(weight)).float().cpu()
    gain = weight.detach().float().cpu()
    for activation, first in product(_ACTIVATIONS, (True, False)):
        opened = activation(gate)
        expected = _normed(x * opened, epsilon) if first else _normed(x, epsilon) * opened
        if _close(expected * gain, y, weight.dtype):
            return GatedNorm(Norm(gain, epsilon), activation, first)
    return None


def _weight_and_epsilon(module: nn.Module) -> tuple[Tensor, float] | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # A buffer is there for another kernel: the module reads none, and may have another width.
    known = isinstance(weight, nn.Parameter) and weight.dim() == 1 and isinstance(epsilon, float)
    return (weight, epsilon) if known and "RMSNorm" in type(module).__name__ else None  # type: ignore[return-value]


def _takes_gate(module: nn.Module) -> bool:
    return "gate" in inspect.signature(module.forward).parameters


def _probes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two inputs of a module, (2, K) each."""
    x, gate = torch.randn(2, 2, weight.shape[0], generator=torch.Generator().manual_seed(0))
    return x, gate


def _normed(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def _close(expected: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    return torch.allclose(expected, y, rtol=tolerance, atol=tolerance)
