"""Layers of one kind as one row: `model.layers.0-29.self_attn.q_proj` for the same projection of thirty blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbl_trl.quant.summary import LayerSummary


@dataclass(frozen=True)
class Kind:
    """Layers that differ in the numbers of their names and in their error, and in nothing else.

    Attributes:
        name: with the numbers that occur in each place, as ranges.
        layers: one at least, in the order of the model.
    """

    name: str
    layers: tuple[LayerSummary, ...]

    @property
    def errors(self) -> tuple[float, float] | None:
        """The smallest and the largest relative error, if errors were measured."""
        known = [layer.error for layer in self.layers if layer.error is not None]
        return (min(known), max(known)) if known else None


def by_kind(layers: Iterable[LayerSummary]) -> list[Kind]:
    """Group layers, each kind where its first layer stands."""
    found: dict[object, list[LayerSummary]] = {}
    for layer in layers:
        pattern = tuple("" if part.isdigit() else part for part in layer.name.split("."))
        same = {name: value for name, value in vars(layer).items() if name not in ("name", "error")}
        found.setdefault((pattern, *same.values()), []).append(layer)
    return [Kind(_joined([layer.name for layer in kind]), tuple(kind)) for kind in found.values()]


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges: 0, 1, 2, 5 are "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _joined(names: Sequence[str]) -> str:
    places = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(spans(map(int, parts)) if parts[0].isdigit() else parts[0] for parts in places)
