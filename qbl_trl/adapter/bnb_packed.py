"""Layers of bitsandbytes that a forward pass repacks for processors with AVX512-BF16.

In evaluation mode `Linear4bit` reorders its codes in place: rows in blocks of 32, the even and odd halves of a block's
column pair in the low and high nibbles of one run; block maxima become (K / blocksize, N) bfloat16. Dequantizing such
a layer by the ordinary route reads the codes in the wrong order. And a `state_dict()` puts the codes back, but (0.50)
leaves block maxima transposed: a base that was evaluated and saved computes something else from then on. Under
adapters, which are trained, evaluated and saved in turns, layers keep their order: it is slower in evaluation, and the
base is the same in both modes.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

_RUN = 32


def is_repacked(weight: Any) -> bool:
    """Whether this Params4bit holds the reordered layout."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def repacked_weight(packed: Tensor, state: Any) -> Tensor:
    """What the reordered layer multiplies with.

    Args:
        packed: (N, K / 2) uint8.
        state: its QuantState: shape (N, K), code (16,), blocksize, absmax (K / blocksize, N).

    Returns:
        (N, K) float32.
    """
    rows, columns = state.shape
    runs = packed.reshape(-1, _RUN)
    codes = torch.cat([runs & 15, runs >> 4], dim=-1).view(rows // _RUN, columns // 2, _RUN, 2)
    codes = codes.transpose(1, 2).reshape(rows, columns)
    maxima = state.absmax.T.float().repeat_interleave(state.blocksize, dim=1)
    return state.code.float()[codes.long()] * maxima  # type: ignore[no-any-return]


def keep_order_(model: nn.Module) -> None:
    """Have no 4-bit layer of a model repacked from now on; those that are get their codes back in the usual order.

    Block maxima of these stay rounded to bfloat16 (double quantization then rounds them once more).
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if is_repacked(layer.weight):
                _put_back_(layer.weight)


def _put_back_(weight: Any) -> None:
    state = weight.quant_state
    maxima = None if state.original_nested else state.absmax.T.reshape(-1).float()
    inverse = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
    weight.data, weight.quant_state = inverse(weight.data, state)
    if maxima is not None:
        weight.quant_state.absmax = maxima
