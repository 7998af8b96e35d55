"""Readers: functions that make one stored weight when the file is written, and no earlier."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from qbl_trl.errors import ExportError
from qbl_trl.onnx.layers import BlockDelta, Branch, Cut, EmbeddingSource, GroupBase, LinearSource, Made, TensorRef
from qbl_trl.quant.blocks import fold
from qbl_trl.quant.packing import pack, unpack

Reader = Callable[[], Tensor]
Source = TypeVar("Source", LinearSource, EmbeddingSource)
_LARGEST_ON_CUDA = 128


def give(tensor: Tensor | TensorRef) -> Reader:
    """The tensor as it is."""
    return tensor.read if isinstance(tensor, TensorRef) else lambda: tensor


def transposed(read: Reader, gain: float = 1.0) -> Reader:
    """(rows, columns) -> (columns, rows), times gain, computed in float32."""
    return lambda: (read().detach().float() * gain).T


def unpacked_zeros(base: GroupBase) -> Tensor:
    """(N, G) float32 zero points in code units, on the CPU."""
    if base.zeros is None:
        return torch.full(base.scales.shape, float(1 << (base.bits - 1)))
    zeros = base.zeros.read().cpu()
    return zeros.float() if base.zeros.floating else unpack(zeros, base.bits, base.scales.shape[1]).float()


def whole_zeros(base: GroupBase) -> Tensor:
    """The nearest zero points that are codes, (N, G) float32."""
    return unpacked_zeros(base).round().clamp(0, (1 << base.bits) - 1)


def zeros_left(base: GroupBase) -> Tensor:
    """s * (i - z), (N, G): what fractional zero points leave once integers i stand for them."""
    return base.scales.read().cpu().float() * (whole_zeros(base) - unpacked_zeros(base))


def with_whole_zeros(source: LinearSource) -> LinearSource:
    """A layer with fractional zero points as one with integers i, and what they leave as a block delta.

        s (q - z) x  =  s (q - i) x + s (i - z) sum_g(x)

    The nearest integers leave half a step at most, to which an adapter's delta is added where it is constant inside the
    groups: one product for both.
    """
    base = source.base
    if not isinstance(base, GroupBase) or base.zeros is None or not base.zeros.floating:
        return source
    rows, groups = base.scales.shape
    joined = [branch for branch in source.branches if _is_constant_in_groups(branch, base)]
    apart = tuple(branch for branch in source.branches if not any(branch is one for one in joined))

    def left() -> Tensor:
        deltas = [_by_group(branch, base) for branch in joined if isinstance(branch, BlockDelta)]
        return torch.stack([zeros_left(base).cpu(), *(delta.cpu() for delta in deltas)]).sum(0)

    codes = (rows, -(-groups * base.bits // 8))
    # Integers like the codes, of which they are told by what they are made from.
    zeros = Made(base.weight.parts, codes, lambda: pack(whole_zeros(base).to(torch.uint8), base.bits))
    delta = BlockDelta(Made(base.zeros.parts, (rows, groups), left), base.group_size, 1)
    return replace(source, base=replace(base, zeros=zeros), branches=(delta, *apart))


def _is_constant_in_groups(branch: Branch, base: GroupBase) -> bool:
    return isinstance(branch, BlockDelta) and branch.in_factor % base.group_size == 0


def in_smaller_groups(source: Source, columns: int) -> Source:
    """The same weights in groups of 128 at most, where 4-bit codes have larger ones, with a scale for each part of one.

    For one token ONNX Runtime's MatMulNBits knows no larger groups on CUDA, and fails as it runs.

    Args:
        columns: K.

    Source: ONNX Runtime 1.31, contrib_ops/cuda/quantization/matmul_4bits_m1_impl.cuh.
    """
    base = source.base
    if not isinstance(base, GroupBase) or base.bits != 4 or base.group_size <= _LARGEST_ON_CUDA:
        return source
    times, groups = base.group_size // _LARGEST_ON_CUDA, -(-columns // _LARGEST_ON_CUDA)
    rows, whole = base.scales.shape

    def parts(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(times, 1)[:, :groups].contiguous()

    weight, zeros, width = base.weight, base.zeros, groups * _LARGEST_ON_CUDA // 2
    if groups < whole * times:  # the last group was ragged
        weight = Cut(weight.parts, (rows, width), lambda: base.weight.read()[:, :width].contiguous())
    if zeros is not None and zeros.floating:
        zeros = Made(zeros.parts, (rows, groups), lambda: parts(base.zeros.read()))  # type: ignore[union-attr]
    elif zeros is not None:
        packed = (rows, -(-groups // 2))
        zeros = Made(zeros.parts, packed, lambda: pack(parts(unpack(base.zeros.read(), 4, whole)), 4))  # type: ignore[union-attr]
    scales = Made(base.scales.parts, (rows, groups), lambda: parts(base.scales.read()))
    return replace(source, base=GroupBase(4, _LARGEST_ON_CUDA, weight, scales, zeros))


def folded_zeros(name: str, base: GroupBase, branches: Sequence[Branch]) -> Reader:
    """z' = z - D / s for every branch.

    Raises:
        ExportError: if a branch is not constant inside the groups: its in_factor is no multiple of the group size.
    """
    for branch in branches:
        if not _is_constant_in_groups(branch, base):
            raise ExportError(
                f'{name}: lowering="float_zero_point" needs a merged adapter with in_factor a multiple of the '
                f"quantization group of {base.group_size}, this one has in_factor={branch.in_factor}"
                f'{"" if isinstance(branch, BlockDelta) else " and is not merged"}. Use lowering="factored" (or "auto")'
            )

    def read() -> Tensor:
        zeros = unpacked_zeros(base)
        for branch in branches:
            if isinstance(branch, BlockDelta):
                factors = branch.in_factor, branch.out_factor
                zeros = fold(zeros, base.scales.read().cpu(), branch.delta.read().cpu(), *factors, base.group_size)
        return zeros

    return read


def _by_group(branch: BlockDelta, base: GroupBase) -> Tensor:
    """(N / e, K / p) -> (N, G)."""
    spread = branch.delta.read().float().repeat_interleave(branch.in_factor // base.group_size, dim=1)
    return spread.repeat_interleave(branch.out_factor, dim=0)[:, : base.scales.shape[1]]
