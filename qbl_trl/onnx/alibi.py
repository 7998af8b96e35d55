"""Falcon's bias by the places of keys, in which the tracer forgets that bfloat16 rounds.

    bias = r(r(slope) * r(place))    r: to bfloat16, 8 significant bits

so that from 256 tokens on places are rounded too, and a graph that is traced from the model's own code is another one.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qbl_trl.onnx.threads import replaced_here


@contextmanager
def bias_rounded(model: PreTrainedModel) -> Iterator[None]:
    """While open, Falcon rounds its bias by casts that a tracer keeps."""
    if model.config.model_type != "falcon":
        yield
        return
    file = sys.modules[type(model).__module__]
    original = file.build_alibi_tensor
    # Of places 0 and 1: the slopes, computed before anything is traced.
    slopes = original(torch.ones(1, 2, dtype=torch.long), model.config.num_attention_heads, torch.float32)[:, :, 1:]

    def rounded(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        places = ((attention_mask.cumsum(-1) - 1) * attention_mask)[:, None, None, :]
        bias = _rounded(slopes * _rounded(places.to(torch.float32)))
        return bias.reshape(-1, 1, attention_mask.shape[1]).to(dtype)

    with replaced_here([(file, "build_alibi_tensor", rounded)]):
        yield


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float32)
