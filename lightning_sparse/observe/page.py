"""The page about one run, or several side by side: self-contained, nothing is loaded from elsewhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lightning_sparse.observe.history import best_of, choose_metric, stem
from lightning_sparse.observe.palette import Look, style_sheet
from lightning_sparse.observe.pictures import bits, describe_corner

__all__ = ["DATA", "Run", "page"]

Run = dict[str, Any]
"""Everything a page shows about a run, as plain values; the page embeds it."""

DATA = '<script type="application/json" id="run">'
APART = 10
"""Up to this many runs get distinct marks; with more, runs share the mark of their method."""
MANY = 40
"""Number of layers that a page shows without a scrolling area."""


def page(*runs: Run) -> str:
    """The whole page: HTML with its data, style, charts, and the library that draws them."""
    made = Page()
    title = runs[0]["title"] if len(runs) == 1 else f"{len(runs)} runs"
    body = _single(made, runs[0]) if len(runs) == 1 else _several(made, runs)
    own = files("lightning_sparse.observe")
    style = style_sheet() + own.joinpath("report.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{body}</main>{DATA}{_json(list(runs))}</script>"
        f'<script type="application/json" id="charts">{_json(made.charts)}</script>'
        f"<script>{_library()}</script><script>{own.joinpath('report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    from vl_convert import javascript_bundle

    return javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


class Page:
    """Gathers the charts of a page."""

    def __init__(self) -> None:
        from lightning_sparse.observe import charts  # imports Altair only when a page is written

        self.draw = charts
        self.charts: dict[str, Any] = {"config": charts.CONFIG, "specs": {}}

    def figure(self, title: str, spec: Mapping[str, Any] | None, keys: str = "", wide: bool = False) -> str:
        """A chart with its title and legend; empty if there is nothing to draw."""
        if spec is None:
            return ""
        place = f"chart{len(self.charts['specs'])}"
        self.charts["specs"][place] = spec
        return (
            f"<figure{' class=wide' if wide else ''}><figcaption>{escape(title)}</figcaption>{keys}"
            f'<div class="chart" id="{place}"></div></figure>'
        )

    def shades(self) -> str:
        """The scale of a heat map."""
        boxes = [f"<span><i style=background:var(--level{i})></i>{name}</span>" for i, name in enumerate(self.draw.shades())]
        return f'<div class="keys scale">{"".join(boxes)}</div>'


def _keys(looks: Mapping[str, Look], marks: Collection[str]) -> str:
    """The legend: the stroke of every series, the mark of some, and its name; a click highlights one."""
    buttons = []
    for name, look in looks.items():
        dash = " ".join(map(str, look.dash))
        drawn = f'<path d="M0 7H34" fill="none" stroke="{look.paint}" stroke-width="2" stroke-dasharray="{dash}"/>'
        if name in marks:
            drawn += f'<path d="{look.shape}" transform="translate(17 7) scale(5.2)" fill="{look.paint}"/>'
        symbol = f'<svg viewBox="0 0 34 14" width="34" height="14" aria-hidden="true">{drawn}</svg>'
        buttons.append(
            f'<button class="key" data-series="{escape(name)}" aria-pressed="false">{symbol}{escape(name)}</button>'
        )
    return f'<div class="keys">{"".join(buttons)}</div>'


def _json(values: Any) -> str:
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


# ---- one run ---------------------------------------------------------------------------------------------------------


def _single(made: Page, run: Run) -> str:
    parts = [_tiles(run), NO_SCRIPT, f'<div class="grid">{"".join(_curves(made, run))}</div>', _layers(made, run)]
    if run["pictures"]:
        parts.append(
            "<h2>Masks of the first layers</h2><p>Outputs down, inputs across; filled is kept.</p><div class=masks>"
        )
        for name, saved in run["pictures"].items():
            title = escape(f"{name}, {describe_corner(saved)}")
            parts.append(f"<figure><figcaption>{title}</figcaption>{bits(saved)}</figure>")
        parts.append("</div>")
    return "".join([*parts, _again(run)])


NO_SCRIPT = (
    '<noscript><p class="note">The charts of this page are drawn by an embedded script, which this viewer does not run; the '
    "tables show the same data.</p></noscript>"
)


def _tiles(run: Run) -> str:
    """The headline numbers: both readings of sparsity, and the whole model; test before validation, dense next to sparse."""
    last, dense, metric = run["rows"][-1], run["dense"], run["metric"]
    target = "no target" if run["target"] is None else f"target {run['target']:.2%}"
    whole = 1 - last["parameters"] / dense["parameters"]
    tiles = [
        ("sparsity", f"{last['sparsity']:.2%}", ["of the chosen weights, by masks", target]),
        ("exact zeros", f"{last['zeros']:.2%}", ["of the same weights"]),
        ("whole model", f"{whole:.2%}", [f"{last['parameters']:,} of {dense['parameters']:,} parameters left"]),
    ]
    if metric:
        tiles.append(_metric_tile(run, metric))
    if "macs" in last:
        tiles.append(
            ("multiply-accumulates", f"{last['macs'] / dense['macs']:.1%}", [f"{last['macs']:,} of {dense['macs']:,}"])
        )
    outputs = sum(layer["outputs"] for layer in run["layers"])
    tiles.append(("dead outputs", f"{last['dead_outputs']:,}", [f"of {outputs:,}"]))
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _tile(title: str, value: str, lines: Sequence[str]) -> str:
    said = "".join(f"<small>{escape(line)}</small>" for line in lines)
    return f"<div><small>{escape(title)}</small><b>{escape(value)}</b>{said}</div>"


def _metric_tile(run: Run, metric: str) -> tuple[str, str, list[str]]:
    last = run["rows"][-1]
    row = best_of(run["rows"], metric)
    best = None if row is None else row["metrics"][metric]
    where = f" {last['phase']}" if last["phase"] else ""
    now = [f"{metric} {_value(metric, last['metrics'].get(metric))}, best{where} {_value(metric, best)}"]
    test, dense = _tested(run, metric), _tested(run, metric, dense=True)
    if test is None:
        return metric, _value(metric, last["metrics"].get(metric)), [f"best{where} {_value(metric, best)}", "not tested"]
    beside = [f"the dense model has {_value(metric, dense)}"] if dense is not None else []
    return f"test {stem(metric)}", _value(metric, test), beside + now


def _curves(made: Page, run: Run) -> list[str]:
    """Sparsity and the metric over epochs, the metric against sparsity, and churn."""
    draw, epochs, metric, target = made.draw, _epochs(run), run["metric"], run["target"]
    epoch, sparsity = draw.Axis("epoch"), draw.Axis("sparsity", "sparsity")
    ends = [epochs[0], epochs[-1]]

    def figure(title: str, curves: Mapping[str, tuple[Sequence[Any], Sequence[Any]]], x: Any, y: Any, color: int = 0) -> str:
        drawn = {name: draw.Curve(name, *at, Look(color + i, i)) for i, (name, at) in enumerate(curves.items())}
        known = {name: curve for name, curve in drawn.items() if curve.points}
        single = {name for name, curve in known.items() if len(curve.points) == 1}
        keys = _keys({name: curve.look for name, curve in known.items()}, marks=single) if len(known) > 1 else ""
        return made.figure(title, draw.lines(list(known.values()), x, y, f"{title} over {x.title}"), keys)

    readings = {"masks": (epochs, _column(run, "sparsity")), "exact zeros": (epochs, _column(run, "zeros"))}
    readings |= {"target": (ends, [target] * 2)} if target is not None else {}
    figures = [figure("Sparsity", readings, epoch, sparsity)]
    if metric:
        values, axis = _metric(run, metric), _axis(metric)
        tested = {"test": _tested(run, metric), "test, dense model": _tested(run, metric, dense=True)}
        beside = {name: (ends, [value] * 2) for name, value in tested.items()}
        figures.append(figure(metric, {metric: (epochs, values), **beside}, epoch, axis))
        way = _column(run, "sparsity")
        along = {"over the run": (way, values), "at the end": (way[-1:], values[-1:])}
        figures.append(figure(f"{metric} against sparsity", along, sparsity, axis))
    churn = {"churn": (epochs, _column(run, "churn"))}
    return [*figures, figure("Connections that came or went, by epoch", churn, epoch, draw.Axis("churn", "share"), 5)]


def _layers(made: Page, run: Run) -> str:
    """What is left of each layer, and how it got there."""
    layers, lines = run["layers"], []
    goals, dead = any(layer["target"] is not None for layer in layers), any(layer["dead"] for layer in layers)
    for layer, kept in zip(layers, run["rows"][-1]["layers"], strict=True):
        size, target = layer["size"], layer["target"]
        tick = "" if target is None else f'<i style="left:{target / size:.2%}"></i>'
        bar = f'<span class="bar"><b style="width:{kept / size:.2%}"></b>{tick}</span>'
        goal = "by score" if target is None else f"{target:,}"
        cells = [
            ("name", "", escape(layer["name"])),
            ("of", "", bar),
            ("density", "", f"{kept / size:.2%}"),
            ("kept", "", f"{kept:,} of {size:,}"),
            *([("target", "target ", goal)] if goals else []),
            *([("dead", "dead outputs ", f"{layer['dead']:,} of {layer['outputs']:,}")] if dead else []),
        ]
        lines.append(
            "<tr>" + "".join(f'<td class="{c}" data-says="{says}">{text}</td>' for c, says, text in cells) + "</tr>"
        )
    heads = ["layer", "", "density", "kept", *(["target"] if goals else []), *(["dead outputs"] if dead else [])]
    head = "".join(f"<th>{name}</th>" for name in heads)
    over_time = made.draw.heat_map(
        [layer["name"] for layer in layers],
        [row["layers"] for row in run["rows"]],
        [layer["size"] for layer in layers],
        "epoch",
        [str(epoch) for epoch in _epochs(run)],
    )
    table = f'<table class="layers"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    shown = made.figure("Sparsity of each layer over time", over_time, made.shades(), wide=True)
    many = len(layers) > MANY
    return f"<h2>What is left of each layer</h2>{_scroll(table, many)}{_scroll(shown, many)}"


def _again(run: Run) -> str:
    machine = dict(run["machine"])
    command = machine.pop("command")
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    return (
        f"<h2>To run it again</h2><pre>{escape(command)}</pre><p>{escape(versions)}</p>"
        f"<details><summary>The configuration</summary><pre>{escape(run['config'])}</pre></details>"
    )


# ---- several runs ----------------------------------------------------------------------------------------------------


def _several(made: Page, runs: Sequence[Run]) -> str:
    runs = sorted(runs, key=lambda run: (run["method"], run["rows"][-1]["sparsity"], run["name"]))
    metric = _shared_metric(runs)
    series = _series(runs)
    looks = dict(series)
    notes, figures = [], []
    if metric is None:
        notes.append("These runs have no metric in common: accuracy is left out.")
    else:
        figures.append(_frontier(made, runs, series, metric))
        figures.append(_over_epochs(made, runs, metric, _axis(metric), series, lambda run: _metric(run, metric)))
    sparsity = made.draw.Axis("sparsity", "sparsity")
    figures.append(_over_epochs(made, runs, "Sparsity", sparsity, series, lambda run: _column(run, "sparsity")))
    grid = f'<div class="grid">{"".join(figures)}</div>'
    table = f"<h2>The runs</h2>{_scroll(_table(runs, metric, series), len(runs) > MANY)}"
    layers = ""
    if len({json.dumps([[layer["name"], layer["size"]] for layer in run["layers"]]) for run in runs}) == 1:
        drawn = made.draw.heat_map(
            [layer["name"] for layer in runs[0]["layers"]],
            [run["rows"][-1]["layers"] for run in runs],
            [layer["size"] for layer in runs[0]["layers"]],
            "run",
            [str(number + 1) for number in range(len(runs))],
        )
        shown = made.figure(
            "Final sparsity of each layer; runs by their number in the table", drawn, made.shades(), wide=True
        )
        layers = _scroll(shown, len(runs[0]["layers"]) > MANY)
    else:
        models = ", ".join(sorted({run["model"] for run in runs}))
        notes.append(f"These runs train different models or layers ({models}): their layers are not compared.")
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"{said}{NO_SCRIPT}{_keys(looks, marks=looks)}{grid}{table}{layers}"


def _frontier(made: Page, runs: Sequence[Run], series: Sequence[tuple[str, Look]], metric: str) -> str:
    """The metric against sparsity: on the test set if all runs were tested; dense runs are reference lines."""
    tested = all(_tested(run, metric) is not None for run in runs)
    name = f"test {stem(metric)}" if tested else metric
    ends, dense = [], []
    for run, (called, look) in zip(runs, series, strict=True):
        value = _tested(run, metric) if tested else run["rows"][-1]["metrics"].get(metric)
        if value is None or value != value or value in (float("inf"), float("-inf")):
            continue
        if run["method"] == DENSE:
            dense.append(value)
            continue
        last = run["rows"][-1]
        facts = {"exact zeros": f"{last['zeros']:.2%}", "parameters": f"{last['parameters']:,}", "name": run["name"]}
        ends.append(made.draw.End(called, run["method"], last["sparsity"], value, look, facts))
    if tested:
        dense += [value for run in runs if (value := _tested(run, metric, dense=True)) is not None]
    if not ends:
        return ""
    references = {"dense": sum(dense) / len(dense)} if dense else {}
    drawn = made.draw.frontier(ends, _axis(name), f"{name} against sparsity", references)
    return made.figure(f"{name} against sparsity, lines through means", drawn, wide=True)


def _over_epochs(
    made: Page,
    runs: Sequence[Run],
    title: str,
    axis: Any,
    series: Sequence[tuple[str, Look]],
    values: Callable[[Run], list[Any]],
) -> str:
    """One curve per run."""
    curves = [
        made.draw.Curve(called, _epochs(run), values(run), look, name)
        for (called, look), name, run in zip(series, _names(runs), runs, strict=True)
    ]
    drawn = made.draw.lines(curves, made.draw.Axis("epoch"), axis, f"{title} over epochs", marks=len(runs) <= APART)
    return made.figure(title, drawn)


def _table(runs: Sequence[Run], metric: str | None, series: Sequence[tuple[str, Look]]) -> str:
    tests = metric is not None and any(_tested(run, metric) is not None for run in runs)
    head = ["", "run", "method", "sparsity", "exact zeros", *([f"test {stem(str(metric))}"] if tests else [])]
    head += [*([metric] if metric else []), "parameters", "of dense", "MACs", "seed"]
    lines = []
    for number, run in enumerate(runs):
        last, dense = run["rows"][-1], run["dense"]
        cells = [number + 1, run["name"], run["method"], f"{last['sparsity']:.2%}", f"{last['zeros']:.2%}"]
        if metric:
            cells += [
                *([_value(metric, _tested(run, metric))] if tests else []),
                _value(metric, last["metrics"].get(metric)),
            ]
        macs = f"{last['macs'] / dense['macs']:.1%}" if "macs" in last else ""
        cells += [f"{last['parameters']:,}", f"{last['parameters'] / dense['parameters']:.2%}", macs, run["seed"]]
        lines.append("<tr>" + "".join(f"<td>{escape('' if cell is None else str(cell))}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table class=runs><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


# ---- readings --------------------------------------------------------------------------------------------------------

DENSE = "dense"
"""The method of a run without one."""


def _names(runs: Sequence[Run]) -> list[str]:
    """Distinct names of the runs: method, sparsity and seed, and the folder if that is not enough."""
    names = []
    for run in runs:
        sparsity = "" if run["method"] == DENSE else f" {100 * run['rows'][-1]['sparsity']:.4g}%"
        names.append(f"{run['method']}{sparsity}" + (f", seed {run['seed']}" if run["seed"] is not None else ""))
    longer = [name if names.count(name) == 1 else f"{name}, {run['name']}" for name, run in zip(names, runs, strict=True)]
    return [name if longer.count(name) == 1 else f"{name} ({longer[: i + 1].count(name)})" for i, name in enumerate(longer)]


def _series(runs: Sequence[Run]) -> list[tuple[str, Look]]:
    """The legend entry and style of each run.

    Its color is that of its method; its mark is its own, or that of its method if there are more runs than marks.
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    colors = [methods.index(run["method"]) for run in runs]
    if len(runs) <= APART:
        return [(name, Look(color, i)) for i, (name, color) in enumerate(zip(_names(runs), colors, strict=True))]
    return [(methods[color], Look(color, color + color // APART)) for color in colors]


def _shared_metric(runs: Sequence[Run]) -> str | None:
    shared = set.intersection(*(set(run["rows"][-1]["metrics"]) for run in runs))
    return choose_metric(shared, runs[0]["metric"])


def _tested(run: Run, metric: str, dense: bool = False) -> float | None:
    """The same metric on the test set, of the sparse model or of the dense one next to it; None if unknown."""
    known: Mapping[str, float] = (run["dense"] if dense else run).get("test") or {}
    return next((value for name, value in known.items() if stem(name) == stem(metric)), None)


def _axis(metric: str) -> Any:
    from lightning_sparse.observe.charts import Axis

    return Axis(metric, "share" if _is_share(metric) else "number")


def _column(run: Run, key: str) -> list[Any]:
    return [row.get(key) for row in run["rows"]]


def _metric(run: Run, name: str) -> list[Any]:
    return [row["metrics"].get(name) for row in run["rows"]]


def _epochs(run: Run) -> list[int]:
    return [row["epoch"] + 1 for row in run["rows"]]


def _is_share(metric: str) -> bool:
    return "acc" in metric.lower()


def _value(metric: str, value: float | None) -> str:
    return "" if value is None else f"{value:.2%}" if _is_share(metric) and 0 <= value <= 1 else f"{value:.4g}"


def _scroll(body: str, long: bool = False) -> str:
    """An area that scrolls sideways where needed, and shows it; a long one also scrolls down."""
    return f'<div class="scroll{" long" if long else ""}" tabindex="0">{body}</div>'
