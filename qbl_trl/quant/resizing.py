"""A packed embedding has no rows to add or take away: `resize_token_embeddings` is refused, in words."""

import functools
from typing import Any

from transformers import PreTrainedModel

from qbl_trl.errors import ConfigError
from qbl_trl.quant.packed import PackedWeight


def refuse_resizing() -> None:
    """Have transformers ask before it resizes the embedding, the first of the two tables (once).

    By itself it would say that a GroupQuantEmbedding is no nn.Embedding, and of a packed head even less.
    """
    owner: Any = PreTrainedModel
    resize = getattr(owner, "_get_resized_embeddings", None)
    if resize is None:
        return  # a newer transformers; its own words will have to do

    @functools.wraps(resize)
    def check_and_resize(
        self: Any,
        old_embeddings: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if any(isinstance(table, PackedWeight) for table in (old_embeddings, self.get_output_embeddings())):
            _check_rows(self, old_embeddings.weight.shape[0], new_num_tokens, pad_to_multiple_of or 1)
        return resize(self, old_embeddings, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    owner._get_resized_embeddings = check_and_resize


def _check_rows(model: PreTrainedModel, rows: int, wanted: int | None, multiple: int) -> None:
    """Raise ConfigError if the number of tokens would change."""
    if -(-(rows if wanted is None else wanted) // multiple) * multiple != rows:
        raise ConfigError(
            f"resize_token_embeddings: a {type(model).__name__} whose embedding or head is packed "
            f"(quantize_embeddings=True) keeps its {rows} tokens. Resize the float model and quantize it then "
            "(model.dequantize() makes one of this), or quantize it without quantize_embeddings"
        )
