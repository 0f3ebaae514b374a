"""Tables of accuracy at equal sparsity."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cells import LABELS, best, embolden, label, percent, runs, tests
from benchmarks.record import Row, pick, spread
from benchmarks.suites import SUITES

CHANNELS = {
    "dense": "dense",
    "Torch-Pruning, global": "Torch-Pruning 1.6, all layers compete",
    "Torch-Pruning, uniform": "Torch-Pruning 1.6, the same fraction everywhere",
    "one-shot": "`MagnitudePruning`, one-shot in the middle",
    "one-shot, uniform": '`MagnitudePruning(allocation="uniform")`, one-shot in the middle',
    "gradual": "`MagnitudePruning`, gradual",
    "gradual, uniform": '`MagnitudePruning(allocation="uniform")`, gradual',
}


def accuracy(name: str, work: bool = True, beside: Sequence[Mapping[str, Any]] = ()) -> list[Row]:
    """A comparison, with optional runs from another suite of the same setting; the best method at 98% comes first."""
    suite, found = SUITES[name], [*runs(name), *beside]
    rows = []
    for method in dict.fromkeys(run["method"] for run in found if run["method"] != "dense"):
        cost = statistics.mean(run["training"] for run in pick(found, method=method, sparsity=0.98)) if work else 0.0
        row = [label(method), *(tests(found, method=method, sparsity=s) for s in suite.sparsities)]
        rows.append(row + [f"{cost:.3f}"] * work)
    rows.sort(key=lambda row: -best([row[1 + suite.sparsities.index(0.98)]]))
    columns = range(1, len(suite.sparsities) + 1)
    embolden(rows, columns)
    dense = [LABELS["dense"], tests(found, method="dense"), *[""] * (len(columns) - 1), *["1"] * work]
    return [["", *percent(suite.sparsities), *["training cost at 98%"] * work], dense, *rows]


def beside_dense(name: str) -> Iterator[tuple[str, Sequence[Mapping[str, Any]], Row]]:
    """The runs of each method of a suite, with their accuracy and its difference from dense training, seed by seed."""
    found = runs(name)
    dense = {run["seed"]: run["test"] for run in pick(found, method="dense")}
    for method in dict.fromkeys(run["method"] for run in found):
        mine = pick(found, method=method)
        less = [run["test"] - dense[run["seed"]] for run in mine if method != "dense"]
        yield method, mine, [spread([run["test"] for run in mine]), spread(less) if less else ""]


def structured(name: str) -> list[Row]:
    """Structures at their sparsity, and the difference from dense training."""
    rows = []
    for method, mine, cells in beside_dense(name):
        kept = statistics.mean(run["kept"] / run["total"] for run in mine)
        rows.append([label(method), f"{100 * kept:.1f}%", *cells])
    return [["", "weights kept", "test accuracy, %", "difference from dense"], *rows]


def channels(name: str) -> list[Row]:
    """Networks that lost channels until half of their multiplications were left."""
    rows = []
    for way, mine, cells in beside_dense(name):
        sizes = [f"{statistics.mean(run[key] for run in mine):.3f}" for key in ("inference", "parameters")]
        rows.append([CHANNELS[way], *sizes, *cells])
    return [["", "multiplications", "parameters", "test accuracy, %", "difference from dense"], *rows]


def growth() -> list[Row]:
    """Where connections grow."""
    keys = {
        "into outputs without connections": "growth that goes to outputs without connections",
        "outputs without connections": "such outputs",
        "into one output": "growth of a layer that goes to one output",
        "in the end": "outputs without connections at the end",
        "test": "test accuracy",
    }
    rows = []
    for way in SUITES["desk-growth"].methods:
        found = pick(runs("desk-growth"), method=way)
        rows.append([f"`{way}`", *(spread([run[key] for run in found], 1) for key in keys)])
    return [["%", *keys.values()], *rows]


def cka() -> list[Row]:
    """Accuracy and similarity, and the difference per seed."""
    suite, found = SUITES["desk-cka"], runs("desk-cka")
    rows = [[label(method)] for method in suite.methods] + [["difference, seed by seed"]]
    for sparsity in suite.sparsities:
        pair = [pick(found, method=method, sparsity=sparsity) for method in suite.methods]
        for row, some in zip(rows, pair, strict=False):
            similarity = statistics.mean(run["similarity"][-1] for run in some)
            row.append(f"{spread([run['test'] for run in some])}; {similarity:.3f}")
        plain, treated = ([pick(some, seed=seed)[0]["test"] for seed in suite.seeds] for some in pair)
        rows[-1].append(spread([b - a for a, b in zip(plain, treated, strict=True)]))
    return [["", *percent(suite.sparsities)], *rows]


def scl() -> list[Row]:
    """Results of each price, compared with gradual pruning to the same sparsity."""
    found = runs("desk-prices")
    rows = []
    for price in sorted({run["price"] for run in pick(found, study="gradual")}):
        reached = spread([run["sparsity"] for run in pick(found, study="price", price=price)])
        cells = [[tests(found, study=study, price=price)] for study in ("price", "gradual")]
        embolden(cells, [0])
        rows.append([f"{price:g}", reached, *(cell for [cell] in cells)])
    return [["price", "resulting sparsity, %", "`SparseConnectivityLearning`", "gradual magnitude"], *rows]


def lpss() -> list[Row]:
    """Spheres compared with static masks."""
    found, sparsities = runs("desk-lp-sphere"), SUITES["desk-lp-sphere"].sparsities
    rows = [[label(m), *(tests(found, method=m, sparsity=s) for s in sparsities)] for m in ("static", "LpSphere")]
    embolden(rows, (1, 2, 3))
    return [["", *percent(sparsities)], ["dense SGD (0%)", tests(found, method="dense"), "", ""], *rows]


def simulation() -> list[Row]:
    """Error and depth after layers are merged."""
    found = pick(runs("desk-layers-simulation"), setting="1/3 of inner layers signed")
    rows = []
    for fit, strength, words in (
        ("plain", None, "plain"),
        ("weight decay", 0.0, "weight decay alone"),
        ("layer penalty", 0.3, "`LayerSparsity(strength=0.3)`, merged"),
        ("refit, warm", 0.3, "the same, trained further (warm)"),
        ("refit, fresh", 0.3, "the same, trained from scratch (fresh)"),
        ("layer penalty", 1.0, "`LayerSparsity(strength=1.0)`, merged"),
        ("refit, warm", 1.0, "the same, warm"),
        ("refit, fresh", 1.0, "the same, fresh"),
    ):
        some = pick(found, fit=fit, strength=strength)
        depths = sorted(run["depth"][1] for run in some) if fit == "layer penalty" else []
        left = " to ".join(map(str, dict.fromkeys((depths[0], depths[-1])))) if depths else ""
        rows.append([words, spread([run.get("merged error", run["error"]) for run in some], 3, 1), left])
    embolden(rows, (1,), lowest=True)
    return [["", "error", "layers left of 8"], *rows]
