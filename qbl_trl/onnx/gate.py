"""The parity gate: a graph is kept only if it computes what the torch model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from qbl_trl.errors import ExportError
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import ParityReport, compare, logits_of

_BATCH, _LENGTH, _PADDED, _PREFIX = 2, 24, 5, 16


class Unrunnable(ExportError):
    """ONNX Runtime does not load or run a graph."""


class Disagreement(ExportError):
    """A graph does not compute what the torch model computes."""


class Gate:
    """Reference logits of one torch model on a small batch with left padding.

    Args:
        reference: torch model in float32.
        vocabulary: number of tokens to draw from.
        longest: tokens the model can read.
    """

    def __init__(self, reference: nn.Module, vocabulary: int, longest: float = _LENGTH) -> None:
        generator, length = torch.Generator().manual_seed(0), int(min(_LENGTH, longest))
        self.ids = torch.randint(0, vocabulary, (_BATCH, length), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, : min(_PADDED, length // 3)] = 0
        self.reference: Tensor = logits_of(reference)(self.ids, self.mask)

    def measure(self, graph: OnnxLogits) -> tuple[ParityReport, ParityReport]:
        """One pass over all tokens, and token by token over the cache."""
        whole = graph(self.ids, self.mask)
        cached = graph.with_cache(self.ids, self.mask, min(_PREFIX, self.ids.shape[1] - 2))
        if whole.shape[1] == 1:  # a graph that writes the last logits only
            steps = cached.shape[1]
            kept = slice(-steps + 1, None)
            tail = compare(self.reference[:, kept], cached[:, 1:], self.mask[:, kept])
            return compare(self.reference[:, -1:], whole, self.mask[:, -1:]), tail
        return compare(self.reference, whole, self.mask), compare(self.reference, cached, self.mask)

    def pass_(self, folder: Path, tolerance: float | None) -> tuple[ParityReport, ParityReport]:
        """Measure the graph of a folder.

        Raises:
            Unrunnable: if ONNX Runtime does not run it.
            Disagreement: if a difference is beyond `tolerance` (None: never). Where no logit reaches 1, as in models
                with random weights, the tolerance shrinks with the largest of them.
        """
        with _run_errors():
            reports = self.measure(OnnxLogits(folder))
        largest, allowed = max(report.max_abs_difference for report in reports), self._allowed(tolerance)
        if allowed is not None and not largest <= allowed:
            raise Disagreement(
                f"the graph's logits differ from the torch model's by up to {largest:.2e}, allowed: {allowed:.0e}; "
                "nothing was written. Pass tolerance=None to write the graph all the same"
            )
        return reports

    def passes_in_a_buffer(self, folder: Path, tolerance: float | None) -> bool:
        """Whether the graph of a folder is as right over a cache that is longer than its text."""
        length = self.ids.shape[1]
        try:
            with _run_errors():
                graph = OnnxLogits(folder)
                found = graph.with_cache(self.ids, self.mask, min(_PREFIX, length - 2), buffer=length + _PADDED)
        except Unrunnable:
            return False
        kept = slice(-found.shape[1], None)
        if found.shape[1] < length:  # a graph that writes the last logits only: the prefix gave one
            found, kept = found[:, 1:], slice(-found.shape[1] + 1, None)
        difference = compare(self.reference[:, kept], found, self.mask[:, kept]).max_abs_difference
        return difference <= (self._allowed(tolerance) or float("inf"))

    def _allowed(self, tolerance: float | None) -> float | None:
        return None if tolerance is None else tolerance * min(1.0, float(self.reference.abs().max()))

    def look_at(self, folder: Path) -> ParityReport | None:
        """The larger difference of the graph of a folder, or None where the CPU has no kernels for it (bfloat16).

        Raises:
            Unrunnable: if ONNX Runtime does not run it for another reason.
        """
        try:
            with _run_errors():
                return max(self.measure(OnnxLogits(folder)), key=lambda report: report.max_abs_difference)
        except (onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, KeyError):
            return None


@contextmanager
def _run_errors() -> Iterator[None]:
    """ONNX Runtime's errors as ours, but for kernels that a processor lacks."""
    states = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        yield
    except states.NotImplemented:
        raise
    except Exception as error:
        if type(error).__module__ != states.__name__:
            raise
        reason = " ".join(str(error).split())
        raise Unrunnable(f"ONNX Runtime does not run the graph ({reason}); nothing was written") from error
