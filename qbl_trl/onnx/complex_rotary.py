"""Rotation by complex numbers (DeepSeek V2, Llama 4), which no tracer writes, in real ones while a model is traced.

x' = x * exp(i angle)    x, x': pairs of neighbouring features as real and imaginary parts
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qbl_trl.onnx.threads import replaced_here

_NAME = "apply_rotary_emb"


@contextmanager
def rotated_in_real_numbers(model: PreTrainedModel) -> Iterator[None]:
    """While open, `torch.polar` gives (..., 2) real numbers, and the model's files rotate by those."""
    found = {}
    for file in {type(module).__module__ for module in model.modules()}:
        rotate = getattr(sys.modules[file], _NAME, None)
        if rotate is not None and "freqs_cis" in inspect.signature(rotate).parameters:
            found[file] = rotate
    rotations = [(sys.modules[file], _NAME, partial(_rotate, _heads_at(rotate))) for file, rotate in found.items()]
    with replaced_here([(torch, "polar", _polar), *rotations] if found else []):
        yield


def _polar(size: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([size * angle.cos(), size * angle.sin()], -1)


def _heads_at(rotate: Callable[..., Any]) -> int:
    """Which axis of queries and keys holds the heads: (B, H, S, D) or (B, S, H, D)."""
    x, turns = torch.ones(1, 2, 3, 8), torch.ones(1, 3, 4, dtype=torch.complex64)
    try:
        rotate(x, x, turns)
    except RuntimeError:  # 3 positions do not fit where 2 heads are
        return 2
    return 1


def _rotate(axis: int, query: Tensor, key: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = freqs_cis.unsqueeze(axis).unbind(-1)

    def turned(x: Tensor) -> Tensor:
        real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2).type_as(x)

    return turned(query), turned(key)
