"""Slow, literal oracles: the equations of the adapter written as loops, in float64."""

import torch
from torch import Tensor, nn

from qbl_trl import QBLoRAConfig
from qbl_trl.adapter.layer import BalancedLinear


def naive_delta(a: Tensor, b: Tensor, gain: float, p: int, e: int) -> Tensor:
    """dW[n, k] = gain * sum_r B[n // e, r] A[r, k // p], one weight at a time."""
    a, b = a.detach().double(), b.detach().double()
    delta = torch.zeros(b.shape[0] * e, a.shape[1] * p, dtype=torch.float64)
    for n in range(delta.shape[0]):
        for k in range(delta.shape[1]):
            delta[n, k] = gain * sum(float(b[n // e, r]) * float(a[r, k // p]) for r in range(a.shape[0]))
    return delta


def naive_pool(x: Tensor, p: int) -> Tensor:
    """Sum of p neighbours, one value at a time: (T, K) -> (T, K / p)."""
    pooled = torch.zeros(x.shape[0], x.shape[1] // p, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(x.shape[1]):
            pooled[t, k // p] += float(x[t, k])
    return pooled


def dense(layer: BalancedLinear, adapter: str = "default") -> Tensor:
    """dW of a layer by repeated rows and columns, in float64 and with gradients to A and B."""
    if adapter in layer.lora_block:
        block = layer.lora_block[adapter].weight.double()
    else:
        block = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
    p, e = layer.in_factor[adapter], layer.out_factor[adapter]
    return block.repeat_interleave(e, 0).repeat_interleave(p, 1) * layer.gain(adapter)


def balanced(base: nn.Module, name: str = "default", **settings: object) -> BalancedLinear:
    """A base layer wrapped with a random (not zero) adapter."""
    settings = {"r": 4, "init_lora_weights": False, **settings}
    config = QBLoRAConfig(**settings)  # type: ignore[arg-type]
    return BalancedLinear(base, name, config, r=config.r, lora_alpha=config.lora_alpha, target_name="layer")
