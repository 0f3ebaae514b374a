"""Draw a suite of `benchmarks.accuracy`: one axis per method, all others behind it in gray.

python -m benchmarks.figures --suite desk-lenet300 --out docs/accuracy.png
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from benchmarks.accuracy import SUITES, collect
from benchmarks.record import RESULTS

COLUMNS = 5

Curve = list[tuple[float, float, float]]
"""Density, mean and spread, both in percent."""


def curves(name: str, out: Path) -> tuple[dict[str, Curve], float | None]:
    """The curve of every method that has runs, and the accuracy of the dense network."""
    found = collect(name, out)["runs"]
    made: dict[str, Curve] = {}
    for method in SUITES[name].methods:
        for sparsity in sorted({r["sparsity"] for r in found if r["method"] == method}):
            values = [100 * r["test"] for r in found if (r["method"], r["sparsity"]) == (method, sparsity)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            made.setdefault(method, []).append((100 * (1 - sparsity), statistics.mean(values), spread))
    dense = made.pop("dense", None)
    return made, dense[0][1] if dense else None


def _errors(curve: Curve) -> tuple[list[float], list[float], list[float]]:
    """Densities, errors and spreads."""
    densities, means, spreads = map(list, zip(*curve, strict=True))
    return densities, [100 - mean for mean in means], spreads


def _tops(made: dict[str, Curve], dense: float | None) -> list[float]:
    return [max(mean for _, mean, _ in curve) for curve in made.values()] + ([] if dense is None else [dense])


def draw(name: str, out: Path, file: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    made, dense = curves(name, out)
    if not made:
        raise SystemExit(
            f"{name} has no results in {out}; run `python -m benchmarks.accuracy --suite {name} --data DIR` first."
        )
    rows = math.ceil(len(made) / COLUMNS)
    figure, axes = pyplot.subplots(
        rows, COLUMNS, figsize=(2.1 * COLUMNS, 1.9 * rows), sharex=True, sharey=True, squeeze=False
    )
    ticks = sorted({density for curve in made.values() for density, _, _ in curve}, reverse=True)
    worst = min(mean for curve in made.values() for _, mean, _ in curve)
    marks = [a for a in (99, 98, 95, 92, 90, 88, 85, 80, 70, 60, 40, 20, 10) if a >= worst - 10]
    for axis in axes.flat[len(made) :]:
        axis.set_visible(False)
    for axis, (method, curve) in zip(axes.flat, made.items(), strict=False):
        for other in made.values():
            axis.plot(*_errors(other)[:2], color="0.85", linewidth=1)
        if dense is not None:
            axis.axhline(100 - dense, color="0.5", linewidth=0.8, linestyle=":")
        axis.errorbar(*_errors(curve), color="tab:blue", linewidth=1.6, marker="o", markersize=3, capsize=2)
        axis.set_title(method, fontsize=8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{100 - tick:g}" for tick in ticks], fontsize=6.5)
        axis.set_yticks([100 - mark for mark in marks], [f"{mark}" for mark in marks], fontsize=6.5)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].invert_xaxis()
    axes.flat[0].set_ylim(1.05 * (100 - worst), 0.95 * min(100 - top for top in _tops(made, dense)))
    figure.supxlabel("sparsity, %", fontsize=8)
    figure.supylabel("test accuracy, %, on the scale of the error", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    draw(options.suite, options.results, options.out)


if __name__ == "__main__":
    main()
