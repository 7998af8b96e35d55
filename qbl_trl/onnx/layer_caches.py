"""What each layer of a decoder keeps between steps: keys and values, states of fixed size, or both.

| tensor | shape | of |
| --- | --- | --- |
| key, value | (B, heads, tokens, size) | attention |
| conv_state | (B, K - 1, channels) | a causal convolution over K tokens: its latest inputs |
| recurrent_state | (B, heads, d_k, d_v), of Mamba 1 (B, features, d_k), float32 | a recurrence, see `recurrent.py` |
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from qbl_trl.errors import ExportError
from qbl_trl.generation import cache_of

CONVOLVED, RECURRENT = STATES = ("conv_state", "recurrent_state")  # the second is float32 in every graph
_ATTENTION = ("DynamicLayer", "DynamicSlidingWindowLayer")
_ONE_RECURRENCE = 3  # axes of a state of Mamba 1
_RECURRENT = (
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)


@dataclass(frozen=True)
class LayerCache:
    """The tensors of one layer, without their batch.

    Attributes:
        keys: heads, key size and value size; None: no keys and values of its own.
        states: shapes by name.
    """

    keys: tuple[int, int, int] | None = None
    states: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, tuple[int | None, ...]]]:
        """Names and shapes, None for the axis that grows: keys before values, then states."""
        if self.keys is not None:
            heads, keys, values = self.keys
            yield from (("key", (heads, None, keys)), ("value", (heads, None, values)))
        yield from self.states.items()


class _Entered(threading.local):
    """The state of the layer whose convolution was asked last, and how many recurrences have begun at it."""

    state: Tensor | None = None
    begun: int = 0


_ENTERED = _Entered()
LayerCaches = list[LayerCache]


def enter(state: Tensor | None) -> None:
    """Say what the recurrences of a layer begin at that do not ask its cache: those of Mamba 1."""
    _ENTERED.state, _ENTERED.begun = state, 0


def next_state() -> Tensor | None:
    """(B, features, d_k): what the next of these begins at; one of several where a layer has several (Zamba)."""
    state, place = _ENTERED.state, _ENTERED.begun
    _ENTERED.begun += 1
    return state if state is None or state.dim() == _ONE_RECURRENCE else state[:, place]


def named_tensors(caches: LayerCaches) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Every tensor of a cache as graphs name it: ("0.key", (3, None, 64)), ("0.value", (3, None, 64)), ..."""
    for place, layer in enumerate(caches):
        yield from ((f"{place}.{name}", shape) for name, shape in layer.tensors())


def layer_caches(model: Any) -> LayerCaches:
    """What every layer keeps, found by running the model.

    Raises:
        ExportError: if it is something else, or nothing.
    """
    ids = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True))
    cache = getattr(cache, "self_attention_cache", cache)
    layers = list(getattr(cache, "layers", ()))
    while layers and type(layers[-1]).__name__ in _ATTENTION and layers[-1].keys is None:
        layers.pop()  # nobody filled it: a decoder's cache has as many as its configuration says of the encoder
    found = [_read(model, layer) for layer in layers]
    if not any(layer.keys or layer.states for layer in found):
        encodes = getattr(model.config, "is_decoder", None) is False
        hint = ". As a decoder, with is_decoder=True in its configuration, it may give one" if encodes else ""
        raise ExportError(
            f"a {type(model).__name__} gives no cache that a graph could take and give; nothing was written{hint}"
        )
    return found


def _read(model: Any, layer: Any) -> LayerCache:
    kind, keys, values = type(layer).__name__, getattr(layer, "keys", None), getattr(layer, "values", None)
    if kind == "DummyLayer":
        return LayerCache()
    if kind in _RECURRENT and layer.number_of_states == 1:
        attends = keys is not None and values is not None and keys.numel()
        sizes = (keys.shape[1], keys.shape[3], values.shape[3]) if attends else None  # type: ignore[union-attr]
        convolved, state = layer.conv_states[0], layer.recurrent_states[0]
        kept: dict[str, tuple[int, ...]] = {}
        if convolved is not None:  # transformers keeps one more than its convolution reads again
            kept[CONVOLVED] = (convolved.shape[2] - 1, convolved.shape[1])
        if state is not None:
            kept[RECURRENT] = tuple(state.shape[1:])
        return LayerCache(sizes, kept)
    if kind not in _ATTENTION or keys is None or values is None:
        raise ExportError(
            f"the cache of a {type(model).__name__} holds other things than keys, values and states ({kind}), which no "
            "graph takes and gives; nothing was written"
        )
    return LayerCache((keys.shape[1], keys.shape[3], values.shape[3]))


def filled(cache: LayerCache, tensors: dict[str, Tensor]) -> Any:
    """A layer of a cache in transformers that holds tensors, by name."""
    if cache.states:
        return _with_states(cache, tensors)
    if cache.keys is None:  # another layer's stand for its own
        from transformers.cache_utils import DummyLayer  # of transformers 5

        return DummyLayer()
    return _with_keys(DynamicLayer(), tensors)


def held(cache: LayerCache, layer: Any) -> list[Tensor]:
    """What a layer holds by now, in the order of `LayerCache.tensors`."""
    own: dict[str, Any] = {"key": getattr(layer, "keys", None), "value": getattr(layer, "values", None)}
    if cache.states:
        own |= {CONVOLVED: layer.conv_states[0], RECURRENT: layer.recurrent_states[0]}
    return [own[name] for name, _ in cache.tensors()]


def _with_keys(layer: Any, tensors: dict[str, Tensor]) -> Any:
    layer.keys, layer.values = tensors["key"], tensors["value"]
    layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    return layer


def _with_states(cache: LayerCache, tensors: dict[str, Tensor]) -> Any:
    """Its states are replaced, not written over: a graph has no place for that."""
    from transformers import cache_utils  # names of transformers 5

    kind = "LinearAttentionLayer" if cache.keys is None else "LinearAttentionAndFullAttentionLayer"
    layer = getattr(cache_utils, kind)()
    if cache.keys is not None:
        _with_keys(layer, tensors)
    layer.conv_states[0], layer.recurrent_states[0] = (tensors.get(name) for name in STATES)
    layer.has_previous_state[0] = True

    def update_conv_state(x: Tensor, *_: Any, **__: Any) -> Tensor:
        enter(layer.recurrent_states[0])
        whole = torch.cat([layer.conv_states[0].transpose(1, 2), x], -1)
        layer.conv_states[0] = whole[..., -cache.states[CONVOLVED][0] :].transpose(1, 2)
        return whole

    def update_recurrent_state(state: Tensor, *_: Any, **__: Any) -> Tensor:
        layer.recurrent_states[0] = state
        return state

    layer.update_conv_state, layer.update_recurrent_state = update_conv_state, update_recurrent_state
    return layer
