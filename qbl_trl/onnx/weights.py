"""Readers: functions that make one stored weight when the file is written, and no earlier."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qbl_trl.errors import ExportError
from qbl_trl.onnx.layers import BlockDelta, Branch, GroupBase, Stored
from qbl_trl.quant.packing import unpack

Reader = Callable[[], Tensor]


def give(tensor: Tensor | Stored) -> Reader:
    """The tensor as it is."""
    return tensor.read if isinstance(tensor, Stored) else lambda: tensor


def transposed(read: Reader, gain: float = 1.0) -> Reader:
    """(rows, columns) -> (columns, rows), times gain, computed in float32."""
    return lambda: (read().detach().float() * gain).T


def unpacked_zeros(base: GroupBase) -> Tensor:
    """(N, G) float32 zero points in code units."""
    if base.zeros is None:
        return torch.full(base.scales.shape, float(1 << (base.bits - 1)))
    zeros = base.zeros.read()
    return zeros.float() if base.zeros.floating else unpack(zeros, base.bits, base.scales.shape[1]).float()


def zero_shift(base: GroupBase) -> Tensor:
    """s * (2**(bits-1) - z), (N, G): what a base with fractional zero points adds to its symmetric form."""
    return base.scales.read().float() * ((1 << (base.bits - 1)) - unpacked_zeros(base))


def folded_zeros(name: str, base: GroupBase, branches: Sequence[Branch]) -> Reader:
    """z' = z - D / s for every branch.

    Raises:
        ExportError: if a branch is not constant inside the groups: its in_factor is no multiple of the group size.
    """
    for branch in branches:
        if branch.in_factor % base.group_size or not isinstance(branch, BlockDelta):
            raise ExportError(
                f'{name}: lowering="float_zero_point" needs a merged adapter with in_factor a multiple of the '
                f"quantization group of {base.group_size}, this one has in_factor={branch.in_factor}"
                f'{"" if isinstance(branch, BlockDelta) else " and is not merged"}. Use lowering="factored" (or "auto")'
            )

    def read() -> Tensor:
        zeros = unpacked_zeros(base)
        for branch in branches:
            if isinstance(branch, BlockDelta):
                zeros = zeros - _by_group(branch, base) / base.scales.read().float()
        return zeros

    return read


def _by_group(branch: BlockDelta, base: GroupBase) -> Tensor:
    """(N / e, K / p) -> (N, G)."""
    spread = branch.delta.read().float().repeat_interleave(branch.in_factor // base.group_size, dim=1)
    return spread.repeat_interleave(branch.out_factor, dim=0)[:, : base.scales.shape[1]]
