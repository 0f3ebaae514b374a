"""One self-contained page about a run, or about several side by side."""

from __future__ import annotations

import base64
import json
import math
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from lightning_sparse._version import __version__
from lightning_sparse.functional import pack, unpack
from lightning_sparse.observe import svg
from lightning_sparse.observe.history import choose_metric
from lightning_sparse.observe.svg import Series

__all__ = ["corner", "describe_machine", "find_reports", "page", "picture", "read_report", "write_report"]

Run = dict[str, Any]
"""All that a page says of a run, as plain values; a page carries it along."""

DATA = '<script type="application/json" id="run">'
PICTURE_ROWS, PICTURE_COLUMNS = 64, 128
FILE = "report.html"


def describe_machine() -> dict[str, str]:
    """Versions and the command, for whoever runs it again."""
    program = Path(sys.argv[0]).name
    return {
        "command": shlex.join([*(["python"] if program.endswith(".py") else []), program, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": str(lightning.__version__),
        "lightning_sparse": __version__,
    }


def corner(mask: Tensor) -> Tensor:
    """As much of a mask as a picture shows: outputs down, inputs across."""
    return mask.flatten(1)[:PICTURE_ROWS, :PICTURE_COLUMNS].contiguous()


def picture(mask: Tensor) -> dict[str, Any]:
    """A corner of a mask as plain values."""
    flat = corner(mask)
    packed = base64.b64encode(pack(flat).cpu().numpy().tobytes()).decode()
    return {"shape": list(mask.shape), "rows": len(flat), "columns": flat.shape[1], "bits": packed}


def _unpicture(saved: Mapping[str, Any]) -> list[list[bool]]:
    packed = torch.frombuffer(bytearray(base64.b64decode(saved["bits"])), dtype=torch.uint8)
    rows: list[list[bool]] = unpack(packed, (saved["rows"], saved["columns"])).tolist()
    return rows


# ---- files ---------------------------------------------------------------------------------------------------------------


def write_report(path: Path, *runs: Run) -> None:
    """Write the page of a run, or of several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(*runs), encoding="utf-8")


def find_reports(paths: Sequence[str | Path]) -> list[Path]:
    """The reports of runs: the files given, and those in the folders given.

    Raises:
        FileNotFoundError: naming the first path in which there is none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        here = [path] if path.is_file() else sorted(path.rglob(FILE))
        if not here:
            raise FileNotFoundError(
                f"'{path}' holds no {FILE}; train with SparsityMonitor among the callbacks, which writes one."
            )
        found += [file for file in here if file not in found]
    return found


def read_report(path: Path) -> list[Run]:
    """The runs that a page is about.

    Raises:
        ValueError: if the file is no such page.
    """
    match = re.search(re.escape(DATA) + r"(.*?)</script>", path.read_text(encoding="utf-8"), flags=re.S)
    if match is None:
        raise ValueError(f"'{path}' is not a report of lightning_sparse; give the {FILE} of a run, or its folder.")
    runs: list[Run] = json.loads(match[1])
    for run in runs:
        run.setdefault("path", str(path))
    return runs


# ---- the page ------------------------------------------------------------------------------------------------------------


def page(*runs: Run) -> str:
    """The whole page: HTML with its style and drawings inside, nothing to load from anywhere."""
    title = runs[0]["title"] if len(runs) == 1 else f"{len(runs)} runs"
    body = _single(runs[0]) if len(runs) == 1 else _several(runs)
    style = files("lightning_sparse.observe").joinpath("report.css").read_text(encoding="utf-8")
    data = json.dumps(list(runs), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{body}</main>{DATA}{data}</script></body></html>\n"
    )


def _single(run: Run) -> str:
    parts = [_tiles(run), f'<div class="grid2">{"".join(_curves(run))}</div>', _layers(run)]
    if run["pictures"]:
        parts.append("<h2>Masks of the first layers</h2><p>Outputs down, inputs across; filled is kept.</p>")
        drawings = ((f"{name}, {_shape(saved)}", svg.bits(_unpicture(saved))) for name, saved in run["pictures"].items())
        parts.append(f"<div class=masks>{''.join(_figure(title, drawing) for title, drawing in drawings)}</div>")
    return "".join([*parts, _again(run)])


def _curves(run: Run) -> list[str]:
    """Sparsity and accuracy over epochs, one against the other, and churn."""
    epochs, metric, target = _epochs(run), run["metric"], run["target"]
    sparsity = [
        Series("exact zeros", epochs, _column(run, "zeros"), "s1"),
        Series("sparsity", epochs, _column(run, "sparsity")),
    ]
    if target is not None:
        sparsity.insert(0, Series("target", [epochs[0], epochs[-1]], [target] * 2, "dashed"))
    figures = [_figure("Sparsity", svg.chart(sparsity, "epoch", "sparsity", y_percent=True), sparsity)]
    if metric:
        values, share = _metric(run, metric), _is_share(metric)
        over_time = svg.chart([Series(metric, epochs, values, "s2")], "epoch", metric, y_percent=share)
        now = run["rows"][-1]["sparsity"]
        end = f"at the end: {_value(metric, values[-1])} at {now:.2%}"
        against = [
            Series("over the run", _column(run, "sparsity"), values, "s2 thin"),
            Series(end, [now], values[-1:], "s2", marks=True),
        ]
        drawing = svg.chart(against, "sparsity", metric, x_percent=True, y_percent=share)
        figures += [_figure(metric, over_time), _figure(f"{metric} against sparsity", drawing, against)]
    churn = svg.chart([Series("churn", epochs, _column(run, "churn"), "s3")], "epoch", "churn", y_percent=True)
    return [*figures, _figure("Connections that came or went, by epoch", churn)]


def _layers(run: Run) -> str:
    """Bars of what is left, and the way there."""
    layers, left = run["layers"], []
    for layer, kept in zip(layers, run["rows"][-1]["layers"], strict=True):
        size, target = layer["size"], layer["target"]
        dead = f", {layer['dead']} dead" if layer["dead"] else ""
        left.append((layer["name"], kept / size, None if target is None else target / size, f"{kept:,} of {size:,}{dead}"))
    heads = [f"epoch {epoch}" for epoch in _epochs(run)]
    over_time = svg.heat_map([layer["name"] for layer in layers], [_sparsities(run, row) for row in run["rows"]], heads)
    return _section("What is left of each layer", svg.bars(left)) + _section(
        "Sparsity of each layer over time; a stronger color is sparser", over_time
    )


def _several(runs: Sequence[Run]) -> str:
    runs = sorted(runs, key=lambda run: (run["method"], run["rows"][-1]["sparsity"], run["name"]))
    metric = _shared_metric(runs)
    methods = list(dict.fromkeys(run["method"] for run in runs))
    style = {method: f"s{i % 8}" for i, method in enumerate(methods)}
    legend = [Series(method, [], [], style[method]) for method in methods]
    notes, figures = [], []

    def curves(values: Callable[[Run], list[Any]]) -> list[Series]:
        return [Series(_called(run), _epochs(run), values(run), f"{style[run['method']]} thin") for run in runs]

    if metric is None:
        notes.append("These runs have no metric in common: accuracy is left out.")
    else:
        name, share = metric, _is_share(metric)
        ends = [(run, run["rows"][-1]["sparsity"], _metric(run, name)[-1]) for run in runs]
        points = [Series(_called(run), [x], [y], style[run["method"]], marks=True) for run, x, y in ends]
        means = [_means([(x, y) for run, x, y in ends if run["method"] == method], style[method]) for method in methods]
        drawing = svg.chart([*means, *points], "sparsity", name, x_percent=True, y_percent=share, by_density=True)
        figures.append(_figure(f"{name} against sparsity, lines through means", drawing, legend))
        drawing = svg.chart(curves(lambda run: _metric(run, name)), "epoch", name, y_percent=share)
        figures.append(_figure(name, drawing, legend))
    drawing = svg.chart(curves(lambda run: _column(run, "sparsity")), "epoch", "sparsity", y_percent=True)
    figures.append(_figure("Sparsity", drawing, legend))
    if same := len({json.dumps([[layer["name"], layer["size"]] for layer in run["layers"]]) for run in runs}) == 1:
        names = [layer["name"] for layer in runs[0]["layers"]]
        drawing = svg.heat_map(names, [_sparsities(run, run["rows"][-1]) for run in runs], [run["name"] for run in runs])
    else:
        models = ", ".join(sorted({run["model"] for run in runs}))
        notes.append(f"These runs train different models or layers ({models}): their layers are not compared.")
    return "".join(
        [
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
            f'<div class="grid2">{"".join(figures)}</div>',
            _section("The runs", _table(runs, metric)),
            _section("Final sparsity of each layer; one column per run, in the order above", drawing) if same else "",
        ]
    )


def _means(ends: Sequence[tuple[float, float | None]], style: str) -> Series:
    """Through the mean metric of runs that end at the same sparsity, to a tenth of a percent."""
    together: dict[float, list[float]] = {}
    for sparsity, value in ends:
        if value is not None:
            together.setdefault(round(sparsity, 3), []).append(value)
    x = sorted(together) if len(together) > 1 else []
    return Series("mean", x, [statistics.fmean(together[sparsity]) for sparsity in x], style)


def _shared_metric(runs: Sequence[Run]) -> str | None:
    shared = set.intersection(*(set(run["rows"][-1]["metrics"]) for run in runs))
    first = runs[0]["metric"]
    return choose_metric(shared, first)


def _table(runs: Sequence[Run], metric: str | None) -> str:
    head = ["run", "method", "sparsity", metric or "", "parameters", "MACs", "seed"]
    lines = []
    for run in runs:
        last = run["rows"][-1]
        macs = f"{last['macs'] / run['dense']['macs']:.1%}" if "macs" in last else ""
        value = _value(metric, last["metrics"].get(metric)) if metric else ""
        cells = [run["name"], run["method"], f"{last['sparsity']:.2%}", value, f"{last['parameters']:,}", macs, run["seed"]]
        lines.append(
            "<tr>" + "".join(f"<td>{escape(str(cell if cell is not None else ''))}</td>" for cell in cells) + "</tr>"
        )
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{''.join(lines)}</table>"


def _tiles(run: Run) -> str:
    last, dense, metric = run["rows"][-1], run["dense"], run["metric"]
    tiles = [
        ("sparsity", f"{last['sparsity']:.2%}", "no target" if run["target"] is None else f"target {run['target']:.2%}")
    ]
    if metric and last["metrics"].get(metric) is not None:
        at = [row["metrics"][metric] for row in run["rows"] if row["phase"] == last["phase"] and metric in row["metrics"]]
        best = (min if _is_loss(metric) else max)(at)
        where = f" {last['phase']}" if last["phase"] else ""
        tiles.append((metric, _value(metric, last["metrics"][metric]), f"best{where} {_value(metric, best)}"))
    tiles.append(("parameters", f"{last['parameters']:,}", f"of {dense['parameters']:,}"))
    if "macs" in last:
        tiles.append(
            ("multiply-accumulates", f"{last['macs'] / dense['macs']:.1%}", f"{last['macs']:,} of {dense['macs']:,}")
        )
    tiles.append(("dead outputs", f"{last['dead_outputs']:,}", f"of {sum(layer['outputs'] for layer in run['layers']):,}"))
    cells = (f"<div><small>{escape(a)}</small><b>{escape(b)}</b><small>{escape(c)}</small></div>" for a, b, c in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _again(run: Run) -> str:
    machine = dict(run["machine"])
    command = machine.pop("command")
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    return (
        f"<h2>To run it again</h2><pre>{escape(command)}</pre><p>{escape(versions)}</p>"
        f"<details><summary>The configuration</summary><pre>{escape(run['config'])}</pre></details>"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2><div class=scroll>{body}</div>"


def _figure(title: str, drawing: str, legend: Sequence[Series] = ()) -> str:
    if not drawing:
        return ""
    keys = "".join(f'<span class="key {one.style}">{escape(one.name)}</span>' for one in legend)
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}<div class=keys>{keys}</div></figure>"


def _column(run: Run, key: str) -> list[Any]:
    return [row.get(key) for row in run["rows"]]


def _metric(run: Run, name: str) -> list[Any]:
    return [row["metrics"].get(name) for row in run["rows"]]


def _epochs(run: Run) -> list[int]:
    return [row["epoch"] + 1 for row in run["rows"]]


def _sparsities(run: Run, row: Mapping[str, Any]) -> list[float]:
    return [1 - kept / layer["size"] for kept, layer in zip(row["layers"], run["layers"], strict=True)]


def _called(run: Run) -> str:
    return f"{run['method']}, {run['name']}"


def _shape(saved: Mapping[str, Any]) -> str:
    outputs, inputs = saved["shape"][0], math.prod(saved["shape"][1:])
    cut = (
        ""
        if (outputs, inputs) == (saved["rows"], saved["columns"])
        else f", the first {saved['rows']} by {saved['columns']}"
    )
    return f"{outputs} by {inputs}{cut}"


def _is_share(metric: str) -> bool:
    return "acc" in metric.lower()


def _is_loss(metric: str) -> bool:
    return any(word in metric.lower() for word in ("loss", "error", "mse", "perplexity"))


def _value(metric: str, value: float | None) -> str:
    return "" if value is None else f"{value:.2%}" if _is_share(metric) and 0 <= value <= 1 else f"{value:.4g}"
