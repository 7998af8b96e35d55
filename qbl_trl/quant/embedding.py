"""GroupQuantEmbedding: an embedding table whose rows stay at 2, 4 or 8 bits.

Only the rows that are looked up are dequantized. A tied output head is a GroupQuantLinear over the same tensors.
"""

from typing import Any

import torch
from torch import Tensor

from qbl_trl.config import LayerFormat
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.packed import BESIDE_CODES, PackedWeight


class GroupQuantEmbedding(PackedWeight):
    """Look-up in a frozen packed table; storage as on PackedWeight, with one row per token.

    Attributes:
        num_embeddings, embedding_dim: rows and columns of the table.
        like: an empty tensor whose dtype is that of the output; it follows `.to(dtype)` as a float table would.
    """

    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: LayerFormat | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.in_features, self.out_features = embedding_dim, num_embeddings
        self._allocate(format or LayerFormat(), device)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @classmethod
    def _empty(cls, in_features: int, out_features: int, format: LayerFormat, **kwargs: Any) -> "GroupQuantEmbedding":
        return cls(out_features, in_features, format=format, device="meta", **kwargs)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) integer ids -> (..., embedding_dim)."""
        rows = self.dequantize_rows(ids.reshape(-1))
        return rows.view(*ids.shape, self.embedding_dim).to(self.like.dtype)

    def as_head_(self, head: GroupQuantLinear) -> None:
        """Make an output head a view of this table: one set of tensors, saved once."""
        head.weight, head.format = self.weight, self.format
        for name in BESIDE_CODES:
            head.register_buffer(name, getattr(self, name), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"
