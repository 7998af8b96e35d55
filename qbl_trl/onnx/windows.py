"""Which keys a layer sees, read from the mask that it is given while a model is traced.

transformers makes masks from functions (batch, head, query, key) -> whether the key is seen, for whatever attention is
registered. For a fused trace a mask is one number that stands for the window of its function. It comes to attention
through what a model does with masks on the way; where a model mixes it with anything else, it is no single one there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FAR = 10_000_019  # tokens; more than any window
_KNOWN: list[int] = []  # windows; a mask is minus the place of one, which every float type holds


def mask_of_window(mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> Tensor:
    """A mask interface of transformers: (1, 1, 1, 1), what `window_of` reads."""
    window, told = local_size or 0, torch.nan
    if _is_window(mask_function, window):
        if window not in _KNOWN:
            _KNOWN.append(window)
        told = -1.0 - _KNOWN.index(window)
    return torch.full((1, 1, 1, 1), told, dtype=torch.float32)


def window_of(mask: Tensor) -> int | None:
    """The window that a mask stands for, 0 for all keys; None for a mask that something else was made of."""
    told = float(mask.detach()) if mask.numel() == 1 else 0.0
    places = {-1.0 - place: window for place, window in enumerate(_KNOWN)}
    return places.get(told)


def _is_window(sees: Callable[..., Any], window: int) -> bool:
    """Whether of keys up to the query the last `window` are seen, and nothing else counts."""
    return all(_sees_window(sees, window, _FAR + window + more) for more in (0, 1))  # chunks have edges


def _sees_window(sees: Callable[..., Any], window: int, query: int) -> bool:
    edge = query - window
    keys = torch.tensor([0, 1, query // 2, edge - 1, edge, edge + 1, edge + 2, query - 1, query, query + 1])
    queries = torch.full_like(keys, query)
    try:
        seen = sees(torch.zeros_like(keys), torch.zeros_like(keys), queries, keys)
    except (IndexError, RuntimeError):  # it reads tensors of this text's length
        return False
    expected = (keys <= queries) & (keys > edge if window else keys >= 0)
    return bool(torch.equal(seen.expand_as(keys), expected))
