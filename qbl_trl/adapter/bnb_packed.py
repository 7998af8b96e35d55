"""Float weights of bitsandbytes layers that a forward pass has repacked for processors with AVX512-BF16.

In evaluation mode `Linear4bit` reorders its codes in place: rows in blocks of 32, the even and odd halves of a block's
column pair in the low and high nibbles of one run; block maxima become (K / blocksize, N) bfloat16. Dequantizing such
a layer by the ordinary route reads the codes in the wrong order.
"""

from typing import Any

import torch
from torch import Tensor

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
