"""Decoders that call torch's attention themselves, and not through transformers' attention interface.

Their masks are computed beside it and handed over. A fused operator makes its own, so only models are named here whose
mask holds nothing but the future and padding. Key heads are repeated for the call; the operator wants them once.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.onnx.markers import mark_attention
from qbl_trl.onnx.threads import here_only

_PLAIN = ("dbrx", "falcon", "nemotron", "olmoe", "qwen2_moe", "stablelm")


def calls_torch(model: PreTrainedModel) -> bool:
    """Whether a model calls torch's attention itself, with a mask that the fused operators can make."""
    config = model.config
    apart = getattr(config, "alibi", False) or getattr(config, "sliding_window", None)
    return config.model_type in _PLAIN and config._attn_implementation == "sdpa" and not apart


@contextmanager
def own_attention_traced(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's attention emits placeholders, and key heads are not repeated."""
    file = sys.modules[type(model).__module__]
    repeat = file.__dict__.get("repeat_kv")
    layers = [layer for layer in model.modules() if type(layer).__name__.endswith("Attention")]
    for layer in layers:
        layer.forward = _marking(layer.forward)
    if repeat is not None:
        file.repeat_kv = here_only(lambda heads, times: heads, repeat)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        if repeat is not None:
            file.repeat_kv = repeat  # type: ignore[attr-defined]


def _marking(forward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's attention is replaced as late as this: Optimum replaces it too, for the whole trace."""

    @wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        functional: Any = nn.functional
        original = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = here_only(_attention, original)
        try:
            return forward(*args, **kwargs)
        finally:
            functional.scaled_dot_product_attention = original

    return marked


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
    scaling = int(query.shape[-1]) ** -0.5 if scale is None else float(scale)
    return torch.transpose(mark_attention(query, key, value, scaling, 0, 0.0), 1, 2)
