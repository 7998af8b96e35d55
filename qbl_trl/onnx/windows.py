"""Which keys a layer sees, read from the mask that it is given while a model is traced.

transformers makes masks from functions (batch, head, query, key) -> whether the key is seen, for whatever attention is
registered. For a fused trace a mask is one number, the window that its function stands for, which comes to attention
through all that a model does with masks on the way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FAR = 10_000_019  # tokens; more than any window


def mask_of_window(mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> Tensor:
    """A mask interface of transformers: (1, 1, 1, 1), what `window_of` reads."""
    window = local_size or 0
    told = -(window + 1) if _is_window(mask_function, window) else torch.nan
    return torch.full((1, 1, 1, 1), told, dtype=torch.float32)


def window_of(mask: Tensor) -> int | None:
    """The window that a mask stands for, 0 for all keys; None for a mask that something else was made of."""
    values = {*mask.detach().float().flatten().tolist()}
    told = values.pop() if len(values) == 1 else 0.0
    return -int(told) - 1 if told < 0 and told % 1 == 0 else None


def _is_window(sees: Callable[..., Any], window: int) -> bool:
    """Whether of keys up to the query the last `window` are seen, and nothing else counts."""
    query = _FAR + window
    keys = torch.tensor([0, 1, query // 2, query - window - 1, query - window, query - window + 1, query - 1, query])
    keys = torch.cat([keys, keys[-1:] + 1])
    queries = torch.full_like(keys, query)
    try:
        seen = sees(torch.zeros_like(keys), torch.zeros_like(keys), queries, keys)
    except (IndexError, RuntimeError):  # it reads tensors of this text's length
        return False
    expected = (keys <= queries) & (keys > queries - window if window else keys >= 0)
    return bool(torch.equal(seen.expand_as(keys), expected))
