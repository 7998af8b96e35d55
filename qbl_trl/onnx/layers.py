"""What a layer computes: the data every lowering starts from.

    y = base(x) + bias + sum over branches of  expand_e(branch(sum_p(x)))

A base is group quantized (MatMulNBits), bitsandbytes 4-bit (MatMulBnb4) or dense. A branch is a block delta D, or the
two factors of one where p and e are small. Tensors are referred to, never copied: nothing is read before it is written.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qbl_trl.arithmetic import in_float64


@dataclass(frozen=True)
class TensorRef:
    """A tensor of the model by reference; its subclasses are made from several when they are read."""

    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorRef":
        """One tensor, by reference."""
        return cls((tensor.detach(),))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what `read` returns."""
        return tuple(self.parts[0].shape)

    @property
    def floating(self) -> bool:
        """Whether it holds floats."""
        return self.parts[0].is_floating_point()

    @property
    def pointers(self) -> tuple[int, ...]:
        """Identity of the memory behind it: tied weights have the same."""
        return tuple(part.data_ptr() for part in self.parts)

    def read(self) -> Tensor:
        """The tensor itself."""
        return self.parts[0]


@dataclass(frozen=True)
class Product(TensorRef):
    """gain * B A, multiplied only when read: `parts` holds B (N / e, R), `down` is A (R, K / p)."""

    down: Tensor
    gain: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape[0], self.down.shape[1]

    def read(self) -> Tensor:
        up, down = in_float64(self.parts[0].detach(), self.down.detach())  # as a merge forms it
        return (up @ down * self.gain).float()


@dataclass(frozen=True)
class Stack(TensorRef):
    """Other tensors, one above the other."""

    items: tuple[TensorRef, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(item.shape[0] for item in self.items), *self.items[0].shape[1:])

    def read(self) -> Tensor:
        return torch.cat([item.read().cpu() for item in self.items])


@dataclass(frozen=True)
class Made(TensorRef):
    """What `make` makes of other tensors when it is read; no other layer stores the same."""

    size: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def pointers(self) -> tuple[int, ...]:
        return ()

    def read(self) -> Tensor:
        return self.make()


class Cut(Made):
    """What `make` leaves of one tensor: layers that share that tensor share this."""

    pointers = TensorRef.pointers


@dataclass(frozen=True)
class GroupBase:
    """Affine groups: codes packed as MatMulNBits packs them.

    Attributes:
        weight: (N, G * g * bits / 8) uint8.  scales: (N, G) float.
        zeros: packed uint8 (N, ceil(G * bits / 8)), float (N, G), or None for 2**(bits-1).
    """

    bits: int
    group_size: int
    weight: TensorRef
    scales: TensorRef
    zeros: TensorRef | None


@dataclass(frozen=True)
class Bnb4Base:
    """bitsandbytes 4-bit: codes (N * K / 2,) uint8, absmax (blocks,) float32, codebook "nf4" or "fp4"."""

    codes: Tensor
    absmax: Tensor
    codebook: str
    block_size: int


@dataclass(frozen=True)
class DenseBase:
    """A float weight, (N, K), or (K, N) where `transposed` is set."""

    weight: TensorRef
    transposed: bool = False


@dataclass(frozen=True)
class BlockDelta:
    """D, (N / e, K / p) float: y += expand_e(D sum_p(x))."""

    delta: TensorRef
    in_factor: int
    out_factor: int


@dataclass(frozen=True)
class LowRank:
    """A (R, K / p) and B (N / e, R): y += gain * expand_e(B (A sum_p(x)))."""

    down: Tensor
    up: Tensor
    gain: float
    in_factor: int
    out_factor: int


Base = GroupBase | Bnb4Base | DenseBase
Branch = BlockDelta | LowRank


@dataclass(frozen=True)
class LinearSource:
    """One linear layer, (..., K) -> (..., N)."""

    name: str
    in_features: int
    out_features: int
    base: Base
    bias: TensorRef | None
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class EmbeddingSource:
    """One token embedding, ids (...) -> (..., N); weight (V, N), dense or in groups along N; rows times `scale`."""

    name: str
    num_embeddings: int
    embedding_dim: int
    base: GroupBase | DenseBase
    scale: float = 1.0
