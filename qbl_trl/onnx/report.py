"""What an export did, as data and as text."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from qbl_trl.onnx.linears import LoweredLayer
from qbl_trl.parity import ParityReport

_SHOWN = 6  # operators that a line has room for
_NOTHING = " + none"


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_onnx`.

    Attributes:
        path: the folder written.
        provider, dtype: what the graph is for.
        attention: "gqa", "attention" or "standard"; attention_reason: why "auto" did not choose the first.
        layers: how each linear layer was written.
        operators: number of nodes by operator, those inside an If too; where prompts have a level, of one branch, and
            as they were before a cache got 8 bits.
        bytes: size of the folder.
        parity: graph against the torch model in float32, all tokens in one pass.
        parity_cached: the same over the cache, one token at a time.
        parity_embeddings: the torch model with its embedding and head packed, as in the graph, against the model.
        parity_as_written: as asked for, where that is not exact float32; with a cache of 8 bits, against the exact
            graph on text that the model wrote.
        kv_cache_dtype: of the cache.
        fallbacks: nodes that the chosen provider would hand to the CPU, with the reason.
        seconds: wall clock of the export.
    """

    path: str
    provider: str
    dtype: str
    attention: str
    layers: tuple[LoweredLayer, ...]
    operators: dict[str, int]
    bytes: int
    parity: ParityReport | None
    parity_cached: ParityReport | None
    seconds: float
    attention_reason: str = ""
    parity_embeddings: ParityReport | None = None
    parity_as_written: ParityReport | None = None
    kv_cache_dtype: str = "float32"
    fallbacks: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def lowerings(self) -> dict[str, int]:
        """How many layers were written in each way."""
        return dict(sorted(Counter(f"{layer.operator} + {layer.correction}" for layer in self.layers).items()))

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB, {self.dtype}, {self.provider}, {self.seconds:.1f} s",
            f"attention: {self.attention}"
            + (f" ({self.attention_reason})" if self.attention_reason else "")
            + (f", cache in {self.kv_cache_dtype}" if self.kv_cache_dtype != self.dtype else ""),
            "layers: "
            + ", ".join(f"{count} {kind.removesuffix(_NOTHING)}" for kind, count in self.lowerings().items()),
            f"nodes: {self._nodes()}",
        ]
        for title, parity in (
            ("parity", self.parity),
            ("parity over the cache", self.parity_cached),
            ("embedding and head packed", self.parity_embeddings),
            ("parity as written", self.parity_as_written),
        ):
            if parity is not None:
                lines.append(f"{title}: {parity}")
        if self.fallbacks:
            lines.append(f"would fall back to CPU: {'; '.join(self.fallbacks)}")
        return "\n".join(lines)

    def _nodes(self) -> str:
        """The most frequent operators; `operators` has them all."""
        counted = sorted(self.operators.items(), key=_by_count)
        rest = sum(count for _, count in counted[_SHOWN:])
        shown = ", ".join(f"{count} {name}" for name, count in counted[:_SHOWN])
        return shown + (f", {rest} others ({len(counted) - _SHOWN} kinds)" if rest else "")


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
