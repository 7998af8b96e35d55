"""How large keys and values become, measured on text: the caller's, or what the model writes when left to itself.

Text of its own begins with random tokens, in every other row behind the token that begins its texts, and is drawn at a
temperature at which a model that was tuned to answer with one word writes more than that. Features that the
rotary embedding turns into each other share one range, the norm of the pair: rotation leaves it as it is, so that short
texts tell of all positions.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.onnx_pb import GraphProto
from torch import Tensor

from qbl_trl.errors import ExportError
from qbl_trl.onnx.files import MODEL_FILE
from qbl_trl.onnx.gate import Gate
from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.layer_caches import STATES
from qbl_trl.onnx.session import OnnxLogits

Cache = Mapping[str, np.ndarray]  # keys and values (B, heads, T, features) by the same names
Ranges = Mapping[str, np.ndarray]  # largest absolute values (heads, features) by the name of the cache's input

_ROWS, _LENGTH = 48, 24  # of the text that a model writes for this: a step takes nearly as long for fewer rows
_TEMPERATURE = 1.5
_HELD_OUT = 2  # rows more, which the gate reads and no range has seen


def check_texts(texts: list[Tensor], vocabulary: int, longest: int) -> None:
    """Raise ExportError if a model cannot read texts, token ids (B, S)."""
    if not texts:
        raise ExportError("export_onnx: calibration holds no text; leave it out for text that the model writes itself")
    if any(int(ids.min()) < 0 or int(ids.max()) >= vocabulary for ids in texts):
        raise ExportError(f"export_onnx: calibration holds token ids beyond the model's vocabulary of {vocabulary}")
    if any(ids.shape[1] > longest for ids in texts):
        raise ExportError(f"export_onnx: calibration holds a text of more tokens than the graph reads ({longest})")


def measured(folder: Path, config: Any, longest: int, texts: list[Tensor] | None) -> tuple[Ranges, Gate]:
    """Ranges of the cache of an exact graph, and a gate of other text that is held against it.

    Args:
        config: of the text model.
        longest: tokens the graph reads.
        texts: token ids (B, S) without padding; None for the model's own.
    """
    graph, length = OnnxLogits(folder), min(_LENGTH, longest)
    turned = rotated_features(onnx.load(folder / MODEL_FILE, load_external_data=False).graph)
    own, cache = write_text(graph, config, _HELD_OUT + _ROWS, length)
    written = ({name: values[_HELD_OUT:] for name, values in cache.items()},)
    ranges = largest(written if texts is None else caches_of(graph, texts), turned)
    # Token by token, so that a graph of last logits gives all.
    return ranges, Gate(lambda ids, mask: graph.with_cache(ids, mask, 1), own[:_HELD_OUT])


def write_text(graph: OnnxLogits, config: Any, rows: int, length: int) -> tuple[Tensor, Cache]:
    """Tokens (rows, length) drawn from a model's own distribution, and the cache of all but the last.

    Odd rows begin with the token that begins texts, where there is one; none that begins or ends them follows.
    """
    generator, vocabulary = torch.Generator().manual_seed(0), config.vocab_size
    tokens = torch.randint(0, vocabulary, (rows, min(2, length)), generator=generator)
    marks = [mark for mark in _marks(config) if 0 <= mark < vocabulary]
    first = getattr(config, "bos_token_id", None)  # transformers 5 has none by default
    if first in marks:
        tokens[1::2, 0] = first  # odd rows: a gate pads its first
    cache, start = graph.empty_cache(rows), 0
    while tokens.shape[1] < length:
        logits, cache = graph.step(tokens[:, start:], torch.ones_like(tokens), cache)
        start, likely = tokens.shape[1], logits[:, -1] / _TEMPERATURE
        if len(marks) < vocabulary:
            likely[:, marks] = -torch.inf
        tokens = torch.cat([tokens, draw(likely, generator)], 1)
    return tokens, cache


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of logits (B, V), where its running sum reaches a drawn share: (B, 1). torch.multinomial
    draws V numbers a row, and takes longer for it than a small model for its logits."""
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    shares = 1 - torch.rand(len(sums), 1, generator=generator, dtype=torch.float64)  # above 0: none that cannot come
    return torch.searchsorted(sums, shares * sums[:, -1:])


def _marks(config: Any) -> set[int]:
    """Tokens that begin, end or pad texts."""
    given = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    return {mark for ids in given for mark in (ids if isinstance(ids, list) else [ids]) if isinstance(mark, int)}


def caches_of(graph: OnnxLogits, texts: Iterable[Tensor]) -> Iterator[Cache]:
    """Keys and values of texts, token ids (B, S) without padding, row by row: the logits of one are enough memory."""
    for row in (row for text in texts for row in text.split(1)):
        yield graph.step(row, torch.ones_like(row), graph.empty_cache(1))[1]


def largest(caches: Iterable[Cache], turned: Mapping[str, tuple[int, bool]]) -> Ranges:
    """The largest keys and values of all.

    Args:
        turned: see `rotated_features`.
    """
    found = dict[str, np.ndarray]()
    for cache in caches:
        for name, values in cache.items():
            if name.endswith(STATES):
                continue
            here = spread_over_pairs(values.astype(np.float32), *turned.get(name, (0, False))).max((0, 2))
            found[name] = np.maximum(found.get(name, 0.0), here)
    return found


def spread_over_pairs(values: np.ndarray, width: int, neighbours: bool = False) -> np.ndarray:
    """Absolute values, with the norm of a pair in place of the two features of (..., width) that are rotated.

    Args:
        neighbours: pairs are (2i, 2i + 1), not (i, i + width / 2).
    """
    pairs = [slice(0, width, 2), slice(1, width, 2)] if neighbours else [slice(width // 2), slice(width // 2, width)]
    spread, norm = np.abs(values), np.hypot(*(values[..., part] for part in pairs))
    for part in pairs:
        spread[..., part] = norm
    return spread


def rotated_features(graph: GraphProto) -> dict[str, tuple[int, bool]]:
    """By the name of a cache of keys: how many features of each head are rotated, and whether as neighbours."""
    sizes = {weight.name: weight.dims for weight in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    found = {}
    for node in graph.node:
        if node.op_type == "GroupQueryAttention" and node.input[Input.COS]:
            key = node.input[Input.PAST_KEY]
            neighbours = any(one.name == "rotary_interleaved" and one.i for one in node.attribute)
            found[sources.get(key, key)] = 2 * sizes[node.input[Input.COS]][-1], neighbours
    return found
