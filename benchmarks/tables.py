"""The tables of docs/evidence.md, made from the results.

    python -m benchmarks.tables              write them into the page
    python -m benchmarks.tables cka          print one

A table stands between `<!-- its name -->` and `<!-- end -->`; what is between is replaced. A test keeps page and results in
step. The best of a column is bold.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import SUITES, collect
from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"

Row = list[str]

LABELS = {
    "dense": "dense (0 %)",
    "random": "`RandomSparsity`",
    "random + CKA-SR": "with `CKARegularization(1e-4)`",
    "SNIP": "`SNIP`",
    "GraSP": "`GraSP`",
    "SynFlow": "`SynFlow`",
    "L1, then one-shot": "`WeightPenalty`, L1, then one-shot",
    "lottery ticket": "`LotteryTicket`, 3 rounds in the same epochs",
    "one-shot + fine-tuning": "`MagnitudePruning`, one-shot in the middle",
    "gradual": "`MagnitudePruning`, gradual",
    "SET": "`SET`",
    "RigL": "`RigL`",
    "GraNet": "`GraNet`",
    "L1-ART": '`HyperSparse(penalty="l1")`',
    "HyperSparse": "`HyperSparse`",
    "SCL": "`SparseConnectivityLearning(sparsity=...)`",
    "static": "SGD, random static mask",
    "LpSphere": "`LpSphere`",
    "MagnitudePruning": "`MagnitudePruning`, a mask",
    "ModelPruning": "Lightning's `ModelPruning`, a mask",
    "torch.nn.utils.prune": "`torch.nn.utils.prune`, a mask",
    "parametrize": "`parametrize`, a mask",
    "fasterai Sparsifier": "fasterai `Sparsifier`, a mask",
    "WeightPenalty, L1": "`WeightPenalty`, L1",
    "fasterai penalty, L1": "fasterai, L1 in the loss",
    "WeightPenalty, group lasso": "`WeightPenalty`, group lasso",
    "Torch-Pruning penalty, group norm": "Torch-Pruning, group norm",
    "inside MagnitudePruning's stations": "inside `MagnitudePruning`",
}

MODELS = {"mlp": "perceptron", "resnet18": "ResNet-18", "vit": "ViT-tiny"}


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def spread(values: Sequence[float], digits: int = 2, factor: float = 100) -> str:
    """Mean and standard deviation."""
    scaled = [factor * value for value in values]
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{deviation}"


def embolden(rows: Sequence[Row], columns: Iterable[int], lowest: bool = False) -> None:
    """Mark the best mean of each column."""
    for column in columns:
        found = [(float(row[column].split()[0]), row) for row in rows if row[column]]
        best = (min if lowest else max)(value for value, _ in found)
        for value, row in found:
            if value == best:
                mean, _, rest = row[column].partition(" ")
                row[column] = f"**{mean}** {rest}".rstrip()


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


# ---- accuracy ----------------------------------------------------------------------------------------------------------


def accuracy(name: str, work: bool = True) -> list[Row]:
    """A suite of `benchmarks.accuracy`; the best at 98 % first."""
    suite, found = SUITES[name], collect(name, RESULTS)["runs"]

    def cell(method: str, sparsity: float) -> str:
        return spread([r["test"] for r in found if (r["method"], r["sparsity"]) == (method, sparsity)])

    def cost(method: str) -> Row:
        runs = [r for r in found if (r["method"], r["sparsity"]) == (method, 0.98)]
        return [f"{statistics.mean(r['training'] for r in runs):.3f}"] if work else []

    columns = list(range(1, len(suite.sparsities) + 1))
    rows = [
        [LABELS[method], *(cell(method, sparsity) for sparsity in suite.sparsities), *cost(method)]
        for method in suite.methods
        if method != "dense"
    ]
    rows.sort(key=lambda row: -float(row[1 + list(suite.sparsities).index(0.98)].split()[0]))
    embolden(rows, columns)
    dense = [LABELS["dense"], cell("dense", 0.0), *[""] * (len(columns) - 1), *(["1"] if work else [])]
    return [["", *map(percent, suite.sparsities), *(["training at 98 %"] if work else [])], dense, *rows]


def growth() -> list[Row]:
    """Where connections grow."""
    keys = {
        "into outputs without connections": "of what grows, into outputs without connections",
        "outputs without connections": "such outputs",
        "into one output": "of what a layer grows, into one output",
        "in the end": "outputs without connections in the end",
        "test": "test accuracy",
    }
    runs = load("growth")["runs"]
    ways = list(dict.fromkeys(run["way"] for run in runs))
    rows = [[f"`{way}`", *(spread([run[key] for run in runs if run["way"] == way], 1) for key in keys)] for way in ways]
    return [["%", *keys.values()], *rows]


def cka() -> list[Row]:
    """Accuracy and similarity, and the difference seed by seed."""
    suite, found = SUITES["cka"], collect("cka", RESULTS)["runs"]
    by_key = {(r["method"], r["sparsity"], r["seed"]): r for r in found}
    rows = []
    for method in suite.methods:
        runs = [[by_key[method, s, seed] for seed in suite.seeds] for s in suite.sparsities]
        cells = [f"{spread([r['test'] for r in c])}; {statistics.mean(r['similarity'][-1] for r in c):.3f}" for c in runs]
        rows.append([LABELS[method], *cells])
    plain, treated = suite.methods
    gains = [
        spread([by_key[treated, s, seed]["test"] - by_key[plain, s, seed]["test"] for seed in suite.seeds])
        for s in suite.sparsities
    ]
    return [["", *map(percent, suite.sparsities)], *rows, ["difference, seed by seed", *gains]]


def scl() -> list[Row]:
    """What prices lead to, beside gradual pruning to the same sparsities."""
    found = load("scl_evidence")["numbers"]
    rows = []
    for price in sorted({r["price"] for r in found if r["study"] == "gradual"}):
        ours, theirs = ([r for r in found if (r["study"], r.get("price")) == (s, price)] for s in ("price", "gradual"))
        cells = [spread([r["test"] for r in runs]) for runs in (ours, theirs)]
        best = max(range(2), key=lambda i, cells=cells: float(cells[i].split()[0]))
        mean, _, rest = cells[best].partition(" ")
        cells[best] = f"**{mean}** {rest}"
        rows.append([f"{price:g}", spread([r["sparsity"] for r in ours]), *cells])
    return [["price", "sparsity it led to, %", "`SparseConnectivityLearning`", "gradual magnitude"], *rows]


def lpss() -> list[Row]:
    """The sphere beside static masks."""
    found, sparsities = load("lpss_half")["runs"], (0.5, 0.8, 0.9)

    def cell(method: str, sparsity: float) -> str:
        return spread([r["test"] for r in found if (r["method"], r["sparsity"]) == (method, sparsity)])

    rows = [[LABELS[method], *(cell(method, s) for s in sparsities)] for method in ("static", "LpSphere")]
    embolden(rows, (1, 2, 3))
    return [["", *map(percent, sparsities)], ["dense SGD (0 %)", cell("dense", 0.0), "", ""], *rows]


def simulation() -> list[Row]:
    """Error and depth after layers have merged."""
    found = [r for r in load("layers_simulation")["runs"] if r["setting"] == "1/3 of inner layers signed"]
    rows = []
    for fit, strength, label in (
        ("plain", None, "plain"),
        ("weight decay", 0.0, "weight decay alone"),
        ("layer penalty", 0.3, "`LayerSparsity(0.3)`, merged"),
        ("refit, warm", 0.3, "the same, trained on from there (warm)"),
        ("refit, fresh", 0.3, "the same, trained anew (fresh)"),
        ("layer penalty", 1.0, "`LayerSparsity(1.0)`, merged"),
        ("refit, warm", 1.0, "the same, warm"),
        ("refit, fresh", 1.0, "the same, fresh"),
    ):
        runs = [r for r in found if (r["fit"], r["strength"]) == (fit, strength)]
        depths = sorted({r["depth"][1] for r in runs}) if fit == "layer penalty" else []
        left = " to ".join(map(str, dict.fromkeys((depths[0], depths[-1])))) if depths else ""
        rows.append([label, spread([r.get("merged error", r["error"]) for r in runs], 3, 1), left])
    embolden(rows, (1,), lowest=True)
    return [["", "error", "layers left of 8"], *rows]


# ---- cost --------------------------------------------------------------------------------------------------------------


def overhead() -> list[Row]:
    """Steps beside the peers."""
    numbers = load("overhead_cpu")["numbers"]
    places = [(model, batch) for model in MODELS for batch in (32, 128)]
    columns = [numbers[f"step, {model}, batch {batch}, 32-true, cpu"] for model, batch in places]
    rows = [["dense, ms", *(f"{1e3 * column['dense']['seconds']:.0f}" for column in columns)]]
    for way, label in LABELS.items():
        if way in columns[0] and way != "dense":
            found = [column[way] for column in columns]
            rows.append([label, *(f"{r['ratio']:.3f}" if way.startswith("inside") else _ratio(r) for r in found)])
    return [["", *(f"{MODELS[model]}, {batch}" for model, batch in places)], *rows]


def peaks() -> list[Row]:
    """Peak memory beside the peers."""
    numbers = load("overhead_memory")["numbers"]
    return _memory(numbers, {way: label for way, label in LABELS.items() if way in next(iter(numbers.values()))})


def updates() -> list[Row]:
    """Mask updates by the number of weights."""
    numbers = {title: rows for title, rows in load("updates_cpu")["numbers"].items() if title.startswith("mask update")}
    sizes = [int(title.split()[2].replace(",", "")) for title in numbers]
    columns = list(numbers.values())
    rows = [["`MagnitudePruning`, ms", *(f"{1e3 * c['MagnitudePruning']['seconds']:.0f}" for c in columns)]]
    for way, label in {
        "prune.global_unstructured": "`prune.global_unstructured`, times that",
        "ModelPruning": "`ModelPruning`, times that",
        "cat, kthvalue, compare": "concatenate, `torch.kthvalue`, compare; times that",
    }.items():
        rows.append([label, *(_ratio(c[way], 1) if way in c else "" for c in columns)])
    return [["a global mask update over", *(f"{size / 1e6:g} M" for size in sizes)], *rows]


def _ratio(found: dict[str, float], digits: int = 2) -> str:
    """A median with its middle half."""
    return f"{found['ratio']:.{min(3, digits + 1)}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def methods() -> list[Row]:
    """Steps of every method beside dense ones, between changes of masks."""
    numbers = load("methods_cpu")["numbers"]
    rows = [["dense, ms", *(f"{statistics.median(r['dense, ms'] for r in c.values()):.0f}" for c in numbers.values())]]
    rows += [
        [f"`{method}`", *(_ratio(column[method]["between"]) if method in column else "" for column in numbers.values())]
        for method in next(iter(numbers.values()))
    ]
    return [["", *map(_place, numbers)], *rows]


def inside() -> list[Row]:
    """What of a step is spent inside every method, between changes of masks and where they change; and what it keeps."""
    numbers = load("methods_cpu")["numbers"]

    def cell(found: dict[str, Any]) -> str:
        shares = [
            f"{100 * found[title]['inside']:.1f}" for title in ("between", "change") if "inside" in found.get(title, {})
        ]
        return "; ".join(shares)

    rows = []
    for method in next(iter(numbers.values())):
        cells = [cell(column[method]) if method in column else "" for column in numbers.values()]
        kept = max(column[method]["bytes per weight"] for column in numbers.values() if method in column)
        rows.append([f"`{method}`", *cells, f"{kept:.0f}"])
    return [["inside, % of the rest of the step", *map(_place, numbers), "bytes per weight"], *rows]


def memory() -> list[Row]:
    """Peak memory of every method."""
    numbers = load("methods_memory")["numbers"]
    return _memory(numbers, {method: f"`{method}`" for method in next(iter(numbers.values()))})


def _memory(numbers: dict[str, Any], labels: dict[str, str]) -> list[Row]:
    """Peaks as ratios to the plain training of the same turn: the median, and the range where turns differ."""

    def cell(column: dict[str, list[float]], way: str) -> str:
        ratios = [mine / plain for mine, plain in zip(column.get(way, []), column["dense"], strict=False)]
        if not ratios:
            return ""
        low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
        return f"{statistics.median(ratios):.3f}" + (f" ({low} to {high})" if low != high else "")

    rows = [["plain, MiB", *(f"{statistics.median(column['dense']):.0f}" for column in numbers.values())]]
    rows += [[label, *(cell(column, way) for column in numbers.values())] for way, label in labels.items() if way != "dense"]
    return [["peak memory, times a plain training's", *map(_place, numbers)], *rows]


def _place(title: str) -> str:
    model, _, batch = title.partition(", batch ")
    return f"{MODELS[model]}, {batch}"


TABLES: dict[str, Callable[[], list[Row]]] = {
    "lenet300": lambda: accuracy("desk-lenet300"),
    "hypersparse": lambda: accuracy("hypersparse", work=False),
    "lenet5": lambda: accuracy("desk-lenet5"),
    "resnet20": lambda: accuracy("desk-resnet20"),
    "growth": growth,
    "cka": cka,
    "scl": scl,
    "lpss": lpss,
    "simulation": simulation,
    "overhead": overhead,
    "peaks": peaks,
    "updates": updates,
    "methods": methods,
    "inside": inside,
    "memory": memory,
}


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def filled(page: str) -> str:
    """The page with every table as the results have it."""

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{markdown(TABLES[match[1]]())}\n\n<!-- end -->"

    return re.sub(r"<!-- (?!end)(\w+) -->.*?<!-- end -->", fresh, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES)
    options = parser.parse_args()
    if options.table:
        print(markdown(TABLES[options.table]()))
    else:
        PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
