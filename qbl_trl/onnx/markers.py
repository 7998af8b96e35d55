"""Placeholders that stand for a layer while a model is traced.

Tracing a 4-bit model through its arithmetic would copy every weight into the trace and bury each layer under dozens
of nodes. Instead each layer that has a lowering of its own is replaced, in a skeleton of the model, by a placeholder
that emits one node of the domain `qbl_trl.trace` holding the layer's name; `linears.py` and its siblings rewrite these
nodes afterwards, with weights read from the real model. No node of this domain survives an export.

| node | inputs | output | attributes |
| --- | --- | --- | --- |
| Linear | x (..., K) | (..., N) | name |
| Embedding | ids (...) | (..., N) | name |
| Norm | x (..., K) | (..., K) | name |
| Gelu | x (..., K) | (..., K) | form ("none" or "tanh") |
| RotaryTable | x, position_ids (B, S) | cos or sin (B, S, R) | name, part (0: cos, 1: sin) |
| Rotary | x (B, H, S, D), cos, sin | (B, H, S, D) | interleaved (1: pairs of neighbours) |
| Attention | query (B, H, S, D), key, value (B, KV, T, D), others | (B, S, H, D) | heads, scale, window, softcap |

Attention may be given others, which its attribute `given` names: a bias of scores (B or 1 times H, 1, T), which counts
`bias_scale` times; and a sink (H,), one more score of each softmax, whose weight goes nowhere.

During the trace no weight is read and only shapes matter, with one exception: a router chooses experts by its values,
and an expert that no token reaches would be missing from the graph. So narrow outputs are noise, the others zeros.
"""

# ruff: noqa: ARG004 - torch.autograd.Function passes to `forward` what only `symbolic` needs
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TRACE_DOMAIN = "qbl_trl.trace"


def _typed(value: Any, like: Any, sizes: list[int | None]) -> Any:
    """Give a traced value an element type and a rank: an unknown one makes later shape arithmetic fold wrongly."""
    value.setType(like.type().with_sizes(sizes))
    return value


def _sizes(value: Any) -> list[int | None]:
    """Sizes as far as the tracer knows them; None where an axis is dynamic."""
    return list(value.type().varyingSizes())


_NOISY = 1024  # features; more than any router has


def _noise(like: Tensor, *sizes: Any) -> Tensor:
    """Normally distributed values, made outside of torch so that the tracer takes them for a constant."""
    shape = [int(size) for size in sizes]
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)


def _emit(function: Any, *args: Any) -> Any:
    """Run a placeholder; while tracing, this records its node."""
    return function.apply(*args)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, features: int) -> Tensor:  # type: ignore[override]
        return x.new_zeros(*x.shape[:-1], features) if features > _NOISY else _noise(x, *x.shape[:-1], features)

    @staticmethod
    def symbolic(g: Any, x: Any, name: str, features: int) -> Any:
        sizes = _sizes(x)
        return _typed(g.op(f"{TRACE_DOMAIN}::Linear", x, name_s=name), x, [*sizes[:-1], features])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:  # type: ignore[override]
        return _noise(x, *x.shape)

    @staticmethod
    def symbolic(g: Any, x: Any, name: str) -> Any:
        return _typed(g.op(f"{TRACE_DOMAIN}::Norm", x, name_s=name), x, _sizes(x))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: str) -> Tensor:  # type: ignore[override]
        return torch.nn.functional.gelu(x, approximate=form)

    @staticmethod
    def symbolic(g: Any, x: Any, form: str) -> Any:
        return _typed(g.op(f"{TRACE_DOMAIN}::Gelu", x, form_s=form), x, _sizes(x))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, like: Tensor, name: str, features: int) -> Tensor:  # type: ignore[override]
        return _noise(like, *ids.shape, features)

    @staticmethod
    def symbolic(g: Any, ids: Any, like: Any, name: str, features: int) -> Any:
        sizes = _sizes(ids)
        return _typed(g.op(f"{TRACE_DOMAIN}::Embedding", ids, name_s=name), like, [*sizes, features])


class _RotaryTable(torch.autograd.Function):
    """One output, because the tracer fails over one with several that nobody reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, position_ids: Tensor, name: str, width: int, part: int) -> Tensor:  # type: ignore[override]
        return x.new_zeros(*position_ids.shape, width)

    @staticmethod
    def symbolic(g: Any, x: Any, position_ids: Any, name: str, width: int, part: int) -> Any:
        table = g.op(f"{TRACE_DOMAIN}::RotaryTable", x, position_ids, name_s=name, part_i=part)
        return _typed(table, x, [*_sizes(position_ids), width])


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(x)

    @staticmethod
    def symbolic(g: Any, x: Any, cos: Any, sin: Any, interleaved: bool) -> Any:
        return _typed(g.op(f"{TRACE_DOMAIN}::Rotary", x, cos, sin, interleaved_i=int(interleaved)), x, _sizes(x))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
        heads: int,
        scale: float,
        window: int,
        softcap: float,
        bias_scale: float,
    ) -> Tensor:
        return torch.zeros_like(query).transpose(1, 2).contiguous()

    @staticmethod
    def symbolic(
        g: Any,
        query: Any,
        key: Any,
        value: Any,
        bias: Any,
        sink: Any,
        heads: int,
        scale: float,
        window: int,
        softcap: float,
        bias_scale: float,
    ) -> Any:
        given = {name: other for name, other in (("bias", bias), ("sink", sink)) if other is not None}
        attributes: dict[str, Any] = {"heads_i": heads, "scale_f": scale, "window_i": window, "softcap_f": softcap}
        attributes |= {"bias_scale_f": bias_scale, "given_s": " ".join(given)}
        node = g.op(f"{TRACE_DOMAIN}::Attention", query, key, value, *given.values(), **attributes)
        sizes = _sizes(query)
        return _typed(node, query, [sizes[0], sizes[2], sizes[1], sizes[3]])


class LinearMarker(nn.Module):
    """Stands for a linear layer: (..., K) -> (..., out_features).

    Args:
        bias: what the layer adds, (out_features,): Jamba takes it away again.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, dtype: torch.dtype, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, in_features, out_features
        # Models look at `.weight.dtype`; no weight is ever used for arithmetic here.
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _emit(_Linear, x, self.name, self.out_features)
        return y


class EmbeddingMarker(nn.Module):
    """Stands for a token embedding: ids (...) -> (..., embedding_dim). Multiplying its rows is traced as it is."""

    def __init__(
        self, name: str, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.name, self.num_embeddings, self.embedding_dim, self.scale = name, num_embeddings, embedding_dim, scale
        self.like = torch.zeros(1, dtype=dtype)
        self.weight = _Table(self)

    def rows(self, ids: Tensor) -> Tensor:
        """What the table holds, not multiplied."""
        y: Tensor = _emit(_Embedding, ids, self.like, self.name, self.embedding_dim)
        return y

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids) if self.scale == 1 else self.rows(ids) * self.scale


class _Table:
    """The weight of an embedding: a model may read one row of it (Gemma 4, where images will be)."""

    def __init__(self, marker: EmbeddingMarker) -> None:
        self._marker = marker
        self.dtype, self.device = marker.like.dtype, marker.like.device
        self.shape = torch.Size([marker.num_embeddings, marker.embedding_dim])

    def __getitem__(self, key: Any) -> Tensor:
        row, *rest = key if isinstance(key, tuple) else (key,)
        if not isinstance(row, int) or any(part != slice(None) for part in rest):
            raise TypeError("more than a row of an embedding is read")
        return self._marker.rows(torch.tensor([row]))[0]


class NormMarker(nn.Module):
    """Stands for a root-mean-square norm over the last dimension."""

    def __init__(self, name: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)  # models ask for its type

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _emit(_Norm, x, self.name)
        return y


class GatedNormMarker(NormMarker):
    """Stands for a root-mean-square norm with a gate, before or after it: norm(x a(gate)) or norm(x) a(gate).

    Args:
        activation: a, of the gate.
    """

    def __init__(self, name: str, dtype: torch.dtype, activation: Callable[[Tensor], Tensor], gate_first: bool) -> None:
        super().__init__(name, dtype)
        self.activation, self.gate_first = activation, gate_first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        opened = self.activation(gate)
        return super().forward(x * opened) if self.gate_first else super().forward(x) * opened


class GeluMarker(nn.Module):
    """Stands for a GELU, exact (form "none") or through tanh (form "tanh")."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _emit(_Gelu, x, self.form)
        return y


class RotaryTableMarker(nn.Module):
    """Stands for the module that turns positions into cosines and sines, (B, S) -> two of (B, S, columns)."""

    def __init__(self, name: str, columns: int) -> None:
        super().__init__()
        self.name, self.columns = name, columns

    def forward(self, x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        # (3, B, S) where images have rows and columns; text has the same position three times.
        one = position_ids[0] if position_ids.dim() == 3 else position_ids
        return mark_tables(x, one, self.name, self.columns)


class TypedTableMarker(nn.Module):
    """The same for a module with tables of several types of layers, whose columns are given by type."""

    def __init__(self, name: str, columns: dict[str, int]) -> None:
        super().__init__()
        self.name, self.columns = name, columns
        self.layer_types = list(columns)  # LFM 3 asks for them

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        return mark_tables(x, position_ids, f"{self.name}.{layer_type}", self.columns[layer_type])


class WholeTableMarker(RotaryTableMarker):
    """The same for a module that gives tables for a length, whose rows are read by positions."""

    def forward(self, x: Tensor, seq_len: Any = None, **_: Any) -> tuple[Any, Any]:  # type: ignore[override]
        return _Rows(self, x, 0), _Rows(self, x, 1)


class _Rows:
    """A table that is read by positions (B, S)."""

    def __init__(self, marker: RotaryTableMarker, x: Tensor, part: int) -> None:
        self.marker, self.x, self.part = marker, x, part

    def __getitem__(self, position_ids: Tensor) -> Tensor:
        return mark_tables(self.x, position_ids, self.marker.name, self.marker.columns)[self.part]


def mark_tables(x: Tensor, position_ids: Tensor, name: str, columns: int) -> tuple[Tensor, Tensor]:
    """Stands for cosines and sines of positions (B, S), two of (B, S, columns)."""
    cos, sin = (_emit(_RotaryTable, x, position_ids, name, columns, part) for part in (0, 1))
    return cos, sin


def mark_rotary(
    q: Tensor, k: Tensor, cos: Any, sin: Any, *rows: Any, interleaved: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    """Stands for `apply_rotary_pos_emb` of a modeling file; it reads whole tables itself."""
    cos, sin = (table[rows[0]] if isinstance(table, _Rows) else table for table in (cos, sin))
    return _emit(_Rotary, q, cos, sin, interleaved), _emit(_Rotary, k, cos, sin, interleaved)


def mark_one_rotary(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, interleaved: bool) -> Tensor:
    """The same for a function of one tensor, (B, H, S, D), or (B, S, H, D) where `unsqueeze_dim` is 2."""
    heads = x.transpose(1, 2) if unsqueeze_dim == 2 else x
    y: Tensor = _emit(_Rotary, heads, cos, sin, interleaved)
    return y.transpose(1, 2) if unsqueeze_dim == 2 else y


def mark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    bias_scale: float = 1.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Stands for causal attention; window and softcap are 0 where unused."""
    heads = int(query.shape[1])
    y: Tensor = _emit(_Attention, query, key, value, bias, sink, heads, scale, window, softcap, bias_scale)
    return y
