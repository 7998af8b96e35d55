"""Attention layers that neither transformers' attention interface nor torch's attention computes, for tracing.

One function for each class of layers, which does the same by the placeholder: (layer, what its `forward` is given) ->
what that returns. Masks are not read: beside the future, padding and the window named here they hide nothing.

| layers of | before attention | attention |
| --- | --- | --- |
| GPT-Neo | | unscaled, every other layer over a window |
| GPT-J, CodeGen | pairs of neighbours are rotated, by a table of the layer's own | |
| XGLM | | |
| Bloom, MPT | | a bias that grows with the place of a key |
| CTRL | | |
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.onnx.markers import mark_attention, mark_rotary, mark_tables

SINUSOIDS = "embed_positions"


class Sinusoids(nn.Module):
    """The table of positions of GPT-J and CodeGen as a rotary embedding: (B, S) -> cosines and sines (B, S, width).

    A layer's own table, which transformers 4.57 makes in the type that a model is loaded in.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._table = layer.embed_positions

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        table: Tensor = self._table.float()  # type: ignore[operator, assignment]
        sin, cos = table[position_ids.clamp(max=len(table) - 1).to(table.device)].chunk(2, -1)
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, H * D) -> (B, H, S, D)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _attended(cache: Any, index: int | None, heads: tuple[Tensor, Tensor, Tensor], scale: float, **more: Any) -> Tensor:
    """Attention of query, key and value (B, H, S, D) over a cache: (B, S, H * D)."""
    query, key, value = heads
    if cache is not None:
        key, value = cache.update(key, value, index)
    y = mark_attention(query, key, value, scale, **more)
    return y.reshape(*y.shape[:2], -1)


def _projected(layer: Any, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_heads(project(x), heads) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    return query, key, value


def _gpt_neo(layer: Any, hidden_states: Tensor, cache: Any = None, **_: Any) -> tuple[Tensor, None]:
    local = layer.config.attention_layers[layer.layer_id] == "local"
    window = layer.config.window_size if local else 0
    heads = _projected(layer, hidden_states, layer.num_heads)
    return layer.out_proj(_attended(cache, layer.layer_id, heads, 1.0, window=window)), None


def _gptj(layer: Any, hidden_states: Tensor, position_ids: Tensor, cache: Any = None, **_: Any) -> tuple[Tensor, None]:
    heads = _projected(layer, hidden_states, layer.num_attention_heads)
    return _rotated_pairs(layer, heads, position_ids, cache), None


def _codegen(
    layer: Any, hidden_states: Tensor, position_ids: Tensor, cache: Any = None, **_: Any
) -> tuple[Tensor, None]:
    x, parts = layer.qkv_proj(hidden_states), 4
    turns = x.view(*x.shape[:2], parts, 3, layer.embed_dim // parts)  # query, value, key in each part
    turns = turns.index_select(3, torch.tensor([0, 2, 1]))
    heads = _side_by_side(x, turns, layer.embed_dim, layer.num_attention_heads)
    return _rotated_pairs(layer, heads, position_ids, cache), None


def _rotated_pairs(layer: Any, heads: tuple[Tensor, Tensor, Tensor], position_ids: Tensor, cache: Any) -> Tensor:
    """The first features of each head are rotated."""
    query, key, value = heads
    width = layer.rotary_dim
    cos, sin = mark_tables(query, position_ids, SINUSOIDS, width)
    turned = mark_rotary(query[..., :width], key[..., :width], cos, sin, interleaved=True)
    query, key = (torch.cat([new, old[..., width:]], -1) for new, old in zip(turned, (query, key), strict=True))
    scale = float(layer.scaling) if hasattr(layer, "scaling") else 1 / float(layer.scale_attn)
    y: Tensor = layer.out_proj(_attended(cache, layer.layer_idx, (query, key, value), scale))
    return y


def _side_by_side(x: Tensor, turns: Tensor, width: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each (B, H, S, D), of x (B, S, 3 * width), in which they lie in turns, (B, S, N, 3, M)."""
    whole = turns.transpose(2, 3).reshape(*x.shape[:2], 3 * width)
    query, key, value = (part.view(*x.shape[:2], heads, -1).transpose(1, 2) for part in whole.split(width, -1))
    return query, key, value


def _xglm(layer: Any, hidden_states: Tensor, cache: Any = None, **_: Any) -> tuple[Tensor, None]:
    heads = _projected(layer, hidden_states, layer.num_heads)
    return layer.out_proj(_attended(cache, layer.layer_idx, heads, layer.scaling)), None


def _bloom(
    layer: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, cache: Any = None, **_: Any
) -> tuple[Tensor, None]:
    x, heads = layer.query_key_value(hidden_states), layer.num_heads
    turns = x.view(*x.shape[:2], heads, 3, layer.head_dim)
    split = _side_by_side(x, turns, layer.hidden_size, heads)
    y = _attended(cache, layer.layer_idx, split, layer.inv_norm_factor, bias=alibi)
    return layer.dense(y) + residual, None


def _mpt(layer: Any, hidden_states: Tensor, position_bias: Tensor, cache: Any = None, **_: Any) -> tuple[Tensor, None]:
    x = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        x = x.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    query, key, value = (_heads(part, layer.n_heads) for part in x.split(layer.hidden_size, -1))
    y = _attended(cache, layer.layer_idx, (query, key, value), layer.softmax_scale, bias=position_bias)
    return layer.out_proj(y), None


def _ctrl(layer: Any, v: Tensor, k: Tensor, q: Tensor, cache: Any = None, **_: Any) -> tuple[Tensor, None]:
    projected = (layer.Wq(q), layer.Wk(k), layer.Wv(v))
    query, key, value = (_heads(x, layer.num_heads) for x in projected)
    scale = float(query.shape[-1]) ** -0.5
    return layer.dense(_attended(cache, layer.layer_idx, (query, key, value), scale)), None


_LAYERS: dict[str, Callable[..., Any]] = {  # by modeling file and class
    "gpt_neo.GPTNeoSelfAttention": _gpt_neo,
    "gptj.GPTJAttention": _gptj,
    "codegen.CodeGenAttention": _codegen,
    "xglm.XGLMAttention": _xglm,
    "bloom.BloomAttention": _bloom,
    "mpt.MptAttention": _mpt,
    "ctrl.MultiHeadAttention": _ctrl,
}
_TURNED = (_gptj, _codegen)


def said_again(layer: nn.Module) -> Callable[..., Any] | None:
    """What stands for the `forward` of a layer; None for layers of other classes."""
    file, name = type(layer).__module__.rpartition(".modeling_")[2], type(layer).__name__
    return _LAYERS.get(f"{file}.{name}")


def own_tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Tables of positions that layers hold themselves, by the names of their placeholders."""
    turned = next((layer for layer in model.modules() if said_again(layer) in _TURNED), None)
    return {SINUSOIDS: Sinusoids(turned)} if turned is not None and model.config.rotary_dim else {}
