"""Real tokens to verify with: what the model's embedding was fed in the first training step."""

from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.quant.head import input_table

_ROWS, _LENGTH = 2, 256


class FirstTokens:
    """Keeps a few rows of the first batch that reaches the input embedding; then it is off the model again.

    Every trainer feeds its embedding token ids, whatever its batches look like (preference pairs, generations, packed
    rows), so no dataset needs to be read and no random number is drawn.
    """

    def __init__(self, model: nn.Module) -> None:
        self.ids: Tensor | None = None
        text: Any = getattr(getattr(model, "config", None), "get_text_config", lambda: None)
        config = text()
        limit = getattr(config, "max_position_embeddings", None) or _LENGTH  # packed rows are longer than that
        self._length = min(_LENGTH, limit)
        table = input_table(model)
        self._handles = (
            [] if table is None else [part.register_forward_pre_hook(self._keep) for part in _readers(model, table)]
        )

    def _keep(self, embedding: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 2:
            self.ids = inputs[0][:_ROWS, : self._length].detach().cpu()
            self.remove()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _readers(model: nn.Module, table: nn.Module) -> list[nn.Module]:
    """The model's table, and others of the same weight: an encoder and a decoder each have a module of their own."""
    weight = getattr(table, "weight", None)
    tables = (part for part in model.modules() if isinstance(part, type(table)))
    return [part for part in tables if part is table or (weight is not None and part.weight is weight)]


def random_tokens(vocabulary: int) -> Tensor:
    """Stand-in where no batch of ids was seen, (2, 32), always the same."""
    return torch.randint(vocabulary, (_ROWS, 32), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
