"""Make the tables of docs/evidence/ and of some other pages from the results, and two figures.

    python -m benchmarks.tables                            write the tables into the pages
    python -m benchmarks.tables cka                        print one table
    python -m benchmarks.tables --draw docs/accuracy.png   draw the figure of `desk-lenet300`
    python -m benchmarks.tables --draw docs/imbalance.png  draw the gradients of `claim-norms-lenet5`

A table is placed between `<!-- its name -->` and `<!-- end -->`; everything in between is replaced. A test fails if a page
and the results differ. The best value of a column is bold.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Comparison
from benchmarks.claims import CLAIMS, progress
from benchmarks.export import structure_rows
from benchmarks.record import RESULTS, Row, markdown, pick, spread
from benchmarks.suites import SUITES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    *(DOCS / "evidence" / f"{name}.md" for name in ("accuracy", "claims", "fine-tuning", "cost")),
    DOCS / "large-models.md",
    DOCS / "guides" / "export.md",
]
"""The pages with tables, in the order of `TABLES`."""
NOT_MEASURED = "Not measured yet."

LABELS = {
    "dense": "dense (0%)",
    "random": "`RandomSparsity`",
    "random + CKA-SR": "with `CKARegularization(strength=1e-4)`",
    "L1, then one-shot": "`WeightPenalty`, L1, then one-shot",
    "lottery ticket": "`LotteryTicket`, 3 rounds in the same epochs",
    "one-shot + fine-tuning": "`MagnitudePruning`, one-shot in the middle",
    "gradual": "`MagnitudePruning`, gradual",
    "L1-ART": '`HyperSparse(penalty="l1")`',
    "AC/DC": "`ACDC`",
    "RigL, fan-in": '`RigL(structure="fan_in")`',
    "gradual, blocks of 4": '`MagnitudePruning(structure="block:4x4")`, gradual',
    "gradual 2:4": '`MagnitudePruning(structure="2:4")`, gradual',
    "AC/DC 2:4": '`ACDC(structure="2:4")`',
    "SR-STE": "`SRSTE()`",
    "S-STE": "`SRSTE(soft=True)`",
    "SR-STE, transposable": '`SRSTE(structure="transposable 2:4", every="40 steps")`',
    "SCL": "`SparseConnectivityLearning(sparsity=...)`",
    "static": "SGD, random static mask",
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

CHANNELS = {
    "dense": "dense",
    "Torch-Pruning, global": "Torch-Pruning 1.6, all layers compete",
    "Torch-Pruning, uniform": "Torch-Pruning 1.6, the same fraction everywhere",
    "one-shot": "`MagnitudePruning`, one-shot in the middle",
    "one-shot, uniform": '`MagnitudePruning(allocation="uniform")`, one-shot in the middle',
    "gradual": "`MagnitudePruning`, gradual",
    "gradual, uniform": '`MagnitudePruning(allocation="uniform")`, gradual',
}

MODELS = {"mlp": "perceptron", "resnet18": "ResNet-18", "vit": "ViT-tiny"}


def label(name: str) -> str:
    return LABELS.get(name, f"`{name}`")


def runs(name: str) -> list[dict[str, Any]]:
    return SUITES[name].content(RESULTS)["runs"]


def numbers(name: str) -> dict[str, Any]:
    return SUITES[name].content(RESULTS)["numbers"]


def tests(found: Sequence[Mapping[str, Any]], **what: Any) -> str:
    return spread([run["test"] for run in pick(found, **what)])


def best(cells: Iterable[str], lowest: bool = False) -> float:
    return (min if lowest else max)(float(cell.split()[0]) for cell in cells if cell)


def embolden(rows: Sequence[Row], columns: Iterable[int], lowest: bool = False) -> None:
    """Mark the best mean of each column."""
    for column in columns:
        wanted = best((row[column] for row in rows), lowest)
        for row in rows:
            mean, _, rest = row[column].partition(" ")
            if mean and float(mean) == wanted:
                row[column] = f"**{mean}** {rest}".rstrip()


def percent(sparsities: Sequence[float]) -> Row:
    return [f"{100 * sparsity:g}%" for sparsity in sparsities]


# ---- accuracy ----------------------------------------------------------------------------------------------------------


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
    for fit, strength, label in (
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
        rows.append([label, spread([run.get("merged error", run["error"]) for run in some], 3, 1), left])
    embolden(rows, (1,), lowest=True)
    return [["", "error", "layers left of 8"], *rows]


# ---- cost --------------------------------------------------------------------------------------------------------------


def ratio(found: dict[str, float], digits: int = 2) -> str:
    """A median with its middle half."""
    return f"{found['ratio']:.{min(3, digits + 1)}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def places(titles: Iterable[str]) -> Row:
    """Model and batch size, from titles that name them."""
    found = [re.search(r"(\w+), batch (\d+)", title) for title in titles]
    return [f"{MODELS[match[1]]}, {match[2]}" for match in found]


def overhead() -> list[Row]:
    """Step times compared with other libraries."""
    columns = numbers("cost-overhead")
    rows = [["dense, ms", *(f"{1e3 * column['dense']['seconds']:.0f}" for column in columns.values())]]
    for way, label in LABELS.items():
        if way != "dense" and all(way in column for column in columns.values()):
            found = [column[way] for column in columns.values()]
            rows.append([label, *(f"{r['ratio']:.3f}" if way.startswith("inside") else ratio(r) for r in found)])
    return [["", *places(columns)], *rows]


def updates() -> list[Row]:
    """Times of mask updates by the number of weights."""
    columns = {title.split()[2]: c for title, c in numbers("cost-updates").items() if title.startswith("mask update")}
    rows = [["`MagnitudePruning`, ms", *(f"{1e3 * c['MagnitudePruning']['seconds']:.0f}" for c in columns.values())]]
    for way, label in {
        "prune.global_unstructured": "`prune.global_unstructured`, relative to that",
        "ModelPruning": "`ModelPruning`, relative to that",
        "cat, kthvalue, compare": "concatenate, `torch.kthvalue`, compare; relative to that",
    }.items():
        rows.append([label, *(ratio(c[way], 1) if way in c else "" for c in columns.values())])
    return [["a global mask update over", *(f"{int(size.replace(',', '')) / 1e6:g} M" for size in columns)], *rows]


def methods(suite: str) -> list[Row]:
    """Step times of every method relative to dense steps, between changes of masks."""
    columns = numbers(suite)
    rows = [["dense, ms", *(f"{statistics.median(r['dense, ms'] for r in c.values()):.0f}" for c in columns.values())]]
    for method in columns["mlp, batch 32"]:
        rows.append([f"`{method}`", *(ratio(c[method]["between"]) if method in c else "" for c in columns.values())])
    return [["", *places(columns)], *rows]


def inside(suite: str) -> list[Row]:
    """Fraction of a step spent inside every method, between and at changes of masks, and the memory it keeps."""
    columns = numbers(suite)
    rows = []
    for method in columns["mlp, batch 32"]:
        found = [column.get(method, {}) for column in columns.values()]
        shares = [[row.get(title, {}).get("inside") for title in ("between", "change")] for row in found]
        cells = ["; ".join(f"{100 * share:.1f}" for share in pair if share is not None) for pair in shares]
        rows.append([f"`{method}`", *cells, f"{max(row.get('bytes per weight', 0) for row in found):.0f}"])
    return [["inside, % of the rest of the step", *places(columns), "bytes per weight"], *rows]


def memory(name: str) -> list[Row]:
    """Peak memory of every method, or compared with other libraries."""
    columns = numbers(name)
    ways = [way for way in columns["mlp, batch 32"] if way != "dense"]
    if name == "memory-overhead":
        ways = [way for way in LABELS if way in ways]
    return peaks(columns, {way: label(way) if name == "memory-overhead" else f"`{way}`" for way in ways})


def peaks(columns: Mapping[str, Mapping[str, Sequence[float]]], labels: Mapping[str, str]) -> list[Row]:
    """Ratios to plain training in the same round: the median, and the range if rounds differ."""

    def cell(column: Mapping[str, Sequence[float]], way: str) -> str:
        ratios = [mine / plain for mine, plain in zip(column.get(way, []), column["dense"], strict=False)]
        low, high = (f"{end(ratios, default=0):.2f}" for end in (min, max))
        return f"{statistics.median(ratios):.3f}" + (f" ({low} to {high})" if low != high else "") if ratios else ""

    rows = [["plain, MiB", *(f"{statistics.median(column['dense']):.0f}" for column in columns.values())]]
    rows += [[label, *(cell(column, way) for column in columns.values())] for way, label in labels.items()]
    return [["peak memory, relative to plain training", *places(columns)], *rows]


def sparsegpt() -> list[Row]:
    """One large layer compared with a plain version of the published loop."""
    found = numbers("cost-sparsegpt").items()
    columns = {title.rpartition(", ")[2].replace(" %", "%"): column for title, column in found}
    rows = [["ours, s", *(f"{c['time']['ours']['seconds']:.1f}" for c in columns.values())]]
    rows.append(["the published loop, relative to that", *(ratio(c["time"]["published loop"], 1) for c in columns.values())])
    for way in ("ours", "published loop"):
        sizes = [c["peak in MiB"][way] for c in columns.values()]
        rows.append([f"{way}: peak beyond weight and products, MiB", *(f"{size:.0f}" for size in sizes)])
    for dtype in ("float32", "float64"):
        other = [c["agreement"][dtype]["other masks"] for c in columns.values()]
        rows.append([f"entries that only one of the two removes, {dtype}", *(f"{count:,.0f}" for count in other)])
    return [["4096 x 4096, 2,048 rows", *columns], *rows]


def perplexity() -> list[Row]:
    """The results of `examples/finetune_lm.py`: right after pruning, and after further training."""
    found = [json.loads(line) for line in (RESULTS / "finetune-lm.jsonl").read_text().splitlines()]
    dense = [run["perplexity"] for run in found if run["method"] == "dense"]
    after = [str(step) for step in found[0]["after"]]
    head = ["removed", "", "teacher", *(f"after {step} steps" if step != "0" else "pruned" for step in after), "seeds"]
    rows = [["", "dense", "", spread(dense, 3, 1), *[""] * (len(after) - 1), str(len(dense))]]
    pruned = [run for run in found if run["method"] != "dense"]
    for structure, method, teacher in dict.fromkeys((run["structure"], run["method"], run["teacher"]) for run in pruned):
        mine = [run["perplexity"] for run in pick(pruned, structure=structure, method=method, teacher=teacher)]
        cells = [spread([one[step] for one in mine], 3, 1) for step in after]
        rows.append([structure.replace(" %", "%"), method, "yes" if teacher else "no", *cells, str(len(mine))])
    return [head, *rows]


def finetuning() -> list[Row]:
    """Step times of methods that start from an existing model, and the fraction spent inside the method."""
    columns = numbers("cost-finetuning")
    rows = []
    for method in columns["vit, batch 32"]:
        found = [column.get(method, {}).get("between") for column in columns.values()]
        cells = [ratio(one) if one else "" for one in found]
        shares = [f"{100 * one['inside']:.1f}" if one and "inside" in one else "" for one in found]
        rows.append([f"`{method}`", *(cell for pair in zip(cells, shares, strict=True) for cell in pair)])
    return [["", *(cell for place in places(columns) for cell in (place, "inside, %"))], *rows]


def sharded() -> list[Row]:
    """Masks on weights that are split in half between two ranks."""
    columns = {title.split()[2]: column for title, column in numbers("cost-sharded").items()}
    rows = [["dense training, peak of a rank in GiB", *(f"{c['dense']['peak in GiB']:.1f}" for c in columns.values())]]
    for way, label in (("RigL", "`RigL`"), ("global threshold", "`MagnitudePruning`, global")):
        found = [column[way] for column in columns.values()]
        rows.append([f"{label}: an update, s", *(f"{one['update in s']:.1f}" for one in found)])
        rows.append([f"{label}: sent at an update, MiB", *(f"{one['MiB sent at an update']:.1f}" for one in found)])
        rows.append([f"{label}: sent per layer, MiB", *(f"{one['MiB sent per layer']:.2f}" for one in found)])
        rows.append([f"{label}: masks of a step, ms", *(f"{one['masks of a step, in ms']:.0f}" for one in found)])
        rows.append([f"{label}: peak beyond dense, GiB", *(f"{one['GiB beyond dense']:.2f}" for one in found)])
    sizes = [f"{int(size.replace(',', '')) / 1e6:.0f} M weights" for size in columns]
    return [["two ranks, one thread each", *sizes], *rows]


def rungs(found: Mapping[str, Any], note: str = "", only: Sequence[str] = ()) -> list[Row]:
    """One row per rung that was written: size, gain over the dense model in the same runtime, and exactness."""
    rows = []
    for name, rung in found["rungs"].items():
        if not rung["file"] or not rung["latency"] or (only and name not in only):
            continue
        dense = found["rungs"]["dense" if rung["runtime"] == "torch" else f"dense, {rung['runtime']}"]["latency"]
        gains = [gain(dense[batch], rung["latency"][batch]) if batch in rung["latency"] else "" for batch in ("64", "1")]
        sizes = [f"{found[of][name]:.2f}" for of in ("parameters, of dense", "bytes, of dense")]
        change = f"{rung['change']:.1e}" if rung["change"] else "0"
        accuracy = f"{100 * rung['metrics']['test accuracy']:.2f}" if rung["metrics"] else ""
        rows.append([f"`{name}`{note}", rung["runtime"], *sizes, *gains, change, accuracy])
    return rows


def gain(dense: Mapping[str, float], ours: Mapping[str, float]) -> str:
    """The speedup, marked as level if the middle halves overlap."""
    apart = ours["high"] < dense["low"] or ours["low"] > dense["high"]
    return f"{dense['median'] / ours['median']:.2f}" + ("" if apart else " (level)")


def exported() -> list[Row]:
    """ResNet-20 as trained, and the result of removing channels with folded normalizations."""
    found = numbers("export-resnet")
    folded = rungs(found["normalization folded"], ", `fold=True`", only=("removed",))
    return [[*RUNGS, "test accuracy, %"], *rungs(found["as trained"]), *folded]


def perceptron() -> list[Row]:
    """The wide perceptron, which is not trained."""
    return [RUNGS, *(row[:-1] for row in rungs(numbers("export-mlp")))]


RUNGS = ["rung", "runtime", "parameters", "bytes", "speed, batch 64", "speed, batch 1", "largest change"]

TABLES: dict[str, Callable[[], list[Row]]] = {
    "lenet300": lambda: accuracy("desk-lenet300"),
    "hypersparse": lambda: accuracy("desk-hypersparse", work=False),
    "structured": lambda: structured("desk-structures-lenet300"),
    "structured20": lambda: structured("desk-structures-resnet20"),
    "channels20": lambda: channels("desk-channels-resnet20"),
    "channels-mobilenet": lambda: channels("desk-channels-mobilenet"),
    "lenet5": lambda: accuracy("desk-lenet5"),
    "resnet20": lambda: accuracy("desk-resnet20", beside=pick(runs("desk-cka"), method="random")),
    "growth": growth,
    "cka": cka,
    "scl": scl,
    "lpss": lpss,
    "simulation": simulation,
    **{name: make for name, (make, _) in CLAIMS.items()},
    "perplexity": perplexity,
    "overhead": overhead,
    "peaks": lambda: memory("memory-overhead"),
    "updates": updates,
    "sparsegpt": sparsegpt,
    "finetuning": finetuning,
    "methods": lambda: methods("cost-methods"),
    "inside": lambda: inside("cost-methods"),
    "structure-steps": lambda: methods("cost-structures"),
    "structure-inside": lambda: inside("cost-structures"),
    "memory": lambda: memory("memory-methods"),
    "sharded": sharded,
    "exported": exported,
    "perceptron": perceptron,
    "exports": lambda: structure_rows(SUITES["export-structures"].content(RESULTS).get("numbers", {})),
}


def block(name: str) -> str:
    """A table, or a line that says there are no results yet. For a claim, also how many of its runs are done."""
    rows = TABLES[name]()
    table = [markdown(rows)] if len(rows) > 1 else []
    said = [progress(CLAIMS[name][1])] if name in CLAIMS else [] if table else [NOT_MEASURED]
    return "\n\n".join([*table, *said])


def filled(page: str) -> str:
    """The page with all its tables made from the current results."""

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{block(match[1])}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->.*?<!-- end -->", fresh, page, flags=re.DOTALL)


# ---- the figure --------------------------------------------------------------------------------------------------------


def draw(suite: Comparison, found: Sequence[Mapping[str, Any]], file: Path, columns: int = 5) -> None:
    """Plot error against density in percent, one axis per method, with all other methods in gray behind it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves: dict[str, list[tuple[float, float, float]]] = {}
    for method in suite.methods:
        for sparsity in sorted({run["sparsity"] for run in pick(found, method=method)}):
            errors = [100 - 100 * run["test"] for run in pick(found, method=method, sparsity=sparsity)]
            deviation = statistics.stdev(errors) if len(errors) > 1 else 0.0
            curves.setdefault(method, []).append((100 * (1 - sparsity), statistics.mean(errors), deviation))
    means = [mean for curve in curves.values() for _, mean, _ in curve]
    dense = curves.pop("dense", None)
    lines = -(-len(curves) // columns)
    size = (2.1 * columns, 1.9 * lines)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    ticks = sorted({density for curve in curves.values() for density, _, _ in curve}, reverse=True)
    marks = [a for a in (99, 98, 95, 92, 90, 88, 85, 80, 70, 60, 40, 20, 10) if 100 - a <= max(means) + 10]
    for place in range(len(curves), axes.size):
        axes.flat[place].set_visible(False)
        axes.flat[place - columns].tick_params(labelbottom=True)
    for axis, (method, curve) in zip(axes.flat, curves.items(), strict=False):
        for other in curves.values():
            axis.plot(*list(zip(*other, strict=True))[:2], color="0.85", linewidth=1)
        if dense:
            axis.axhline(dense[0][1], color="0.5", linewidth=0.8, linestyle=":")
        axis.errorbar(*zip(*curve, strict=True), color="C0", linewidth=1.6, marker="o", markersize=3, capsize=2)
        axis.set_title(re.sub(r", |(?=\()", "\n", label(method).replace("`", ""), count=1), fontsize=8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{100 - tick:g}" for tick in ticks], fontsize=6.5)
        axis.set_yticks([100 - mark for mark in marks], [f"{mark}" for mark in marks], fontsize=6.5)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].invert_xaxis()
    axes.flat[0].set_ylim(1.05 * max(means), 0.95 * min(means))
    figure.supxlabel("sparsity, %", fontsize=8)
    figure.supylabel("test accuracy, %, on the scale of the error", fontsize=8)
    figure.savefig(file, dpi=130)


def draw_features(epochs: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """Plot the gradients of mask variables by epoch, one axis per layer, with features sorted by size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    layers = list(next(iter(epochs.values())))
    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    size = (2.4 * columns, 2.0 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        for (epoch, sizes), color in zip(epochs.items(), ("0.75", "C9", "C0"), strict=True):
            values = sorted(value for value in sizes[layer] if value > 0)
            shares = [100 * (place + 0.5) / len(sizes[layer]) for place in range(len(values))]
            axis.plot(shares, values, color=color, linewidth=1.4, label=epoch)
        axis.set_title(layer.removeprefix("network.").removesuffix(".weight"), fontsize=8)
        axis.set_yscale("log")
        axis.set_xlim(0, 100)
        axis.set_ylim(bottom=1e-7)
        axis.tick_params(labelsize=6.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=6.5, frameon=False)
    figure.supxlabel("features in order of size, %; those without a gradient are left out", fontsize=8)
    figure.supylabel("gradient, root mean square", fontsize=8)
    figure.savefig(file, dpi=130)


FIGURES: dict[str, Callable[[Path], None]] = {
    "accuracy.png": lambda file: draw(SUITES["desk-lenet300"], runs("desk-lenet300"), file),
    "imbalance.png": lambda file: draw_features(
        next(run["features"] for run in runs("claim-norms-lenet5") if run.get("features")), file
    ),
}
"""Functions that draw the figures, by file name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES)
    parser.add_argument("--draw", type=Path, metavar="FILE", help=f"draw a figure instead: {' or '.join(FIGURES)}")
    options = parser.parse_args()
    if options.draw:
        if options.draw.name not in FIGURES:
            parser.error(f"no figure {options.draw.name!r}; choose from {', '.join(FIGURES)}")
        from matplotlib import pyplot

        pyplot.style.use("lightning_sparse.observe.figures")
        FIGURES[options.draw.name](options.draw)
    elif options.table:
        print(block(options.table))
    else:
        for page in PAGES:
            page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
