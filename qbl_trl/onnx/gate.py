"""The parity gate: a graph is kept only if it computes what the torch model computes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import onnxruntime
import torch
from torch import Tensor, nn

from qbl_trl.errors import ConfigError, ExportError
from qbl_trl.onnx.asked import TOLERANCE
from qbl_trl.onnx.files import GENAI_FILE
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import ParityReport, compare, logits_of

_BATCH, _LENGTH, _PADDED, _PREFIX = 2, 24, 5, 20
# A tracer may take the size of its batch for a constant, and a graph may choose another way where nothing is padded.
_BATCH_AND_ROW = (slice(None), slice(-1, None))


class Unrunnable(ExportError):
    """ONNX Runtime does not load or run a graph."""


class Disagreement(ExportError):
    """A graph does not compute what the torch model computes."""


class Gate:
    """Reference logits of one model on a small batch with left padding.

    Args:
        reference: in float32; anything that `qbl_trl.parity.logits_of` takes.
        ids: (B, S); the first row is padded.

    Attributes:
        reference: logits of the batch, (B, S, V).
        alone: the same of every row without its padding, which some models count as places (Bart).
    """

    def __init__(self, reference: Any, ids: Tensor) -> None:
        self.ids = ids
        self.mask = torch.ones_like(self.ids)
        self.mask[0, : min(_PADDED, ids.shape[1] // 3)] = 0
        logits = logits_of(reference)
        self.reference: Tensor = logits(self.ids, self.mask)
        start = int((1 - self.mask[0]).sum())
        self.alone = self.reference.clone()
        self.alone[:1, start:] = logits(self.ids[:1, start:], self.mask[:1, start:])

    @classmethod
    def on_noise(cls, reference: nn.Module, vocabulary: int, longest: float = _LENGTH) -> Self:
        """Random tokens, as many as the model can read but no more than a few."""
        generator, length = torch.Generator().manual_seed(0), int(min(_LENGTH, longest))
        return cls(reference, torch.randint(0, vocabulary, (_BATCH, length), generator=generator))

    def measure(self, graph: OnnxLogits) -> tuple[ParityReport, ParityReport]:
        """One pass over all tokens, of the batch and of one row alone, and token by token over the cache."""
        return self._at_once(graph), self._over_cache(graph)

    def _at_once(self, graph: OnnxLogits) -> ParityReport:
        reference, mask = self._of_batch_and_row(self.reference), self._of_batch_and_row(self.mask)
        found = torch.cat([graph(self.ids[rows], self.mask[rows]) for rows in _BATCH_AND_ROW])
        return _at_the_end(reference, found, mask, self.ids.shape[1])

    def _of_batch_and_row(self, values: Tensor) -> Tensor:
        return torch.cat([values[rows] for rows in _BATCH_AND_ROW])

    def pass_(
        self, folder: Path, tolerance: float | None, buffer: bool = False
    ) -> tuple[ParityReport, ParityReport, bool]:
        """Measure the graph of a folder.

        Args:
            buffer: look also whether it is as right over a cache that is longer than its text: the last result. Where
                there is a graph for ONNX Runtime GenAI, that is the one looked at, and removed if it is not.

        Raises:
            Unrunnable: if ONNX Runtime does not run it.
            Disagreement: if a difference is beyond `tolerance` (None: never; a second way to run the graph is then
                held to the first). Where no logit reaches 1, as in models with random weights, the tolerance
                shrinks with the largest of them.
        """
        with _run_errors():
            reports = self.measure(OnnxLogits(folder))  # one session in memory at a time
        largest = max(report.max_abs_difference for report in reports)
        scale = min(1.0, float(self.reference.abs().max()))
        allowed = largest + TOLERANCE * scale if tolerance is None else tolerance * scale
        if tolerance is not None and not largest <= allowed:
            raise Disagreement(
                f"the graph's logits differ from the torch model's by up to {largest:.2e}, allowed: {allowed:.0e}; "
                "nothing was written. Pass tolerance=None to write the graph all the same"
            )
        own = folder / GENAI_FILE
        shares = own.is_file() and self._fits(lambda: self._right_padded(OnnxLogits(own)), allowed)
        if not shares:
            own.unlink(missing_ok=True)
            shares = buffer and self._fits(lambda: self._over_cache(OnnxLogits(folder), self._buffer), allowed)
        return *reports, shares

    @property
    def _buffer(self) -> int:
        return self.ids.shape[1] + _PADDED

    def _fits(self, measured: Callable[[], ParityReport], allowed: float) -> bool:
        try:
            with _run_errors():
                report = measured()
        except (Unrunnable, ConfigError):  # or logits that are no numbers
            return False
        return report.max_abs_difference <= allowed

    def _right_padded(self, graph: OnnxLogits, steps: bool = False) -> ParityReport:
        """A prefix whose padding stands on the right, then token by token over a buffer, as ONNX Runtime GenAI does.

        Held against every row alone; `steps` as `_over_cache` has it.
        """
        length = self.ids.shape[1]
        prefix = min(_PREFIX, length - 2)
        gaps = [int(gap) for gap in (1 - self.mask[:, :prefix]).sum(1)]
        mask, cache = _roll(self.mask[:, :prefix], gaps, -1), graph.empty_cache(len(gaps), self._buffer)
        logits, cache = graph.step(_roll(self.ids[:, :prefix], gaps, -1), mask, cache)
        parts = [_roll(logits, gaps, 1) if logits.shape[1] == prefix else logits]
        for start in range(prefix, length):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits, cache = graph.step(self.ids[:, start : start + 1], mask, cache)
            parts.append(logits)
        return _at_the_end(self.alone, torch.cat(parts, 1), self.mask, length - prefix if steps else length)

    def _in_a_buffer(self, folder: Path) -> ParityReport:
        own = folder / GENAI_FILE
        if own.is_file():
            return self._right_padded(OnnxLogits(own), steps=True)
        return self._over_cache(OnnxLogits(folder), self._buffer, steps=True)

    def _over_cache(self, graph: OnnxLogits, buffer: int = 0, steps: bool = False) -> ParityReport:
        """A prefix, then token by token.

        Args:
            buffer: as `OnnxLogits.with_cache` has it.
            steps: compare what single tokens gave, and not the prefix: it may be exact where they are not.
        """
        length = self.ids.shape[1]
        prefix = min(_PREFIX, length - 2)
        found = torch.cat(
            [graph.with_cache(self.ids[rows], self.mask[rows], prefix, buffer) for rows in _BATCH_AND_ROW]
        )
        if found.shape[1] < length:  # a graph that writes the last logits only: the prefix gave one
            found = found[:, 1:]
        reference, mask = self._of_batch_and_row(self.reference), self._of_batch_and_row(self.mask)
        return _at_the_end(reference, found, mask, length - prefix if steps else length)

    def look_at(self, folder: Path, buffer: bool = False) -> ParityReport | None:
        """How far the graph of a folder is from the model, as a text and in its steps, whichever is further by KL:
        infinite where it overflows, None where the CPU lacks kernels for it (bfloat16).

        Args:
            buffer: over a cache that is longer than its text, too; where there is a graph for ONNX Runtime GenAI, that
                one.

        Raises:
            Unrunnable: if ONNX Runtime does not run it for another reason.
        """
        try:
            with _run_errors(lacking=True):
                graph = OnnxLogits(folder)
                reports = [self._at_once(graph), self._over_cache(graph, steps=True)]
                del graph  # one session in memory at a time
                if buffer:
                    reports.append(self._in_a_buffer(folder))
                return max(reports, key=lambda report: report.kl_per_token)
        except (onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, KeyError):
            return None
        except ConfigError:  # logits that are no numbers
            return ParityReport(int(self.mask.sum()), math.inf, math.inf, math.inf, 0.0, 0)


def _at_the_end(reference: Tensor, found: Tensor, mask: Tensor, count: int) -> ParityReport:
    """The last `count` positions, or those that there are: a graph may write the last logits only."""
    kept = slice(-min(count, found.shape[1]), None)
    return compare(reference[:, kept], found[:, kept], mask[:, kept])


def _roll(rows: Tensor, gaps: list[int], sign: int) -> Tensor:
    """Every row moved by its gap."""
    return torch.stack([row.roll(sign * gap, 0) for row, gap in zip(rows, gaps, strict=True)])


@contextmanager
def _run_errors(lacking: bool = False) -> Iterator[None]:
    """ONNX Runtime's errors as ours; `lacking`: but for kernels that a processor lacks."""
    states = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        yield
    except Exception as error:
        if type(error).__module__ != states.__name__ or (lacking and isinstance(error, states.NotImplemented)):
            raise
        reason = " ".join(str(error).split())
        raise Unrunnable(f"ONNX Runtime does not run the graph ({reason}); nothing was written") from error
