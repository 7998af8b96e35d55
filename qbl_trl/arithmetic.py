"""Products in the dtype they are written in, whatever a training run allows itself: what comparisons are made in.

And in float64, wherever they lie; and whether a product is followed by what knows no autograd function.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BACKENDS: tuple[Any, ...] = tuple(  # none before torch 2.9; mixing them with the older setting is an error there
    backend
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(backend, "fp32_precision")
)


_DEFAULTS = threading.Lock()
_before: list[torch.dtype] = []  # the caller's first, then one for each that came while it was open


def in_float64(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float64, where they are, or on the CPU where their device has none (MPS, some XPUs)."""
    here = all(_has_float64(tensor.device.type) for tensor in tensors)
    return [(tensor if here else tensor.cpu()).double() for tensor in tensors]


@functools.cache
def _has_float64(device_type: str) -> bool:
    if device_type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.zeros(1, device=device_type).double()
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def follows_no_function() -> bool:
    """Whether who differentiates or maps this computation follows formulas alone: `torch.func`, forward mode."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # type: ignore[attr-defined]


@contextmanager
def plain_arithmetic(device_type: str) -> Iterator[None]:
    """While open, no autocast and no product of float32 matrices in TF32 or bfloat16 parts.

    Runs ask for these by `tf32=True`, `torch_compile=True` or `torch.set_float32_matmul_precision`; they are a thousand
    times coarser than what an exact merge may differ by.

    Source: PyTorch, notes on CUDA semantics (TensorFloat-32).
    """
    off = torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
    with _full_precision(), off:
        yield


@contextmanager
def plain_defaults() -> Iterator[None]:
    """While open, new tensors are float32 and on the CPU, whatever the caller has set for models of his own.

    The type is the whole process's: of several threads the first sets it, and the last sets it back.
    """
    elsewhere = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with _DEFAULTS:
        _before.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
    try:
        with elsewhere:
            yield
    finally:
        with _DEFAULTS:
            if len(_before) == 1:
                torch.set_default_dtype(_before[0])
            _before.pop()


@contextmanager
def _full_precision() -> Iterator[None]:
    if not _BACKENDS:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    everywhere: Any = torch.backends
    inherited, everywhere.fp32_precision = everywhere.fp32_precision, "ieee"
    own = [(b, b.fp32_precision) for b in _BACKENDS if b.fp32_precision not in ("none", "ieee")]
    for backend, _ in own:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in own:
            backend.fp32_precision = precision
        everywhere.fp32_precision = inherited
