"""Products in the dtype they are written in, whatever a training run allows itself: what comparisons are made in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: tuple[Any, ...] = tuple(  # none before torch 2.9; mixing them with the older setting is an error there
    backend
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(backend, "fp32_precision")
)


@contextmanager
def plain_arithmetic(device_type: str) -> Iterator[None]:
    """While open, no autocast and no float32 product in TF32 or bfloat16 parts (`tf32=True`, `torch_compile=True`,
    `torch.set_float32_matmul_precision`), which are a thousand times coarser than what an exact merge may differ by.

    Source: PyTorch, notes on CUDA semantics (TensorFloat-32).
    """
    with _full_precision(), torch.autocast(device_type, enabled=False):
        yield


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
    allowed = [backend.fp32_precision for backend in _BACKENDS]
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(_BACKENDS, allowed, strict=True):
            backend.fp32_precision = precision
