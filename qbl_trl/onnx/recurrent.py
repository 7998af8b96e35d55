"""Layers that keep a state of fixed size between steps: short convolutions and linear recurrences.

Modeling files of transformers 5 compute them by functions of a few names, which emit placeholders during a trace:

    causal_conv1d_fn                            y_t = act(sum_j w_j x_{t - K + 1 + j} + b), channel by channel
    torch_chunk_gated_delta_rule,
    chunk_kimi_delta_attention                  S_t = e^g S + k (beta (v - e^g S^T k))^T    y = S_t^T q / sqrt(d)
    mamba2_chunk_scan                           S_t = e^(dt A) S + B (dt x)^T               y = S_t^T C + D x
    mamba_selective_scan                        the same, each feature a head of its own    y = (S_t^T C + D x) silu(z)

One placeholder stands for all recurrences: a state S (d_k, d_v) of each head decays, may lose what it holds under a key
(where there is a beta), takes in key and value, and is read by a query. Models hand states on in that layout too.

| node | inputs | outputs | attributes |
| --- | --- | --- | --- |
| Text | x (B, S, C), mask (B, S) | x, 0 where the mask is | |
| CausalConv | x (B, C, T), weight (C, K), bias (C,) | (B, C, T) | taps (K), silu |
| UnitLength | x (..., d) | x / sqrt(sum x^2 + 1e-6) | width |
| Recurrence | query, key, value, decay, state, beta | as value, state | heads of the first three, by_key, scale |

    query, key (B, S, G, d_k)    value (B, S, H, d_v)    decay (B, S, H), by_key (B, S, H, d_k)    beta (B, S, H)

Recurrences compute in float32 whatever the model's type, as the models' own code does: states collect what is rounded.
"""

# ruff: noqa: ARG004 - torch.autograd.Function passes to `forward` what only `symbolic` needs
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers.activations import ACT2FN

from qbl_trl.onnx.layer_caches import CONVOLVED, RECURRENT, enter, next_state
from qbl_trl.onnx.markers import TRACE_DOMAIN
from qbl_trl.onnx.threads import replaced_here

Calls = Counter[str]  # of the functions that go on from a state, by the name that it has among a layer's tensors
_FUSED_ACTIVATIONS = ("silu", "swish")
_UNBOUNDED = (0.0, float("inf"))  # where a softplus lies anyway


class _Text(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, mask: Any) -> Any:
        return g.op(f"{TRACE_DOMAIN}::Text", x, mask).setType(x.type())


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, taps: int, silu: bool) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(x)

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, bias: Any, taps: int, silu: bool) -> Any:
        given = [x, weight] if bias is None else [x, weight, bias]
        return g.op(f"{TRACE_DOMAIN}::CausalConv", *given, taps_i=taps, silu_i=int(silu)).setType(x.type())


class _UnitLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(x)

    @staticmethod
    def symbolic(g: Any, x: Any, width: int) -> Any:
        return g.op(f"{TRACE_DOMAIN}::UnitLength", x, width_i=width).setType(x.type())


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        state: Tensor,
        beta: Tensor | None,
        heads: tuple[int, int, int],
        by_key: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(value), torch.zeros_like(state)

    @staticmethod
    def symbolic(
        g: Any,
        query: Any,
        key: Any,
        value: Any,
        decay: Any,
        state: Any,
        beta: Any,
        heads: tuple[int, int, int],
        by_key: bool,
        scale: float,
    ) -> tuple[Any, Any]:
        given = [query, key, value, decay, state, *(() if beta is None else (beta,))]
        attributes = {"heads_i": heads, "by_key_i": int(by_key), "scale_f": scale}
        y, after = g.op(f"{TRACE_DOMAIN}::Recurrence", *given, **attributes, outputs=2)
        return y.setType(value.type()), after.setType(state.type())


@contextmanager
def recurrences_traced(model: nn.Module) -> Iterator[Calls]:
    """While open, a model's modeling files emit placeholders for convolutions and recurrences, and count them."""
    calls: Calls = Counter()
    enter(None)
    files = sorted({type(module).__module__ for module in model.modules()})
    with replaced_here(
        (sys.modules[file], name, _counted(function, calls) if function in _STATE_OF else function)
        for file, (name, function) in product(files, _INSTEAD.items())
        if hasattr(sys.modules[file], name)
    ):
        yield calls


def _counted(function: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    @wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[_STATE_OF[function]] += 1
        return function(*args, **kwargs)

    return counting


def _convolve(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    fused = activation in _FUSED_ACTIVATIONS
    y: Tensor = _CausalConv.apply(_as(hidden_states, weight.dtype), weight, bias, int(weight.shape[-1]), fused)  # type: ignore[no-untyped-call]
    if activation is not None and not fused:
        y = ACT2FN[activation](y)
    return _as(y, hidden_states.dtype)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    dtype, width = query.dtype, int(key.shape[-1])
    query, key, value, g, beta = (_as(x, torch.float32) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (_UnitLength.apply(x, width) for x in (query, key))  # type: ignore[no-untyped-call]
    y, state = _recur(query, key, value, g, initial_state, beta, width**-0.5)
    return _as(y, dtype), state if output_final_state else None


def _mamba2(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 0,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _UNBOUNDED,
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    step = _as(dt, torch.float32)
    step = step if dt_bias is None else step + _as(dt_bias, torch.float32)
    step = softplus(step) if dt_softplus else step
    if not dt_softplus or tuple(dt_limit) != _UNBOUNDED:
        step = torch.clamp(step, *dt_limit)
    x, A, B, C = (_as(given, torch.float32) for given in (hidden_states, A, B, C))
    y, state = _recur(C, B, x * step[..., None], A * step, initial_states, None, 1.0)
    if D is not None:
        y = y + x * _as(D, torch.float32)[:, None]
    return (y, state) if return_final_states else y


def _mamba1(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """x, dt, z (B, H, S), A (H, d_k), B and C (B, d_k, S): features are heads of size 1 that share keys and queries."""
    x, step, B, C = (_as(given, torch.float32).transpose(1, 2) for given in (hidden_states, dt, B, C))
    step = step if delta_bias is None else step + _as(delta_bias, torch.float32)
    step = softplus(step) if delta_softplus else step
    decay = step[..., None] * _as(A, torch.float32)
    before = next_state()
    state = None if before is None else before[..., None]
    y, after = _recur(C[:, :, None], B[:, :, None], (x * step)[..., None], decay, state, None, 1.0)
    y = y[..., 0] if D is None else y[..., 0] + x * _as(D, torch.float32)
    y = y.transpose(1, 2)
    y = y if z is None else y * silu(_as(z, torch.float32))
    return (y, after[..., 0]) if return_last_state else y


def _recur(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    state: Tensor | None,
    beta: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if state is None:  # not traced: a model is asked for what it keeps
        state = value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[3])
    heads = tuple(int(x.shape[2]) for x in (query, key, value))
    given = (query, key, value, decay, state, beta, heads, decay.dim() == 4, scale)
    y, after = _Recurrence.apply(*given)  # type: ignore[no-untyped-call]
    return y, after


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tracer writes a cast to the type that a tensor has already."""
    return x if x.dtype == dtype else x.to(dtype)


def _without_padding(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The models multiply by 0, which leaves what is not finite: attention may write nothing at all for padding."""
    if attention_mask is None:
        return hidden_states
    kept: Tensor = _Text.apply(hidden_states, attention_mask)  # type: ignore[no-untyped-call]
    return kept


_INSTEAD: dict[str, Callable[..., Any]] = {
    "apply_mask_to_padding_states": _without_padding,
    "causal_conv1d_fn": _convolve,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba1,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
}
_STATE_OF = {_convolve: CONVOLVED, _delta_rule: RECURRENT, _mamba2: RECURRENT, _mamba1: RECURRENT}
