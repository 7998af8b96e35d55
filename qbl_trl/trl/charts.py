"""Charts as inline SVG: pure functions from numbers to text. Colours are CSS variables of the page around them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720.0, 280.0
_LEFT, _TOP, _BOTTOM = 52.0, 14.0, 36.0
_LETTER = 9.0  # of a bold text of 13 pixels: room is left for a text without measuring it


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: written at its end.  colour: a CSS variable.
        points: (step, value), steps ascending.  marks: dots at the points (few points) or none (many).
        dashed: drawn so that a line below it stays visible.
    """

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    marks: bool = False
    dashed: bool = False


def line_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, from_zero: bool = False, width: float = _WIDTH
) -> str:
    """Curves over one pair of axes, named at their ends; values that are not finite are left out."""
    drawn = [(line, [p for p in line.points if math.isfinite(p[1])]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return '<p class="empty">Nothing was logged.</p>'
    names = [f"{line.label} {points[-1][1]:.3g}" for line, points in drawn]
    right = max(132.0, 10 + _LETTER * max(map(len, names)))
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points] + ([0.0] if from_zero else [])
    x_ticks, y_ticks = ticks(min(xs), max(xs), 8), ticks(min(ys), max(ys), 5)
    low_x, high_x = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    low_y, high_y = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1.0)
        up = (y - low_y) / ((high_y - low_y) or 1.0)
        return _LEFT + across * (width - _LEFT - right), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {width:g} {_HEIGHT:g}" role="img" aria-label="{escape(y_label)}">']
    for tick in y_ticks:
        _, y = place(low_x, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, y = place(tick, low_y)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{number(tick)}</text>')
    parts.append(
        f'<text class="tick" x="{width - right:.1f}" y="{_HEIGHT - 2:.1f}" text-anchor="end">{escape(x_label)}</text>'
    )
    ends = []
    for (line, points), name in zip(drawn, names, strict=True):
        placed = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = " dashed" if line.dashed else ""
        parts.append(f'<polyline class="line{dash}" style="stroke:var({line.colour})" points="{path}"/>')
        if line.marks or len(points) == 1:
            for (x, y), (step, value) in zip(placed, points, strict=True):
                parts.append(
                    f'<circle class="mark" style="fill:var({line.colour})" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{escape(line.label)}, step {number(step)}: {value:.4g}</title></circle>"
                )
        ends.append((placed[-1][1], line.colour, name))
    for y, colour, name in _spread(ends):
        parts.append(
            f'<text class="name" style="fill:var({colour})" x="{width - right + 10}" y="{y + 4:.1f}">'
            f"{escape(name)}</text>"
        )
    return "".join(parts) + "</svg>"


def heat_map(rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float], unit: str) -> str:
    """A grid of cells, darker is more; each cell says its value when pointed at.

    Args:
        rows, columns: their names in order.
        values: by (row, column); a missing one stays blank.
        unit: written after a value.
    """
    finite = [value for value in values.values() if math.isfinite(value)]
    if not finite:
        return '<p class="empty">Nothing was measured.</p>'
    top = max(finite) or 1.0
    side, left, head = max(14.0, min(44.0, 600.0 / len(columns))), 96.0, 20.0
    tall = 24.0
    steps, most = 24, f"{top:.3g} {unit}"
    width = max(left + side * len(columns) + 4, left + steps * 6 + 8 + _LETTER * len(most))
    height = head + tall * len(rows) + 34
    every = max(1, round(28 / side))
    fixed = f"min-width:{width:.0f}px;max-width:{width:.0f}px"
    parts = [f'<svg class="heat" viewBox="0 0 {width:.0f} {height:.0f}" style="{fixed}" role="img">']
    for index, column in enumerate(columns):
        if index % every == 0:
            x = left + side * (index + 0.5)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{head - 7}" text-anchor="middle">{escape(column)}</text>')
    for down, row in enumerate(rows):
        y = head + tall * down
        parts.append(f'<text class="row" x="{left - 10}" y="{y + 16:.1f}" text-anchor="end">{escape(row)}</text>')
        for index, column in enumerate(columns):
            value = values.get((row, column))
            if value is None or not math.isfinite(value):
                continue
            strength = 0.06 + 0.94 * value / top
            parts.append(
                f'<rect x="{left + side * index:.1f}" y="{y:.1f}" width="{side - 2:.1f}" height="{tall - 2}" rx="2" '
                f'fill="var(--heat)" fill-opacity="{strength:.3f}"><title>{escape(row)}, block {escape(column)}: '
                f"{value:.3g} {escape(unit)}</title></rect>"
            )
    y = head + tall * len(rows) + 12
    for index in range(steps):
        strength = 0.06 + 0.94 * (index + 0.5) / steps
        parts.append(
            f'<rect x="{left + index * 6}" y="{y}" width="6" height="8" fill="var(--heat)" '
            f'fill-opacity="{strength:.3f}"/>'
        )
    parts.append(f'<text class="tick" x="{left - 10}" y="{y + 8}" text-anchor="end">0</text>')
    parts.append(f'<text class="tick" x="{left + steps * 6 + 8}" y="{y + 8}">{escape(most)}</text>')
    return "".join(parts) + "</svg>"


def bars(items: Sequence[tuple[str, float, str, str]]) -> str:
    """Horizontal bars: (label, value, text beside it, CSS colour variable)."""
    top = max((value for _, value, _, _ in items), default=0.0) or 1.0
    left, tall = 150.0, 34.0
    room = _WIDTH - left - 10 - _LETTER * max((len(text) for _, _, text, _ in items), default=0)
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {tall * len(items) + 4:g}" role="img">']
    for index, (label, value, text, colour) in enumerate(items):
        y, width = tall * index + 4, max(room * value / top, 2.0)
        parts.append(f'<text class="row" x="{left - 12}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="24" rx="3" style="fill:var({colour})"/>')
        parts.append(f'<text class="value" x="{left + width + 10:.1f}" y="{y + 17}">{escape(text)}</text>')
    return "".join(parts) + "</svg>"


def decades(value: float, limit: float) -> str:
    """One measured value and the largest allowed one on a logarithmic ruler."""
    floor = max(value, 1e-12)
    low, high = math.floor(math.log10(min(floor, limit))) - 1, math.ceil(math.log10(max(floor, limit))) + 1
    left, room = 20.0, _WIDTH - 40.0

    def place(v: float) -> float:
        return left + room * (math.log10(v) - low) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH:g} 84" role="img">']
    allowed, measured = place(limit), place(floor)
    parts.append(
        f'<rect x="{left}" y="40" width="{allowed - left:.1f}" height="10" rx="5" style="fill:var(--good-soft)"/>'
    )
    parts.append(
        f'<rect x="{allowed:.1f}" y="40" width="{left + room - allowed:.1f}" height="10" rx="5" class="track"/>'
    )
    every = max(1, (high - low) // 8)
    for power in range(low, high + 1, every):
        x = place(10.0**power)
        parts.append(f'<text class="tick" x="{x:.1f}" y="70" text-anchor="middle">1e{power}</text>')
    colour = "--good" if value <= limit else "--bad"
    parts.append(f'<circle cx="{measured:.1f}" cy="45" r="8" style="fill:var({colour})"/>')
    parts.append(f'<text class="value" x="{measured:.1f}" y="27" text-anchor="middle">{value:.1e}</text>')
    parts.append(f'<text class="tick" x="{allowed:.1f}" y="27" text-anchor="middle">allowed {limit:.0e}</text>')
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers that cover [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough)
    first = math.floor(low / step + 1e-9)
    return [round(step * i, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def number(value: float) -> str:
    """A tick as a person writes it."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _spread(ends: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Move labels apart that would lie on each other."""
    moved: list[tuple[float, str, str]] = []
    for y, colour, name in sorted(ends, key=lambda end: end[0]):
        moved.append((max(y, moved[-1][0] + 17) if moved else y, colour, name))
    return moved
