"""Drawings as SVG text: curves, bars, heat maps, bit pictures. Colors are classes of the page, so they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["LEVELS", "Series", "bars", "bits", "chart", "heat_map", "thinned"]

WIDTH, HEIGHT = 460, 270
WIDE, NAMES = 820, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 26, 12, 40
LEVELS = 12
"""Shades of a heat map."""
POINTS, COLUMNS = 300, 150
"""More than these cannot be told apart on a screen."""


@dataclass(frozen=True)
class Series:
    """One curve, or a cloud of points.

    Args:
        name: for the legend and the tooltip.
        x: positions; y: values. Pairs with None are left out.
        y: values.
        style: a class of the page's style sheet, such as `s0` for the first color, `dashed` for a line of reference.
        marks: points instead of a line.
    """

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    style: str = "s0"
    marks: bool = False

    @property
    def points(self) -> list[tuple[float, float]]:
        """The pairs that can be drawn."""
        pairs = [(x, y) for x, y in zip(self.x, self.y, strict=True) if x is not None and y is not None]
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def thinned(count: int, most: int) -> list[int]:
    """At most so many indices of a sequence, evenly spread, the ends included.

    Example:
        >>> thinned(5, 10), thinned(9, 3)
        ([0, 1, 2, 3, 4], [0, 4, 8])
    """
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two values.

    Example:
        >>> ticks(0.0, 1.0), ticks(3, 27)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [5.0, 10.0, 15.0, 20.0, 25.0])
    """
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_percent: bool = False,
    y_percent: bool = False,
    by_density: bool = False,
) -> str:
    """Curves and points over one pair of axes; an empty text if there is nothing to draw.

    Args:
        series: what is drawn, the last on top.
        x_label: of the horizontal axis.
        y_label: of the vertical axis, for those who cannot see it.
        x_percent: whether positions are fractions.
        y_percent: whether values are fractions.
        by_density: positions are sparsities below 1, and halving what is left is the same step everywhere.
    """
    drawn = [(one, one.points) for one in series]
    if by_density:
        drawn = [(one, [(_halvings(x), y) for x, y in points]) for one, points in drawn]
    everything = [point for _, points in drawn for point in points]
    if not everything:
        return ""
    x0, x1 = _range([x for x, _ in everything], x_percent and not by_density)
    y0, y1 = _range([y for _, y in everything], y_percent)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for value in ticks(y0, y1):
        _, y = at(x0, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(value, y_percent)}</text>')
    stops = [(_halvings(x), x) for x in SPARSITIES] if by_density else [(x, x) for x in ticks(x0, x1)]
    for place, value in stops:
        if x0 <= place <= x1:
            x, _ = at(place, y0)
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_number(value, x_percent)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>')
    for one, points in drawn:
        places = [at(*points[i]) for i in thinned(len(points), POINTS)]
        title = f"<title>{escape(one.name)}</title>"
        if one.marks or len(places) == 1:
            parts += [f'<circle class="mark {one.style}" cx="{x}" cy="{y}" r="5">{title}</circle>' for x, y in places]
        elif places:
            path = "M" + "L".join(f"{x} {y}" for x, y in places)
            parts.append(f'<path class="line {one.style}" d="{path}">{title}</path>')
    return _svg(WIDTH, HEIGHT, "".join(parts), f"{y_label} over {x_label}")


def bars(rows: Sequence[tuple[str, float, float | None, str]]) -> str:
    """A bar for each row: its name, the fraction filled, the fraction it is to be (a tick), and a text at its end."""
    height, left, right, line = 20, NAMES, 190, []
    span = WIDE - left - right
    for i, (name, fraction, target, text) in enumerate(rows):
        y = i * height
        line.append(
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(_short(name))}<title>{escape(name)}</title></text>'
        )
        line.append(f'<rect class="track" x="{left}" y="{y + 4}" width="{span:g}" height="13"/>')
        line.append(f'<rect class="bar" x="{left}" y="{y + 4}" width="{max(fraction, 0) * span:.1f}" height="13"/>')
        if target is not None:
            line.append(f'<path class="target" d="M{left + target * span:.1f} {y + 2}v17"/>')
        line.append(f'<text x="{left + span + 8:g}" y="{y + 15}">{escape(text)}</text>')
    return _svg(WIDE, height * len(rows), "".join(line), "what is left of each layer")


def heat_map(names: Sequence[str], columns: Sequence[Sequence[float]], heads: Sequence[str]) -> str:
    """A row for each name, a column for each reading; values in [0, 1], darker is more.

    Args:
        names: of the rows.
        columns: values of all rows, for each reading.
        heads: what the columns are called; the first and the last are shown.
    """
    chosen = thinned(len(columns), COLUMNS)
    row, left, width = max(3.0, min(18.0, 900 / max(len(names), 1))), NAMES, WIDE
    top, cell = 6, (width - left - 4) / max(len(chosen), 1)
    paths: dict[int, list[str]] = {}
    for i in range(len(names)):
        values = [min(LEVELS - 1, int(columns[j][i] * (LEVELS - 1) + 0.5)) for j in chosen]
        start = 0
        for j in range(1, len(values) + 1):
            if j == len(values) or values[j] != values[start]:  # neighbors of one shade are one stroke
                paths.setdefault(values[start], []).append(f"M{start} {i + 0.5:g}h{j - start}")
                start = j
    strokes = "".join(
        f'<path class="heat" stroke-opacity="{level / (LEVELS - 1):.2f}" d="{"".join(found)}"/>'
        for level, found in sorted(paths.items())
    )
    body = f'<g transform="translate({left} {top}) scale({cell:.3f} {row:.3f})">{strokes}</g>'
    step = max(1, math.ceil(11 / row))
    labels = [(i, name) for i, name in enumerate(names) if i % step == 0]
    body += "".join(
        f'<text x="{left - 8}" y="{top + (i + 0.5) * row + 4:.1f}" text-anchor="end">{escape(_short(name))}</text>'
        for i, name in labels
    )
    bottom = top + len(names) * row
    body += f'<rect class="frame" x="{left}" y="{top}" width="{width - left - 4:g}" height="{bottom - top:.1f}"/>'
    if heads:
        body += f'<text x="{left}" y="{bottom + 16:.1f}">{escape(heads[0])}</text>'
        body += f'<text x="{width - 4:g}" y="{bottom + 16:.1f}" text-anchor="end">{escape(heads[-1])}</text>'
    return _svg(width, bottom + 22, body, "sparsity of each layer over time")


def bits(rows: Sequence[Sequence[bool]]) -> str:
    """A picture of a mask: a square for each entry, filled where it is kept."""
    strokes, width = [], len(rows[0])
    for i, row in enumerate(rows):
        start = None
        for j in range(width + 1):
            kept = j < width and row[j]
            if kept and start is None:
                start = j
            elif not kept and start is not None:
                strokes.append(f"M{start} {i + 0.5:g}h{j - start}")
                start = None
    body = f'<rect class="track" width="{width}" height="{len(rows)}"/><path class="bit" d="{"".join(strokes)}"/>'
    return _svg(width, len(rows), body, "mask", 'shape-rendering="crispEdges" ')


def _svg(width: float, height: float, body: str, label: str, more: str = "") -> str:
    return f'<svg {more}viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _halvings(sparsity: float) -> float:
    return -math.log2(max(1 - sparsity, 1e-6))


def _range(values: Sequence[float], percent: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    low, high = (low - room if low < 0 or low - room > 0 else 0.0), high + room
    return (max(low, 0.0), min(high, 1.0)) if percent and max(values) <= 1 and min(values) >= 0 else (low, high)


def _number(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.4g} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _short(name: str, most: int = 34) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= most else "…" + name[1 - most :]
