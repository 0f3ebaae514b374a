"""Figures of the results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Comparison
from benchmarks.cells import label, runs
from benchmarks.record import pick
from benchmarks.suites import SUITES


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
