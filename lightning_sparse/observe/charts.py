"""Charts as Vega-Lite: checked by Altair, drawn by the page in the colors of its theme."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import altair as alt

from lightning_sparse.observe.palette import LEVELS, Look

__all__ = ["CONFIG", "Axis", "Curve", "End", "frontier", "heat_map", "lines", "shades", "thinned"]

Spec = dict[str, Any]

STOPS = (0.0, 0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
"""Sparsities that get a tick on an axis."""
LEAST_DENSITY = 1e-5
"""The end of the density scale."""
POINTS, CELLS, COLUMNS = 300, 6000, 120
"""More points than these cannot be distinguished on a screen."""
HEIGHT, ROW = 250, 18
MANY = 10
"""More curves than these are drawn thinner."""

CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "gridColor": "var(--rule)",
        "domainColor": "var(--soft)",
        "tickColor": "var(--soft)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelOverlap": "greedy",
        "labelSeparation": 6,
    },
    "axisX": {"grid": False},
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    "legend": {"labelColor": "var(--ink)", "titleColor": "var(--soft)", "labelFontSize": 12, "titleFontSize": 12},
}
"""The style of every chart, passed to Vega once. Colors are variables of the page's style sheet."""


PLAIN = Look()
SHOWN = alt.condition("shown == '' || datum.series == shown", alt.value(1), alt.value(0.1))
"""The legend of the page picks a series."""


@dataclass(frozen=True)
class Axis:
    """The quantity along an axis.

    Args:
        title: for the tooltip, and below a horizontal axis.
        kind: `sparsity` is drawn on a logarithmic scale of density, where each halving is the same step, so that 90, 95 and
            99% are well separated; `share` is a fraction; `number` is anything else.
    """

    title: str
    kind: Literal["number", "share", "sparsity"] = "number"

    def place(self, value: float) -> float:
        """The position at which a value is drawn."""
        return max(1 - value, LEAST_DENSITY) if self.kind == "sparsity" else value

    def channel(self, name: Literal["x", "y"], places: Iterable[float] = (), field: str | None = None) -> Any:
        """The encoding of a direction by a field, for values at these positions."""
        title = self.title if name == "x" else None
        axis = alt.Axis(format="~%" if self.kind == "share" else "~g", title=title, tickCount=6)
        scale = alt.Scale(zero=False, nice=name == "y")
        if self.kind == "sparsity":
            found = list(places)
            low, high = min(found) / 1.15, min(max(found) * 1.15, 1.0)
            stops = [1 - stop for stop in STOPS if low <= 1 - stop <= high]
            if len(stops) < 4:  # for runs that are almost the same
                stops = _even_stops(low, high) or stops
            axis = alt.Axis(values=stops, labelExpr="format(1 - datum.value, '~%')", title=title)
            scale = alt.Scale(type="log", domain=[low, high], reverse=True, nice=False)
        return (alt.X if name == "x" else alt.Y)(f"{field or name}:Q", axis=axis, scale=scale)

    def tooltip(self, name: str) -> alt.Tooltip:
        """A line of the tooltip."""
        read = f"{name}_sparsity" if self.kind == "sparsity" else name
        return alt.Tooltip(f"{read}:Q", title=self.title, format=".4~g" if self.kind == "number" else ".2%")


@dataclass(frozen=True)
class Curve:
    """A line of a chart; pairs with None or a value that is not finite are dropped.

    Args:
        series: for the legend and the tooltip.
        x: positions.
        y: values.
        look: style of its series.
        run: name of the run for the tooltip, if a series has several.
    """

    series: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    look: Look = PLAIN
    run: str = ""

    @property
    def points(self) -> list[tuple[float, float]]:
        """The pairs that can be drawn, at most `POINTS`."""
        pairs = [(x, y) for x, y in zip(self.x, self.y, strict=True) if x is not None and y is not None]
        finite = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        return [finite[i] for i in thinned(len(finite), POINTS)]


@dataclass(frozen=True)
class End:
    """The end of a run, for `frontier`.

    Args:
        series: for the legend and the tooltip.
        group: the group whose means are joined by a line.
        sparsity: final sparsity.
        value: value of the metric.
        look: style of its series; its color is that of the group.
        facts: further entries of the tooltip.
    """

    series: str
    group: str
    sparsity: float
    value: float
    look: Look = PLAIN
    facts: Mapping[str, str] = field(default_factory=dict)


def thinned(count: int, most: int) -> list[int]:
    """At most `most` indices of a sequence, evenly spread, including both ends.

    Example:
        >>> thinned(5, 10), thinned(9, 3)
        ([0, 1, 2, 3, 4], [0, 4, 8])
    """
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def lines(curves: Sequence[Curve], x: Axis, y: Axis, label: str, marks: bool = False) -> Spec | None:
    """Curves on common axes, distinguished by color, dash and optionally marks; None if there is nothing to draw.

    Args:
        curves: what is drawn, the last on top.
        x: the horizontal axis.
        y: the vertical axis.
        label: what the chart shows, as alternative text.
        marks: put distinct marks on every curve at a few points.
    """
    rows: list[dict[str, Any]] = []
    for number, curve in enumerate(curves):
        points = curve.points
        marked = {len(points) - 1} if marks or len(points) == 1 else set()
        if marks and len(points) > 8:
            marked |= {round((part + (number % 5) / 5) * (len(points) - 1) / 4) for part in range(4)}
        for i, (across, up) in enumerate(points):
            row = {"series": curve.series, "run": curve.run or curve.series, "i": i}
            rows.append(
                row | {"x": _plain(x.place(across)), "y": _plain(y.place(up))} | ({"mark": 1} if i in marked else {})
            )
    if not rows:
        return None
    looks = {curve.series: curve.look for curve in curves}
    color, shape, dash = _styles(looks)
    base = _with_sparsities(alt.Chart(alt.InlineData(values=rows)), x, y).encode(
        x=x.channel("x", (row["x"] for row in rows)), y=y.channel("y", (row["y"] for row in rows))
    )
    colored = base.encode(color=color, opacity=SHOWN)
    layers = [
        colored.mark_line(strokeWidth=2 if len(curves) <= MANY else 1, strokeJoin="round").encode(
            strokeDash=dash, detail="run:N", order="i:Q"
        ),
        colored.transform_filter("datum.mark")
        .mark_point(filled=True, size=70, stroke="var(--paper)", strokeWidth=0.8)
        .encode(shape=shape),
        base.mark_point(size=140, filled=True, color="transparent").encode(
            tooltip=[alt.Tooltip("run:N", title="curve"), x.tooltip("x"), y.tooltip("y")]
        ),
    ]
    return _spec(alt.layer(*layers), label)


def frontier(ends: Sequence[End], metric: Axis, label: str, references: Mapping[str, float] | None = None) -> Spec | None:
    """The metric against sparsity: a mark for each run, a line through the means of each group, and a band over its seeds.

    Args:
        ends: the ends of the runs.
        metric: the vertical axis.
        label: what the chart shows, as alternative text.
        references: values without a sparsity, such as that of the dense model, by name.
    """
    if not ends:
        return None
    x = Axis("sparsity", "sparsity")
    rows: list[dict[str, Any]] = [
        {"series": end.series, "x": _plain(x.place(end.sparsity)), "y": _plain(end.value), **end.facts} for end in ends
    ]
    across = x.channel("x", (row["x"] for row in rows))
    up = metric.channel("y")
    color, shape, _ = _styles({end.series: end.look for end in ends})
    hue = alt.Color("hue:N", scale=None)
    layers: list[Any] = []
    means = _means(ends)
    if spread := [row for row in means if row["high"] > row["low"]]:
        low = metric.channel("y", field="low")
        band = alt.Chart(alt.InlineData(values=spread)).encode(x=across, y=low, y2="high:Q", color=hue, detail="group:N")
        layers += [band.mark_area(opacity=0.13), band.mark_rule(opacity=0.6)]
    if any(row["joined"] for row in means):
        line = alt.Chart(alt.InlineData(values=means)).encode(x=across, y=up, color=hue, detail="group:N")
        layers.append(line.mark_line(strokeWidth=1.6, opacity=0.8))
    tooltip = [alt.Tooltip("series:N", title="run"), x.tooltip("x"), metric.tooltip("y")]
    tooltip += [alt.Tooltip(f"{fact}:N") for fact in dict.fromkeys(fact for end in ends for fact in end.facts)]
    points = _with_sparsities(alt.Chart(alt.InlineData(values=rows)), x, metric).mark_point(
        filled=True, size=110, stroke="var(--paper)", strokeWidth=0.8
    )
    layers.append(points.encode(x=across, y=up, color=color, shape=shape, opacity=SHOWN, tooltip=tooltip))
    for name, value in (references or {}).items():
        row = alt.Chart(alt.InlineData(values=[{"series": name, "y": _plain(value)}])).encode(y=up)
        rule = row.mark_rule(stroke="var(--soft)", strokeDash=[5, 4], strokeWidth=1.5)
        layers.append(rule.encode(tooltip=[alt.Tooltip("series:N", title="reference"), metric.tooltip("y")]))
        text = row.mark_text(align="left", baseline="bottom", x=4, dy=-3, fill="var(--soft)", fontSize=12)
        layers.append(text.encode(text="series:N"))
    return _spec(alt.layer(*layers), label, HEIGHT + 70)


def heat_map(
    names: Sequence[str], columns: Sequence[Sequence[int]], sizes: Sequence[int], heads: str, at: Sequence[str]
) -> Spec:
    """The sparsity of each layer for each reading; `shades` explains the colors.

    Args:
        names: names of the layers.
        columns: kept entries of every layer, for each reading.
        sizes: total entries of every layer.
        heads: what the readings are.
        at: names of the readings.
    """
    chosen = thinned(len(columns), max(12, min(COLUMNS, CELLS // max(len(names), 1))))
    rows = [{"head": at[j], "kept": list(columns[j])} for j in chosen]
    short = _short_names(names)
    layers = [{"i": i, "name": name, "label": short[i], "size": sizes[i]} for i, name in enumerate(names)]
    lookup = alt.LookupData(data=alt.InlineData(values=layers), key="i", fields=["name", "label", "size"])
    named = shades()
    scale = alt.Scale(domain=list(named), range=[f"var(--level{i})" for i in range(len(named))])
    row = max(4.0, min(float(ROW), 1200 / max(len(names), 1)))
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .transform_calculate(i=f"sequence({len(names)})")
        .transform_flatten(["i", "kept"])
        .transform_lookup(lookup="i", from_=lookup)
        .transform_calculate(sparsity="1 - datum.kept / datum.size")
        .transform_calculate(shade=_shade_of("datum.sparsity", named))
        .mark_rect()
        .encode(
            x=alt.X("head:O", sort=None, axis=alt.Axis(title=heads, labelAngle=0, ticks=False, labelOverlap="greedy")),
            y=alt.Y("label:N", sort=None, axis=alt.Axis(title=None, labelLimit=170, labelOverlap="greedy")),
            color=alt.Color("shade:N", scale=scale, legend=None),
            tooltip=[
                alt.Tooltip("name:N", title="layer"),
                alt.Tooltip("head:O", title=heads),
                alt.Tooltip("sparsity:Q", format=".2%"),
                alt.Tooltip("kept:Q", format=","),
                alt.Tooltip("size:Q", title="of", format=","),
            ],
        )
    )
    return _spec(chart, f"sparsity of each layer by {heads}", round(row * len(names)))


# ---- parts -----------------------------------------------------------------------------------------------------------


def _even_stops(low: float, high: float, most: int = 8) -> list[float]:
    """Densities at steps of one percent, or at a larger step so that there are few.

    Example:
        >>> _even_stops(0.11, 0.315), _even_stops(0.02, 0.045)
        ([0.15, 0.2, 0.25, 0.3], [0.02, 0.03, 0.04])
    """
    for step in (1, 2, 5, 10, 20):
        first, last = math.ceil(100 * low / step - 1e-9), math.floor(100 * high / step + 1e-9)
        stops = [step * number / 100 for number in range(first, last + 1)]
        if len(stops) <= most:
            return stops
    return []


def _spec(chart: alt.Chart | alt.LayerChart | alt.FacetChart, label: str, height: int = HEIGHT) -> Spec:
    """The specification for Vega; the page sets width and style."""
    shown = alt.param(name="shown", value="")
    made = chart.add_params(shown).properties(width="container", height=height, description=label).to_dict()
    return {key: value for key, value in made.items() if key != "config"}


def _with_sparsities(chart: alt.Chart, x: Axis, y: Axis) -> alt.Chart:
    """The sparsity in a tooltip, for a position on a density scale."""
    for name, axis in (("x", x), ("y", y)):
        if axis.kind == "sparsity":
            chart = chart.transform_calculate(**{f"{name}_sparsity": f"1 - datum.{name}"})
    return chart


def shades() -> dict[str, float]:
    """The names of the shades of a heat map, and where each ends."""
    ends = [0.0, *LEVELS]
    named = {f"{100 * low:g} to {100 * high:g}%": high for low, high in itertools.pairwise(ends)}
    return named | {f"{100 * LEVELS[-1]:g}% or more": math.inf}


def _shade_of(value: str, named: Mapping[str, float]) -> str:
    """The expression that finds the shade; a rounding error does not move a value below its level."""
    *below, last = named
    return "".join(f"{value} < {named[name] - 1e-9} ? '{name}' : " for name in below) + f"'{last}'"


def _styles(looks: Mapping[str, Look]) -> tuple[alt.Color, alt.Shape, alt.StrokeDash]:
    """Color, mark and dash of each series; the page holds their legend."""
    names = list(looks)
    return (
        alt.Color("series:N", legend=None, scale=alt.Scale(domain=names, range=[look.paint for look in looks.values()])),
        alt.Shape("series:N", legend=None, scale=alt.Scale(domain=names, range=[look.shape for look in looks.values()])),
        alt.StrokeDash(
            "series:N", legend=None, scale=alt.Scale(domain=names, range=[list(look.dash) for look in looks.values()])
        ),
    )


def _means(ends: Sequence[End]) -> list[dict[str, Any]]:
    """The mean of each group, over runs that end at the same sparsity to within a tenth of a percent."""
    together: dict[tuple[str, float], list[End]] = {}
    for end in ends:
        together.setdefault((end.group, round(end.sparsity, 3)), []).append(end)
    found = []
    for (group, _), ended in together.items():
        values = [end.value for end in ended]
        found.append(
            {
                "group": group,
                "hue": ended[0].look.paint,
                "x": _plain(max(1 - statistics.fmean(end.sparsity for end in ended), LEAST_DENSITY)),
                "y": _plain(statistics.fmean(values)),
                "low": _plain(min(values)),
                "high": _plain(max(values)),
                "joined": sum(other == group for other, _ in together) > 1,
            }
        )
    return sorted(found, key=lambda row: (row["group"], row["x"]))


def _short_names(names: Sequence[str], most: int = 26) -> list[str]:
    """Names without their common prefix, cut from the left if still long; all distinct.

    Example:
        >>> _short_names(["network.conv1.weight", "network.stages.0.1.conv2.weight"])
        ['conv1', 'stages.0.1.conv2']
    """
    parts = [name.removesuffix(".weight").split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(path) > common + 1 for path in parts) and len({path[common] for path in parts}) == 1:
        common += 1
    short = [".".join(path[common:]) for path in parts]
    cut = [name if len(name) <= most else "…" + name[1 - most :] for name in short]
    return cut if len(set(cut)) == len(cut) else [f"{i + 1} {name}" for i, name in enumerate(cut)]


def _plain(value: float) -> float:
    """A number rounded to the digits that a screen shows."""
    return float(f"{value:.6g}")
