"""What every importer offers, and the steps they share: words of codes, groups of any size, one layer.

A reader never rounds: codes, scales and zeros come out as the file states them. Where the file's own groups have a
size that we do not store (a whole row, 96, 512), they are split into equal smaller ones that repeat the scale; codes
of bits that we do not store (3, 5, 6, 7) are stored in the next more.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.allowed import ALLOWED_BITS, ALLOWED_GROUP_SIZES
from qbl_trl.config import SCALE_DTYPES, LayerFormat
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine, group_count
from qbl_trl.quant.linear import GroupQuantLinear

_LARGEST_OF_A_ROW = 128
_DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


class Reader(ABC):
    """One foreign checkpoint, read layer by layer.

    Attributes:
        kind: name of the format, for messages and metadata.
    """

    kind: str

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The model's config.json without its quantization_config."""

    @abstractmethod
    def formats(self) -> dict[str, LayerFormat]:
        """Full module name -> format, for every quantized linear layer; reads headers only."""

    def layer(self, name: str) -> GroupQuantLinear:
        """One quantized layer, bias included, in the format that `formats` states.

        Raises:
            CheckpointError: if its codes cannot be taken over exactly, or it holds no numbers.
        """
        layer = self.read_layer(name)
        for part in ("scales", "zeros"):
            values = getattr(layer, part)
            if values is not None and values.is_floating_point() and not bool(values.isfinite().all()):
                raise CheckpointError(f"{name}: its {part} are not all finite numbers; the file is damaged")
        return layer

    @abstractmethod
    def read_layer(self, name: str) -> GroupQuantLinear:
        """What `layer` returns, unchecked."""

    @abstractmethod
    def inside(self) -> dict[str, tuple[int, ...]]:
        """Weights and biases that the quantized layers stand for: full name -> shape, (N, K) or (N,)."""

    @abstractmethod
    def others(self) -> dict[str, tuple[int, ...]]:
        """Tensors that belong to no quantized layer: full name -> shape."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One of the other tensors."""


def split_words(words: Tensor, bits: int, dim: int, *, whole: bool = False) -> Tensor:
    """Codes packed little-endian into int32 words along one dimension: (.., W, ..) int32 -> (.., W * 32 / bits, ..).

    Args:
        whole: a word holds whole codes only, 32 // bits of them. Else one that does not fit goes on in the next word.
    """
    moved, mask = words.movedim(dim, -1), (1 << bits) - 1
    if whole or 32 % bits == 0:
        codes = (moved.unsqueeze(-1) >> torch.arange(0, 33 - bits, bits, dtype=torch.int32)) & mask
        return codes.flatten(-2).to(torch.uint8).movedim(-1, dim)
    count = moved.shape[-1] * 32 // bits
    data = moved.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    data = nn.functional.pad(data, (0, -data.shape[-1] % bits)).unflatten(-1, (-1, bits))  # of 8 codes each
    eight = (data.long() << torch.arange(0, 8 * bits, 8)).sum(-1)
    codes = torch.stack([((eight >> shift) & mask).to(torch.uint8) for shift in range(0, 8 * bits, bits)], -1)
    return codes.flatten(-2)[..., :count].movedim(-1, dim)


def stored_bits(bits: int) -> int:
    """The bits in which codes of so many are stored: as many, or the next more."""
    return min(width for width in ALLOWED_BITS if width >= bits)


def stored_group_size(name: str, in_features: int, groups: int, stated: int) -> tuple[int, int]:
    """The file's group size and the one we store, which divides it.

    Args:
        stated: the configured group size; zero or less for one group per row, or where none is stated.

    Raises:
        CheckpointError: if it does not follow from the number of groups, or no size we store divides it.
    """
    if min(groups, in_features) < 1:
        raise CheckpointError(f"{name}: {groups} groups of {in_features} inputs; the file is damaged")
    own = stated if stated > 0 and group_count(in_features, stated) == groups else -(-in_features // groups)
    if group_count(in_features, own) != groups:
        raise CheckpointError(f"{name}: {groups} groups do not cover {in_features} inputs; the file is damaged")
    others = [size for size in ALLOWED_GROUP_SIZES if size != own and group_count(in_features, size) == groups]
    if own != stated and groups > 1 and (in_features % groups or others):
        raise CheckpointError(
            f"{name}: {groups} groups over {in_features} inputs are not of {stated}, which the configuration states, "
            "and may be of several sizes; state that of this layer"
        )
    if groups == 1:
        return own, own if own in ALLOWED_GROUP_SIZES else size_within_a_row(in_features)
    fitting = [size for size in ALLOWED_GROUP_SIZES if own % size == 0]
    if not fitting:
        allowed = ", ".join(map(str, ALLOWED_GROUP_SIZES))
        raise CheckpointError(
            f"{name}: groups of {own} weights cannot be split into whole groups of {allowed}; "
            "requantize the model from its float weights"
        )
    return own, max(fitting)


def size_within_a_row(in_features: int) -> int:
    """The groups that one scale of a whole row is repeated for: whole ones, where there are any, for adapters to fit.

    The larger, the fewer scales; and the fewer inputs an adapter sees, which pools whole groups.
    """
    sizes = [size for size in ALLOWED_GROUP_SIZES if size <= min(in_features, _LARGEST_OF_A_ROW)]
    whole = [size for size in sizes if in_features % size == 0]
    return max(whole or sizes, default=min(ALLOWED_GROUP_SIZES))


def build(
    affine: Affine, *, bits: int, own_size: int, group_size: int, symmetric: bool, bias: Tensor | None
) -> GroupQuantLinear:
    """A layer from codes (N, K), scales and zeros (N, groups of own_size), regrouped to `group_size`.

    Codes of 3, 5, 6 and 7 bits get the next wider place; symmetric ones, whose zero points are not stored, move with
    the middle of its range.
    """
    codes, scales, zeros = affine
    stored = stored_bits(bits)
    if symmetric and stored != bits:
        moved = (1 << (stored - 1)) - (1 << (bits - 1))
        codes, zeros = codes + moved, zeros + moved
    if own_size != group_size:
        groups = group_count(codes.shape[1], group_size)
        index = torch.arange(groups) * group_size // own_size
        scales, zeros = scales[:, index], zeros[:, index]
    affine = Affine(codes.contiguous(), scales.contiguous(), zeros.contiguous())
    return GroupQuantLinear.from_affine(affine, bits=stored, group_size=group_size, bias=bias, symmetric=symmetric)


def dtype_name(name: str, dtype: torch.dtype | None) -> str:
    """The name of a dtype that scales and float zero points can have.

    Raises:
        CheckpointError: for any other dtype.
    """
    if dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"{name}: {dtype} is not supported here; allowed: {', '.join(SCALE_DTYPES)}")
    return _DTYPE_NAMES[dtype]
