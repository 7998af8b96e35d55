"""A dot plot as SVG text: a line per row, a dot per seed, a stroke at the mean. The same input, the same bytes."""

from collections.abc import Sequence
from html import escape
from statistics import mean

from qbl_trl.trl.charts import number, ticks

_LABELS, _PLOT, _LINE, _TOP = 330, 520, 24, 44
_INK, _SOFT, _GRID = "#1f2933", "#7b8794", "#e4e7eb"


def dot_plot(heading: str, unit: str, rows: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """The picture.

    Args:
        heading, unit: above the plot and below it.
        rows: label, colour and values of each line, from above to below; lines without values are left out.
    """
    rows = [row for row in rows if row[2]]
    low, high = (extreme(v for _, _, values in rows for v in values) for extreme in (min, max))
    margin = (high - low) * 0.04 or 1.0
    low, high = low - margin, high + margin
    height = _TOP + _LINE * len(rows)

    def x(value: float) -> str:
        return f"{_LABELS + (value - low) / (high - low) * _PLOT:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LABELS + _PLOT + 20} {height + 44}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold" fill="{_INK}">{escape(heading)}</text>',
    ]
    for tick in (t for t in ticks(low, high, 6) if low <= t <= high):
        lines.append(f'<path d="M{x(tick)} {_TOP - 4}V{height}" stroke="{_GRID}"/>')
        lines.append(f'<text x="{x(tick)}" y="{height + 18}" text-anchor="middle" fill="{_SOFT}">{number(tick)}</text>')
    for at, (label, colour, values) in enumerate(rows):
        y = _TOP + _LINE * at + _LINE // 2
        lines.append(f'<text x="{_LABELS - 12}" y="{y + 4}" text-anchor="end" fill="{_INK}">{escape(label)}</text>')
        lines += [f'<circle cx="{x(v)}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.55"/>' for v in values]
        lines.append(f'<path d="M{x(mean(values))} {y - 8}v16" stroke="{colour}" stroke-width="2.5"/>')
    middle = _LABELS + _PLOT / 2
    lines.append(f'<text x="{middle:.1f}" y="{height + 38}" text-anchor="middle" fill="{_SOFT}">{escape(unit)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
