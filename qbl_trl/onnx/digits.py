"""A block delta written as one or two more digits beside the codes of its layer: for kernels with 8-bit activations.

    W x + D h  ~  [W | s c | s' c'] [x, h, h]        h = sum_p(x),   D ~ s c + s' c'

c and c' are signed codes of the layer's own width with one scale per row and block, so one MatMulNBits does it all:
no second product reads D in float32, and nothing is added afterwards. The second digit holds what the first leaves:

    |D - s c - s' c'|  <=  s' / 2  <=  max|D| / 225      over a row's block, 4-bit codes (one digit of 8: max|D| / 255)

which is far below what 8-bit activations cost. Where the first digit alone leaves little, the second is not written:
inputs of 8 bits are off by 0.006 of their size (32 normal ones to a block), which weights of about 3.5 steps of 4-bit
codes make as much as 0.02 steps in D would; half of that raises the rounding of the sum by sqrt(1 + 1/4) = 1.12.

What D itself costs is that h has 8 bits like x: a D of 2 steps raises the rounding by sqrt(1 + (2/3.5)^2) = 1.15. A
larger one, and every graph whose steps have no 8-bit activations, keeps the product in float (`linears.py`).

A block has one scale, so no block may hold both digits: h is appended often enough that one copy starts where the
first digit's blocks have ended. Copies between have codes that stand for zero, and so have copies behind, which round
the number of blocks up: the kernels take small blocks four at a time, and what is left costs as much as several.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qbl_trl.onnx.layers import BlockDelta, GroupBase, LinearSource, Made, Stack
from qbl_trl.onnx.weights import unpacked_zeros
from qbl_trl.quant.packing import pack

_LARGEST_SHARE = 4  # no more than a quarter of the layer's own blocks: beyond, D has too many columns for this
_LARGEST_STEPS = 2  # of 4-bit codes, root mean square
_LARGEST_REST = 0.01  # of a step, root mean square: what one digit of 4 bits may leave
# Blocks of time that 0 to 3 small 4-bit blocks beyond a multiple of four take: between what AVX-512 was measured to
# take for one token, (1, 2, 3) to (3, 6, 8) by width, and for a prompt of 128, (2, 7, 11).
_LEFT_OVER = (0, 2, 5, 8)


@dataclass(frozen=True)
class Layout:
    """Where the digits of (N, columns) lie among the columns that are appended to a layer.

    Attributes:
        starts: first appended column of each digit.
        copies: how often h is appended.
        blocks: appended blocks; the last may be partly empty.
    """

    bits: int
    block: int
    columns: int
    starts: tuple[int, ...]
    copies: int

    @classmethod
    def of(cls, bits: int, block: int, columns: int, digits: int = 2) -> "Layout":
        """One digit, or two of 4 bits, in as few columns as they fit into."""
        first_blocks = -(-columns // block)
        second = -(-first_blocks * block // columns)  # the first copy that starts behind them
        starts = (0,) if bits == 8 or digits == 1 else (0, second * columns)
        return cls(bits, block, columns, starts, starts[-1] // columns + 1)

    @property
    def width(self) -> int:
        """Appended columns."""
        return self.copies * self.columns

    @property
    def blocks(self) -> int:
        """Appended blocks; the last may be partly empty."""
        return -(-self.width // self.block)

    def cost(self, own: int, prompts: bool = True) -> int:
        """Time of a layer with `own` blocks beside these, in full blocks.

        Args:
            prompts: of prompts with 8-bit activations too; steps alone take as long as there are blocks.
        """
        total = own + self.blocks
        in_fours = prompts and self.bits == 4 and self.block <= 32
        return total - total % 4 + _LEFT_OVER[total % 4] if in_fours else total

    def longer(self, own: int) -> Iterator["Layout"]:
        """This one and all with more copies, as long as they take no more than their share of the layer."""
        layout = self
        while _LARGEST_SHARE * layout.blocks <= own:
            yield layout
            layout = replace(layout, copies=layout.copies + 1)


def layout_for(source: LinearSource, prompts: bool = True) -> Layout | None:
    """How the layer's block deltas become digits, or None where they are better multiplied in float.

    That is where digits would take more columns than they are worth, and where the delta is so large that 8 bits of
    what it multiplies would be felt. Not for fractional zero points of the base itself either, whose correction is as
    large as the weights.

    Args:
        prompts: whether prompts are read with 8-bit activations too.
    """
    base, branches = source.base, source.branches
    if not isinstance(base, GroupBase) or base.bits not in (4, 8) or not branches:
        return None
    if base.zeros is not None and base.zeros.floating:
        return None
    if not all(isinstance(branch, BlockDelta) for branch in branches) or len({b.in_factor for b in branches}) != 1:
        return None
    if source.in_features % base.group_size:
        return None
    columns, own = source.in_features // branches[0].in_factor, source.in_features // base.group_size
    scales = base.scales
    rows = [item.shape[0] for item in scales.items] if isinstance(scales, Stack) else [scales.shape[0]]
    steps = [_size(part) for part in (scales.read().cpu().float() * (1 << base.bits) / 16).split(rows)]
    parts = list(zip(_delta(source).split(rows), steps, strict=True))  # q, k and v each for itself
    if any(_size(delta) > _LARGEST_STEPS * step for delta, step in parts):
        return None
    one, two = (Layout.of(base.bits, base.group_size, columns, digits) for digits in (1, 2))
    enough = all(_size(_rest(delta, one)) <= _LARGEST_REST * step for delta, step in parts)
    layouts = [layout for fewest in ((two, one) if enough else (two,)) for layout in fewest.longer(own)]
    return min(layouts, key=lambda layout: layout.cost(own, prompts), default=None)


def _rest(delta: Tensor, layout: Layout) -> Tensor:
    """What the digits leave of a delta."""
    codes, scales = encode(delta, layout)
    values = (codes.float() - (1 << (layout.bits - 1))) * scales.repeat_interleave(layout.block, 1)
    return delta - sum(values[:, start : start + layout.columns] for start in layout.starts)


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _delta(source: LinearSource) -> Tensor:
    """(N, columns) float32: all branches together, repeated to the layer's outputs."""
    branches = [branch for branch in source.branches if isinstance(branch, BlockDelta)]
    return torch.stack([b.delta.read().cpu().float().repeat_interleave(b.out_factor, 0) for b in branches]).sum(0)


def encode(delta: Tensor, layout: Layout, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The digits of a block delta.

    Args:
        delta: (N, columns) float, in weight units.
        dtype: what the scales are stored in; codes are chosen for the rounded scales.

    Returns:
        codes (N, blocks * block) uint8 around 2**(bits-1); scales (N, blocks) in `dtype`.
    """
    rows, middle = delta.shape[0], 1 << (layout.bits - 1)
    codes = torch.zeros(rows, layout.blocks * layout.block)
    scales = torch.zeros(rows, layout.blocks, dtype=dtype)
    left = delta.detach().float()
    for start in layout.starts:
        held = torch.zeros_like(codes)
        held[:, start : start + layout.columns] = left
        largest = held.view(rows, layout.blocks, layout.block).abs().amax(2)
        own = (largest / (middle - 0.5)).to(dtype)  # its half step reaches `largest`, on the positive side too
        wide = own.float().repeat_interleave(layout.block, 1)
        digit = torch.where(wide > 0, held / wide, 0.0).round().clamp(-middle, middle - 1)
        codes, scales = codes + digit, torch.where(largest > 0, own, scales)
        left = left - (digit * wide)[:, start : start + layout.columns]
    return (codes + middle).to(torch.uint8), scales


def extended(source: LinearSource, layout: Layout) -> GroupBase:
    """The layer's base with the digits of its branches appended to codes, scales and zero points."""
    base = source.base
    if not isinstance(base, GroupBase):
        raise TypeError(f"{source.name}: only codes in groups have digits")
    rows, groups = base.scales.shape
    dtype = base.scales.parts[0].dtype
    per_byte = 8 // base.bits

    def digits() -> tuple[Tensor, Tensor]:
        return encode(_delta(source), layout, dtype)

    def weight() -> Tensor:
        codes = pack(digits()[0], base.bits)
        return torch.cat([base.weight.read().cpu().reshape(rows, -1), codes], 1)

    def zeros() -> Tensor:
        middle = torch.full((rows, layout.blocks), float(1 << (base.bits - 1)))
        return pack(torch.cat([unpacked_zeros(base).cpu(), middle], 1).to(torch.uint8), base.bits)

    total = groups + layout.blocks
    return GroupBase(
        base.bits,
        base.group_size,
        Made(base.weight.parts, (rows, total * base.group_size // per_byte), weight),
        Made(base.scales.parts, (rows, total), lambda: torch.cat([base.scales.read().cpu(), digits()[1]], 1)),
        None if base.zeros is None else Made(base.zeros.parts, (rows, -(-total // per_byte)), zeros),
    )
