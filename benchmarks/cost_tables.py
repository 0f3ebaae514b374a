"""Tables of time, memory, perplexity and exported models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cells import LABELS, label, numbers, places, ratio
from benchmarks.record import RESULTS, Row, pick, spread

RUNGS = ["rung", "runtime", "parameters", "bytes", "speed, batch 64", "speed, batch 1", "largest change"]


def overhead() -> list[Row]:
    """Step times compared with other libraries."""
    columns = numbers("cost-overhead")
    rows = [["dense, ms", *(f"{1e3 * column['dense']['seconds']:.0f}" for column in columns.values())]]
    for way, words in LABELS.items():
        found = [column.get(way) for column in columns.values()]
        if way != "dense" and any(found):
            number = (lambda r: f"{r['ratio']:.3f}") if way.startswith("inside") else ratio
            rows.append([words, *(number(r) if r else "" for r in found)])
    return [["", *places(columns)], *rows]


def updates() -> list[Row]:
    """Times of mask updates by the number of weights."""
    columns = {title.split()[2]: c for title, c in numbers("cost-updates").items() if title.startswith("mask update")}
    rows = [["`MagnitudePruning`, ms", *(f"{1e3 * c['MagnitudePruning']['seconds']:.0f}" for c in columns.values())]]
    for way, words in {
        "prune.global_unstructured": "`prune.global_unstructured`, relative to that",
        "ModelPruning": "`ModelPruning`, relative to that",
        "cat, kthvalue, compare": "concatenate, `torch.kthvalue`, compare; relative to that",
    }.items():
        rows.append([words, *(ratio(c[way], 1) if way in c else "" for c in columns.values())])
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
    rows += [[words, *(cell(column, way) for column in columns.values())] for way, words in labels.items()]
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
    for way, name in (("RigL", "`RigL`"), ("global threshold", "`MagnitudePruning`, global")):
        found = [column[way] for column in columns.values()]
        rows.append([f"{name}: an update, s", *(f"{one['update in s']:.1f}" for one in found)])
        rows.append([f"{name}: sent at an update, MiB", *(f"{one['MiB sent at an update']:.1f}" for one in found)])
        rows.append([f"{name}: sent per layer, MiB", *(f"{one['MiB sent per layer']:.2f}" for one in found)])
        rows.append([f"{name}: masks of a step, ms", *(f"{one['masks of a step, in ms']:.0f}" for one in found)])
        rows.append([f"{name}: peak beyond dense, GiB", *(f"{one['GiB beyond dense']:.2f}" for one in found)])
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
