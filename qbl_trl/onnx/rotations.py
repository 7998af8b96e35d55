"""How a modeling file rotates queries and keys, found by rotating.

Its functions are given random angles and compared with complex numbers that are turned by them. Tables of cosines and
sines may repeat angles in one way and features be paired in the other; and pairs of neighbours may be taken apart into
two halves beside (DeepSeek), which no product of queries and keys sees.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {  # as a table holds its angles, one for each pair of features
    "halves": lambda angles: torch.cat([angles, angles], -1),
    "neighbours": lambda angles: angles.repeat_interleave(2, -1),
    "once": lambda angles: angles,
}


ROTATING = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")  # names of such functions


def rotate_of(file: str, name: str = ROTATING[0]) -> Callable[..., Any] | None:
    """A function that rotates queries and keys in a modeling file, where it has one."""
    found: Callable[..., Any] | None = sys.modules[file].__dict__.get(name)
    return found


def reads_rows(rotate: Callable[..., Any]) -> bool:
    """Whether it takes whole tables, and positions to find rows by, and not the rows themselves."""
    positions = inspect.signature(rotate).parameters.get("position_ids")
    return positions is not None and positions.default is inspect.Parameter.empty


def takes_one(rotate: Callable[..., Any]) -> bool:
    """Whether it rotates one tensor, queries or keys, (B, H, S, D) or as its `unsqueeze_dim` says (Gemma 4)."""
    return list(inspect.signature(rotate).parameters)[1:3] == ["cos", "sin"]


def pairs_neighbours(rotate: Callable[..., Any], repeats: str) -> bool | None:
    """Whether features are rotated in pairs (2i, 2i + 1), or in pairs (i, i + width / 2), as Llama does; None: neither.

    Args:
        repeats: how the tables that it is given repeat their angles: "halves", "neighbours", or not ("once").
    """
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 3, 8, generator=generator)
    angles = torch.randn(1, 3, 4, generator=generator)
    table = _LAID_OUT[repeats](angles)
    given = [table.cos(), table.sin()]
    if reads_rows(rotate):
        given = [given[0][0], given[1][0], torch.arange(3)[None]]
    try:
        rotated = [rotate(x, *given) for x in (q, k)] if takes_one(rotate) else rotate(q, k, *given)
    except (RuntimeError, TypeError):  # sizes or arguments of another kind
        return None
    for interleaved in (False, True):
        expected = [_rotated(x, angles.unsqueeze(1), interleaved) for x in (q, k)]
        apart = [x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in expected]
        for turned in (expected, apart) if interleaved else (expected,):
            if all(torch.allclose(y, wanted, atol=1e-5) for y, wanted in zip(rotated, turned, strict=True)):
                return interleaved
    return None


def takes_angles_once(module: nn.Module) -> bool:
    """Whether the modeling file of a rotary embedding rotates by tables that hold each angle once."""
    rotate = rotate_of(type(module).__module__)
    return rotate is not None and pairs_neighbours(rotate, "once") is not None


def _rotated(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Complex numbers, turned: their real and imaginary parts are neighbours, or two halves."""
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    turned = real * angles.cos() - imaginary * angles.sin(), real * angles.sin() + imaginary * angles.cos()
    return torch.stack(turned, -1 if interleaved else -2).flatten(-2)
