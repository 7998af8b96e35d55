"""The trained matrices of a balanced adapter as modules.

They are `nn.Linear` in every respect (name, state, what wraps or shards them) and are called, never read from outside,
so that FSDP finds its weight gathered. What they add is the fused form of their product.
"""

import torch
from torch import Tensor, nn

from qbl_trl.adapter.products import add_expanded, project


def compute_dtype(weight: Tensor, kind: str) -> torch.dtype:
    """The dtype products with this weight run in on a type of device: its own, or the one of autocast."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class PooledLinear(nn.Linear):
    """A: (R, K / p). Called with one tensor it is a linear layer; with a factor it pools its input first."""

    def forward(self, x: Tensor, in_factor: int | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """(..., K / p) -> (..., R); with in_factor (..., K) -> x itself and (..., R)."""
        if in_factor is None:
            return nn.functional.linear(x, self.weight)
        return project(x, self.weight.to(compute_dtype(self.weight, x.device.type)), in_factor)


class ExpandedLinear(nn.Linear):
    """B: (N / e, R). Called with one tensor it is a linear layer; with an output it adds its product onto it."""

    def forward(  # type: ignore[override]
        self, h: Tensor, y: Tensor | None = None, out_factor: int = 1, own: bool = False
    ) -> Tensor:
        """(..., R) -> (..., N / e); with y (..., N) -> y + expand_e(B h), (..., N)."""
        if y is None:
            return nn.functional.linear(h, self.weight)
        return add_expanded(y, h, self.weight.to(h.dtype), out_factor, own)
