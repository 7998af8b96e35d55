"""Decoders whose attention does not go through transformers' attention interface.

Some call torch's attention themselves. Their masks are computed beside it and handed over. A fused operator makes its
own, so only models are named here whose mask holds nothing but the future, padding, and one window for all layers. Key
heads are repeated for the call; the operator wants them once. What others compute is said again (`own_layers.py`).
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.onnx.markers import mark_attention
from qbl_trl.onnx.own_layers import said_again
from qbl_trl.onnx.threads import replaced_here

_PLAIN = ("dbrx", "falcon", "nemotron", "olmoe", "phimoe", "qwen2_moe", "stablelm")
_CACHES = ("layer_past", "past_key_values", "cache")  # names that layers have for one
_ONE_WINDOW = ("phimoe",)  # all layers have the window that the configuration names


def calls_torch(model: PreTrainedModel) -> bool:
    """Whether a model calls torch's attention itself, with a mask that the fused operators can make."""
    config = model.config
    if config.model_type not in _PLAIN or config._attn_implementation != "sdpa":
        return False
    if _window(model) and config.model_type not in _ONE_WINDOW:
        return False
    # transformers 5 goes through its interface in most of them
    return "scaled_dot_product_attention" in inspect.getsource(sys.modules[type(model).__module__])


def _window(model: PreTrainedModel) -> int:
    return getattr(model.config, "sliding_window", None) or 0


@contextmanager
def own_attention_traced(model: PreTrainedModel) -> Iterator[None]:
    """While open, attention that is the model's own emits placeholders, and key heads are not repeated."""
    file = sys.modules[type(model).__module__]
    layers = [layer for layer in model.modules() if said_again(layer) is not None]
    for layer in layers:
        layer.forward = _saying_again(layer)
    repeated = []
    if calls_torch(model):
        repeated = [(file, "repeat_kv", lambda heads, times: heads)] if hasattr(file, "repeat_kv") else []
        layers = [layer for layer in model.modules() if type(layer).__name__.endswith("Attention")]
        for layer in layers:
            layer.forward = _marking(layer.forward, _window(model))
    try:
        with replaced_here(repeated):
            yield
    finally:
        for layer in layers:
            del layer.forward


def _saying_again(layer: nn.Module) -> Callable[..., Any]:
    """Arguments are given by the names they have in the model's own code."""
    named, instead = inspect.signature(layer.forward), said_again(layer)

    def again(*args: Any, **kwargs: Any) -> Any:
        given = named.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        caches = [given.pop(name) for name in _CACHES if name in given]
        return instead(layer, **given, cache=caches[0] if caches else None)  # type: ignore[misc]

    return again


def _marking(forward: Callable[..., Any], window: int) -> Callable[..., Any]:
    """torch's attention is replaced as late as this: Optimum replaces it too, for the whole trace."""

    @wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        instead = partial(_attention, {"window": window, "bias": kwargs.get("alibi")})
        with replaced_here([(nn.functional, "scaled_dot_product_attention", instead)]):
            return forward(*args, **kwargs)

    return marked


def _attention(
    more: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    """A bias (Falcon's alibi) is scaled as the scores are."""
    scaling = int(query.shape[-1]) ** -0.5 if scale is None else float(scale)
    return torch.transpose(mark_attention(query, key, value, scaling, bias_scale=scaling, **more), 1, 2)
