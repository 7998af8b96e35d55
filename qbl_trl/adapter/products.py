"""The two products of a balanced adapter as autograd functions: pooled input times A, and B expanded onto the output.

    project:     h = A sum_p(x)                        x' = x
    add_expanded: y' = y + expand_e(B h)

Left to autograd, the same formulas make a full-size temporary for every pooling, expansion, scaling and sum, in both
directions; memory traffic then costs more than the products. Here the forward pass keeps the pooled input and h, and
the backward pass adds the expanded gradient onto the base's in one step: `project` therefore returns x as well, and
the base layer is given that x.

What follows no autograd function (`torch.func`, forward-mode differentiation, `torch.jit.trace`) gets the formulas as
they stand. So do backward passes that are differentiated themselves; for them `project` returns what it pooled, too.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from qbl_trl.arithmetic import follows_no_function

# A last axis shorter than this is walked slice by slice: reductions and broadcasts over it do not vectorize.
_SHORT = 8
# Up to this many columns of an expanded matrix, one larger product beats a smaller one and an expansion.
_EXPANDED_COLUMNS = 128


def _rows(x: Tensor) -> Tensor:
    """A matrix with one row per token: (..., F) -> (T, F); a single token may come without an axis of its own."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def sum_neighbours(x: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """Sum of neighbouring features: (..., K) -> (..., K / factor), added up in `dtype`."""
    if factor == 1:
        return x.to(dtype)
    blocks = x.unflatten(-1, (-1, factor))
    if factor >= _SHORT:
        return blocks.sum(-1, dtype=dtype)
    total = blocks[..., 0].to(dtype) + blocks[..., 1].to(dtype)
    for at in range(2, factor):
        total += blocks[..., at]
    return total


def plus_expanded(y: Tensor, update: Tensor, factor: int, into: Tensor | None = None) -> Tensor:
    """y + expand(update): (..., N) and (..., N / factor) -> (..., N) in the dtype of y; written to `into` if given."""
    update = update.to(y.dtype)
    if factor == 1:
        return torch.add(y, update, out=into)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # the compiler fuses it; neither follows an `out`
        return (y.unflatten(-1, (-1, factor)) + update.unsqueeze(-1)).flatten(-2)
    result = torch.empty_like(y, memory_format=torch.contiguous_format) if into is None else into
    blocks, source = result.unflatten(-1, (-1, factor)), y.unflatten(-1, (-1, factor))
    if factor >= _SHORT:
        torch.add(source, update.unsqueeze(-1), out=blocks)
        return result
    for at in range(factor):
        torch.add(source[..., at], update, out=blocks[..., at])
    return result


def plus_product(y: Tensor, h: Tensor, weight: Tensor, factor: int, into: Tensor | None = None) -> Tensor:
    """y + expand(h weight^T): (..., N), (..., R) and (N / factor, R) -> (..., N) in the dtype of y."""
    if y.dtype == weight.dtype and factor * weight.shape[1] <= _EXPANDED_COLUMNS:
        wide = weight if factor == 1 else weight.repeat_interleave(factor, 0)
        if into is not None:
            torch.addmm(_rows(y), _rows(h), wide.T, out=into.view(-1, into.shape[-1]))
            return into
        # No view: a model may add in place to what it gets, and autograd forbids that for a function's view.
        return torch.ops.aten._unsafe_view(torch.addmm(_rows(y), _rows(h), wide.T), y.shape)
    return plus_expanded(y, h @ weight.T, factor, into)


class _LastPooled(threading.local):
    """What was pooled last: q, k and v (or gate and up) read one x, and then share, and keep, one pooled copy.

    Only for an x that autograd made: what a user holds may change without a trace (through `.data`, or numpy).
    """

    source: weakref.ref[Tensor] | None = None
    key: tuple[Any, ...] = ()
    pooled: Tensor | None = None

    def sum_neighbours(self, x: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
        if factor == 1 or x.grad_fn is None or torch.is_inference_mode_enabled():
            return sum_neighbours(x, factor, dtype)
        key = (x._version, factor, dtype)
        if self.pooled is None or self.source is None or self.source() is not x or self.key != key:
            self.pooled = sum_neighbours(x, factor, dtype)
            self.source, self.key = weakref.ref(x, self._forget), key
        return self.pooled

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        """Called in the thread that lets go of an x, which may be another one's: that keeps what it remembers."""
        if self.source is source:
            self.source = self.pooled = None


_last = _LastPooled()


def _shared_sum(x: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """sum_neighbours, remembered; a compiler finds the common product itself, and may not meet Python state."""
    if torch.compiler.is_compiling():
        return sum_neighbours(x, factor, dtype)
    return _last.sum_neighbours(x, factor, dtype)


def _passed_on(ctx: Any, x: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """x for the base layer, and the pooled x as an output of its own memory's alias.

    The input of a model's first layers has no gradient, and must not ask the base for one.
    """
    same, alias = x.view_as(x), pooled.detach()
    if not ctx.needs_input_grad[0]:
        ctx.mark_non_differentiable(same, alias)
    return same, alias


def _sum_of_gradients(to_x: Tensor | None, to_pooled: Tensor | None, factor: int, like: torch.dtype) -> Tensor | None:
    if to_pooled is None:
        return to_x
    if to_x is None:
        to_x = torch.zeros(*to_pooled.shape[:-1], to_pooled.shape[-1] * factor, dtype=like, device=to_pooled.device)
    return plus_expanded(to_x, to_pooled, factor)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.factor, ctx.dtype = factor, x.dtype
        ctx.set_materialize_grads(False)
        return _passed_on(ctx, x, _shared_sum(x, factor, dtype))

    @staticmethod
    def backward(ctx: Any, to_x: Tensor | None, to_pooled: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        dx = _sum_of_gradients(to_x, to_pooled, ctx.factor, ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: int) -> tuple[Tensor, Tensor, Tensor]:
        same, pooled = _passed_on(ctx, x, _shared_sum(x, factor, weight.dtype))
        ctx.factor, ctx.dtype = factor, x.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(pooled, weight)
        return same, pooled @ weight.T, pooled

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, to_x: Tensor | None, to_h: Tensor | None, to_pooled: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        pooled, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _sum_of_gradients(to_x, to_pooled, ctx.factor, ctx.dtype)
            if to_h is not None and dx is not None:
                dx = plus_product(dx, to_h, weight.T, ctx.factor)
            elif to_h is not None:
                dx = _sum_of_gradients(None, to_h @ weight, ctx.factor, ctx.dtype)
        if ctx.needs_input_grad[1] and to_h is not None:
            dw = _rows(to_h).T @ _rows(pooled)
        return dx, dw, None


class _AddExpanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, weight: Tensor, factor: int, in_place: bool) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(h, weight)
        if not in_place:
            return plus_product(y, h, weight, factor)
        ctx.mark_dirty(y)
        plus_product(y, h, weight, factor, into=y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, weight = ctx.saved_tensors
        pooled = sum_neighbours(grad, ctx.factor, weight.dtype)
        dh = pooled @ weight if ctx.needs_input_grad[1] else None
        dw = _rows(pooled).T @ _rows(h) if ctx.needs_input_grad[2] else None
        return grad, dh, dw, None, None


def _as_formulas() -> bool:
    """Whether whoever follows the computation here follows no autograd function."""
    if torch.compiler.is_compiling():
        return False
    return follows_no_function() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


def pool(x: Tensor, factor: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x itself, for the base layer, and the sum of its neighbours: (..., K) -> (..., K) and (..., K / factor)."""
    if _as_formulas():
        return x, sum_neighbours(x, factor, dtype)
    result: tuple[Tensor, Tensor] = _Pool.apply(x, factor, dtype)  # type: ignore[no-untyped-call]
    return result


def project(x: Tensor, weight: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """x itself, for the base layer, and h = sum_p(x) weight^T: (..., K), (R, K / factor) -> (..., K), (..., R)."""
    if _as_formulas():
        return x, sum_neighbours(x, factor, weight.dtype) @ weight.T
    result: tuple[Tensor, Tensor] = _Project.apply(x, weight, factor)[:2]  # type: ignore[no-untyped-call]
    return result


def add_expanded(y: Tensor, h: Tensor, weight: Tensor, factor: int, own: bool = False) -> Tensor:
    """y + expand_e(h weight^T): (..., N), (..., R), (N / factor, R) -> (..., N) in the dtype of y.

    Args:
        own: nobody else keeps y, so that it may be written over where autograd can follow that without a copy.
    """
    if _as_formulas():
        update = (h @ weight.T).to(y.dtype)
        return y + (update if factor == 1 else update.repeat_interleave(factor, -1))
    plain = own and type(y) is Tensor and not torch.compiler.is_compiling()
    in_place = plain and y.is_contiguous() and not y._is_view() and not (y.is_leaf and y.requires_grad)
    result: Tensor = _AddExpanded.apply(y, h, weight, factor, in_place)  # type: ignore[no-untyped-call]
    return result
