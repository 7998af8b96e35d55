"""The parity gate: a graph is kept only if it computes what the torch model computes."""

import torch
from torch import Tensor, nn

from qbl_trl.errors import ExportError
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import ParityReport, compare, logits_of

_BATCH, _LENGTH, _PADDED, _PREFIX = 2, 24, 5, 16


class Gate:
    """Reference logits of one torch model on a small batch with left padding.

    Args:
        reference: torch model in float32.
        vocabulary: number of tokens to draw from.
    """

    def __init__(self, reference: nn.Module, vocabulary: int, length: int = _LENGTH) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (_BATCH, length), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :_PADDED] = 0
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


def check(reports: tuple[ParityReport, ParityReport], tolerance: float | None) -> None:
    """Raise ExportError if a difference is beyond `tolerance` (None: never)."""
    largest = max(report.max_abs_difference for report in reports)
    if tolerance is not None and not largest <= tolerance:
        raise ExportError(
            f"the graph's logits differ from the torch model's by up to {largest:.2e}, allowed: {tolerance:.0e}; "
            'nothing was written. Try attention="standard"; pass tolerance=None to write the graph all the same'
        )
