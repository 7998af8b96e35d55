"""What a trace needs so that the graph holds every expert of a mixture, whichever the traced tokens choose.

Routers are answered with noise (see `markers.py`), there are enough tokens for every expert to be chosen, and models
that ask only the chosen experts ask all of them: one without tokens adds nothing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbl_trl.onnx.threads import replaced_here

_FEWEST = 5  # sizes 1 and 2 are best avoided: the tracer takes them for broadcasting and for constants
_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_top_k")


def traced_tokens(config: Any) -> int:
    """Tokens of a row: so many that, of experts chosen at random, every one is chosen (but once in a million)."""
    config = config.get_text_config()
    config = getattr(config, "ffn_config", config)  # DBRX
    dense = getattr(config, "is_moe", None) is False  # Doge has a count all the same
    experts = 1 if dense else max(max(_of_layers(config, name)) for name in _COUNTS)
    chosen = max(min(_of_layers(config, name)) for name in _CHOSEN)
    return _FEWEST if experts == 1 else _FEWEST + math.ceil(experts / chosen * (math.log(experts) + 14))


def _of_layers(config: Any, name: str) -> list[int]:
    """A count, or those of single layers (HunYuan)."""
    given = getattr(config, name, None) or 1
    return list(given) if isinstance(given, list | tuple) else [given]


@contextmanager
def every_expert_asked() -> Iterator[None]:
    """While open, `torch.greater(tokens_per_expert, 0)` holds for every expert.

    transformers loops over the experts for which it holds; a traced loop has as many turns as the traced tokens made.
    """
    original = torch.greater

    def greater(counts: Any, bound: Any) -> Tensor | _Everyone:
        whole = isinstance(counts, Tensor) and counts.dim() == 1 and not counts.is_floating_point()
        return _Everyone(int(counts.shape[0])) if whole and bound == 0 else original(counts, bound)

    with replaced_here([(torch, "greater", greater)]):
        yield


@dataclass(frozen=True)
class _Everyone:
    """A mask that holds everywhere: its indices are constants, which say in the graph whose turn it is."""

    count: int

    def nonzero(self) -> list[Tensor]:
        return [torch.tensor([index]) for index in range(self.count)]
