"""The parity gate: a graph is kept only if it computes what the torch model computes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from qbl_trl.errors import ExportError
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import ParityReport, compare, logits_of

_BATCH, _LENGTH, _PADDED, _PREFIX = 2, 24, 5, 16


class Disagreement(ExportError):
    """A graph does not run, or does not compute what the torch model computes."""


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
            Disagreement: if ONNX Runtime does not run it, or a difference is beyond `tolerance` (None: never). Where
                no logit reaches 1, as in models with random weights, the tolerance shrinks with the largest of them.
        """
        try:
            reports = self.measure(OnnxLogits(folder))
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            reason = " ".join(str(error).split())
            raise Disagreement(f"ONNX Runtime does not run the graph ({reason}); nothing was written") from error
        largest = max(report.max_abs_difference for report in reports)
        allowed = None if tolerance is None else tolerance * min(1.0, float(self.reference.abs().max()))
        if allowed is not None and not largest <= allowed:
            raise Disagreement(
                f"the graph's logits differ from the torch model's by up to {largest:.2e}, allowed: {allowed:.0e}; "
                "nothing was written. Pass tolerance=None to write the graph all the same"
            )
        return reports
