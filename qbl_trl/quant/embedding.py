"""GroupQuantEmbedding: an embedding table whose rows stay at 2, 4 or 8 bits.

Only the rows that are looked up are dequantized. A tied output head is a GroupQuantLinear over the same tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.config import LayerFormat
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.packed import BESIDE_CODES, PackedWeight


class GroupQuantEmbedding(PackedWeight):
    """Look-up in a frozen packed table; storage as on PackedWeight, with one row per token.

    Attributes:
        num_embeddings, embedding_dim: rows and columns of the table.
        scale: what looked-up rows are multiplied with (Gemma 3 has such tables).
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
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.in_features, self.out_features = embedding_dim, num_embeddings
        self._allocate(format or LayerFormat(), device)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @classmethod
    def _empty(cls, in_features: int, out_features: int, format: LayerFormat, **kwargs: Any) -> "GroupQuantEmbedding":
        return cls(out_features, in_features, format=format, device="meta", **kwargs)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) integer ids -> (..., embedding_dim)."""
        return self.look_up(ids, self.like.dtype)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(...) integer ids -> (..., embedding_dim) of a float type."""
        rows = self.dequantize_rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim).to(dtype)
        return rows if self.scale == 1 else rows * rows.new_tensor(self.scale)

    def as_head_(self, head: GroupQuantLinear) -> None:
        """Make an output head a view of this table: one set of tensors, saved once."""
        head.weight, head.format = self.weight, self.format
        for name in BESIDE_CODES:
            found = getattr(self, name)  # one that is None counts as persistent: accelerate would move it otherwise
            head.register_buffer(name, found, persistent=found is None)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"


def embedding_scale(module: nn.Module) -> float | None:
    """The factor of a float embedding that looks rows up and multiplies them; None of one that does something else.

    Found by looking two rows up: the name of a class says nothing of what it computes. Of one without memory, in a
    small one of its class.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if [name for name, _ in module.named_parameters()] != ["weight"]:  # rows of its own, as T5Gemma 2 has one
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor) and scale.is_meta:
        scale = getattr(module, "scalar_embed_scale", None)
    if not isinstance(scale, (int, float, Tensor)):
        return None
    factor = float(scale)
    if module.weight.is_meta:
        try:
            with torch.device("cpu"):
                module = type(module)(2, 4, None, embed_scale=factor)  # type: ignore[call-arg]
        except TypeError:
            return None
    ids = torch.tensor([0, module.num_embeddings - 1], device=module.weight.device)
    with torch.no_grad():
        expected, found = module.weight[ids].float() * factor, module(ids).float()
    tolerance = 1e-5 if module.weight.dtype == torch.float32 else 3e-2
    return factor if torch.allclose(found, expected, rtol=tolerance, atol=tolerance) else None
