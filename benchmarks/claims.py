"""Tables of the protocols that test claims: pairs of runs with the same seeds, and whether they differ significantly.

A difference is significant if the 95% confidence interval of its mean over seeds (Student's t) excludes zero. Among many
rows without an effect, one in twenty is significant by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from scipy.stats import t as student

from benchmarks import lp_sphere
from benchmarks.accuracy import Comparison
from benchmarks.cka_regularization import FORMS, STRENGTHS, Prunable
from benchmarks.record import RESULTS, Options, Row, Runs, pick, spread
from benchmarks.suites import SUITES, TAMED

BESIDE = {"claim-rigl-lenet5": "desk-lenet5", "claim-rigl-lenet300": "desk-lenet300"}
"""For some claims, the suite of the same setting whose runs it is compared with."""
RIGL = ("claim-rigl-resnet20", *BESIDE)
"""The suites of RigL with few connections."""
NETWORKS = {"resnet20": "narrow ResNet-20", "lenet5": "LeNet-5", "lenet300": "LeNet-300-100", "resnet8": "ResNet-8"}
APPENDIX = {
    "": {0.0: 84.16},
    "8 samples of every fifth batch": {8e-4: 84.41, 0.01: 84.41},
    "all samples of every batch": {8e-4: 85.03, 0.01: 84.03},
}
"""Table 2 of the appendix of CKA-SR at 95%: form, strength, accuracy of a full-width ResNet-20 after 160 epochs."""
README = {0.98: "92.69", 0.995: "89.35"}
"""The README of HyperSparse: ResNet-32 of double width, CIFAR-10."""
Pair = tuple[Mapping[int, float], Mapping[int, float]]


def runs(name: str) -> Runs:
    """The results of a suite so far, and those it is compared with."""
    found: Runs = list(SUITES[name].content(RESULTS).get("runs", []))
    beside = BESIDE.get(name)
    return found + (SUITES[beside].content(RESULTS)["runs"] if beside else [])


def by_seed(found: Runs, value: str = "test", **what: Any) -> dict[int, float]:
    return {run["seed"]: run[value] for run in pick(found, **what)}


def verdict(differences: Sequence[float], lower: bool = False) -> str:
    """State whether a difference is significant, and in which direction.

    Args:
        differences: one difference per seed.
        lower: whether lower values are better.
    """
    if len(differences) < 2:
        return "undecided: one seed" if differences else "undecided: no seed in common"
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    half = float(student.ppf(0.975, len(differences) - 1)) * deviation / math.sqrt(len(differences))
    if abs(mean) <= half:
        return "not significant"
    return "better" if (mean < 0) == lower else "worse"


def beside(ours: Mapping[int, float], other: Mapping[int, float], digits: int = 2, factor: float = 100) -> Row:
    """The number of shared seeds, the difference over these seeds, and whether it is significant.

    Percentages (a factor of 100) are better if they are higher, other values if they are lower.
    """
    differences = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
    shown = spread(differences, digits, factor)
    return [
        str(len(differences)),
        shown if shown.startswith("-") or not shown else f"+{shown}",
        verdict(differences, factor == 1),
    ]


def values(found: Mapping[int, float], digits: int = 2, factor: float = 100) -> str:
    return spread(list(found.values()), digits, factor)


# ---- RigL ---------------------------------------------------------------------------------------------------------------


def tamed() -> list[Row]:
    """RigL with fewer drops, and with growth per output, compared with plain RigL and static masks."""
    rows = []
    for name in RIGL:
        found, suite = runs(name), SUITES[name]
        assert isinstance(suite, Comparison)
        for sparsity, variant in product(suite.sparsities, TAMED):
            static, plain, ours = (by_seed(found, method=m, sparsity=sparsity) for m in ("random", "RigL", variant))
            if ours:
                shown = [values(static), values(plain), values(ours)]
                [n, *to_plain], [_, *to_static] = beside(ours, plain), beside(ours, static)
                network = NETWORKS[name.rpartition("-")[2]]
                rows.append([network, f"{100 * sparsity:g}%", f"`{variant}`", n, *shown, *to_plain, *to_static])
    titles = [
        "network",
        "sparsity",
        "",
        "seeds",
        "static mask",
        "`RigL`",
        "variant",
        "difference from `RigL`",
        "",
        "difference from the static mask",
        "",
    ]
    return [titles, *rows]


# ---- layer sparsity -----------------------------------------------------------------------------------------------------


def unfavorable() -> list[Row]:
    """Weight decay alone, the penalty on top of it, and the refits, each at the strength that is best on validation data."""
    rows = []
    for setting in SUITES["claim-layers"].settings:
        found = pick(runs("claim-layers"), setting=setting)
        seeds = sorted({run["seed"] for run in found})
        chosen: dict[str, dict[int, dict[str, Any]]] = {}
        for seed, fit in product(seeds, ("plain", "weight decay", "layer penalty", "refit, warm", "refit, fresh")):
            some = pick(found, seed=seed, fit=fit)
            chosen.setdefault(fit, {})[seed] = min(some, key=lambda run: run.get("merged val", run["val"]))
        error = {
            fit: {seed: run.get("merged error", run["error"]) for seed, run in by.items()} for fit, by in chosen.items()
        }
        labels = {
            "plain": "plain",
            "weight decay": "weight decay alone, tuned",
            "layer penalty": "with `LayerSparsity`, tuned, merged",
            "refit, warm": "the same, trained further without it (warm)",
            "refit, fresh": "the same, trained from scratch (fresh)",
        }
        for fit, label in labels.items() if seeds else ():
            depths = [run["depth"] for run in chosen[fit].values() if run.get("depth")]
            cells = beside(error[fit], error["weight decay"], 3, 1) if fit != "weight decay" else [str(len(seeds)), "", ""]
            depth = f"{statistics.mean(left for _, left in depths):.1f} of {depths[0][0]}" if depths else ""
            depth += f" ({len(depths)} seeds)" if 0 < len(depths) < len(seeds) else ""
            rows.append([setting, label, cells[0], values(error[fit], 3, 1), depth, *cells[1:]])
    return [["teacher", "fit", "seeds", "error", "layers left", "difference from weight decay", ""], *rows]


# ---- sparse connectivity learning ---------------------------------------------------------------------------------------


def norms() -> list[Row]:
    """Normalized and unnormalized gradients at equal density, each with its own mask rate."""
    rows = []
    for name in ("lenet5", "resnet8"):
        found = pick(runs(f"claim-norms-{name}"), study="tuned")
        for target in SUITES[f"claim-norms-{name}"].targets:
            accuracy = {norm: by_seed(found, norm=norm, target=target) for norm in ("none", "rms", "l2")}
            for norm in ("rms", "l2"):
                if accuracy[norm].keys() & accuracy["none"].keys():
                    n, *rest = beside(accuracy[norm], accuracy["none"])
                    rates = " and ".join(f"{pick(found, norm=kind, target=target)[0]['rate']:g}" for kind in ("none", norm))
                    shown = [values(accuracy["none"]), values(accuracy[norm]), rates]
                    rows.append([NETWORKS[name], f"{100 * target:g}%", f'`norm="{norm}"`', n, *shown, *rest])
    return [
        ["network", "sparsity", "", "seeds", '`norm="none"`', "variant", "mask rates", "difference from none", ""],
        *rows,
    ]


def imbalance() -> list[Row]:
    """Imbalance of the gradients of mask variables, between the features of a layer and between layers."""
    rows = []
    for name in ("lenet5", "resnet8"):
        found = [run for run in runs(f"claim-norms-{name}") if run.get("features")]
        for epoch in ("first epoch", "middle epoch", "last epoch"):
            within, between, silent = [], [], []
            for run in found:
                layers = [sorted(values) for values in run["features"][epoch].values()]
                alive = [[value for value in layer if value > 0] for layer in layers]
                within.append(statistics.median(ratio_of_ends(layer) for layer in alive if len(layer) >= 10))
                medians = [statistics.median(layer) for layer in alive if layer]
                between.append(max(medians) / min(medians))
                silent.append(sum(value == 0 for layer in layers for value in layer) / sum(map(len, layers)))
            if found:
                cells = [f"{statistics.median(column):.3g}" for column in (within, between)]
                rows.append([NETWORKS[name], epoch, str(len(found)), *cells, f"{100 * statistics.mean(silent):.1f}%"])
    head = ["network", "", "trainings", "90th over 10th percentile in a layer", "largest over smallest layer", "silent"]
    return [head, *rows]


def ratio_of_ends(ordered: Sequence[float]) -> float:
    """The ratio of the 90th to the 10th percentile of sorted values."""
    return ordered[int(0.9 * (len(ordered) - 1))] / ordered[int(0.1 * (len(ordered) - 1))]


# ---- CKA-SR -------------------------------------------------------------------------------------------------------------


def forms() -> list[Row]:
    """Accuracy and similarity by form and strength of the penalty."""
    rows, found = [], runs("claim-cka")
    for sparsity in SUITES["claim-cka"].sparsities:
        base = pick(found, sparsity=sparsity, method="random")
        for form, strength in [("", 0.0), *product(FORMS, STRENGTHS)]:
            some = pick(found, sparsity=sparsity, method=f"random, {form}, {strength:g}") if form else base
            if some:
                similar = spread([run["similarity"][-1] for run in some], 2, 1)
                ours, without = by_seed(some), by_seed(base)
                cells = beside(ours, without) if form else [str(len(some)), "", ""]
                published = f"{APPENDIX[form][strength]:.2f}" if sparsity == 0.95 and strength in APPENDIX[form] else ""
                words = [f"{100 * sparsity:g}%", form or "none", f"{strength:g}"]
                rows.append([*words, cells[0], similar, values(ours), *cells[1:], published])
    head = [
        "sparsity",
        "penalty from",
        "strength",
        "seeds",
        "similarity",
        "test accuracy",
        "difference from none",
        "",
        "appendix",
    ]
    return [head, *rows]


def prunable() -> list[Row]:
    """Accuracy of dense networks after one-shot pruning, before and after fine-tuning.

    After fine-tuning, also relative to the accuracy before pruning. Directly after pruning this would say nothing: networks
    that fall to chance lose less if they start lower.
    """
    suite, found = SUITES["claim-prunable"], runs("claim-prunable")
    assert isinstance(suite, Comparison)
    assert isinstance(suite.setting, Prunable)
    rows = []
    for when, (place, sparsity) in product(("pruned", "fine-tuned"), enumerate(suite.setting.sparsities)):
        curves = {m: {run["seed"]: run[when][place] for run in pick(found, method=m)} for m in suite.methods}
        changes = {m: {run["seed"]: run[when][place] - run["test"] for run in pick(found, method=m)} for m in suite.methods}
        for method in suite.methods[1:]:
            if curves[method]:
                n, *rest = beside(curves[method], curves["dense"])
                strength = method.rpartition(", ")[2]
                shown = [values(curves["dense"]), values(curves[method])]
                relative = beside(changes[method], changes["dense"])[1:] if when == "fine-tuned" else ["", ""]
                cells = [*rest, *relative]
                rows.append([f"{100 * sparsity:g}%", when, strength, n, *shown, *cells])
    titles = ["sparsity", "", "strength", "seeds", "trained without", "trained with"]
    return [[*titles, "difference", "", "difference relative to before pruning", ""], *rows]


# ---- HyperSparse --------------------------------------------------------------------------------------------------------


def phases() -> list[Row]:
    """HyperSparse compared with other methods at equal epochs."""
    rows, found = [], runs("claim-hypersparse")
    suite = SUITES["claim-hypersparse"]
    assert isinstance(suite, Comparison)
    labels = {"L1-ART, 2 : 4 : 3": '`HyperSparse(penalty="l1")`', "gradual": "`MagnitudePruning`", "GraNet": "`GraNet`"}
    for sparsity in suite.sparsities:
        ours = by_seed(found, method=suite.methods[0], sparsity=sparsity)
        for method in suite.methods[1:]:
            other = by_seed(found, method=method, sparsity=sparsity)
            if ours.keys() & other.keys():
                n, *rest = beside(ours, other)
                shown = [n, values(other), values(ours)]
                rows.append([f"{100 * sparsity:g}%", labels[method], *shown, *rest, README.get(sparsity, "")])
    return [
        ["sparsity", "compared with", "seeds", "its accuracy", "`HyperSparse`", "difference", "", "published, larger"],
        *rows,
    ]


# ---- LpSS ---------------------------------------------------------------------------------------------------------------


def hoyer() -> list[Row]:
    """Hoyer sparsity of trained vectors by p: measured, predicted, and read from the authors' figure."""
    rows, found = [], runs("claim-hoyer")
    for p, figure in lp_sphere.FIGURE.items():
        some = pick(found, method=f"p = {p}")
        if some:
            measured = zip(*(run["hoyer per layer"] for run in some), strict=True)
            cells = [
                f"{statistics.mean(here):.3f}, {there:.3f}, {theirs:.3f}"
                for here, there, theirs in zip(measured, some[0]["predicted"], figure, strict=True)
            ]
            rows.append([p, str(len(some)), values(by_seed(some)), *cells])
    layers = [
        f"{kind}, {size}" for kind, size in zip(3 * ["conv."] + 3 * ["linear"], (25, 144, 288, 3136, 512, 64), strict=True)
    ]
    return [["p", "seeds", "test accuracy", *layers], *rows]


def spheres() -> list[Row]:
    """Results of the full published recipe."""
    suite, found = SUITES["paper-lp-sphere-fashion"], runs("paper-lp-sphere-fashion")
    assert isinstance(suite, Comparison)
    rows = []
    if pick(found, method="dense"):
        rows.append(
            ["0%", "dense", str(len(pick(found, method="dense"))), values(by_seed(found, method="dense")), "", "", ""]
        )
    for sparsity, published in zip(suite.sparsities, suite.published["LpSphere"], strict=True):
        static = by_seed(found, method="static", sparsity=sparsity)
        for method, label in (("static", "SGD, random static mask"), ("LpSphere", "`LpSphere`")):
            ours = by_seed(found, method=method, sparsity=sparsity)
            cells = beside(ours, static) if method == "LpSphere" else [str(len(ours)), "", ""]
            if ours:
                words = [f"{100 * sparsity:g}%", label, str(len(ours)), values(ours), *cells[1:]]
                rows.append([*words, f"{published:.2f}" if method == "LpSphere" else ""])
    return [["sparsity", "", "seeds", "test accuracy", "difference from the static mask", "", "published"], *rows]


CLAIMS = {
    "tamed": (tamed, RIGL),
    "unfavorable": (unfavorable, ("claim-layers",)),
    "norms": (norms, ("claim-norms-lenet5", "claim-norms-resnet8")),
    "imbalance": (imbalance, ("claim-norms-lenet5", "claim-norms-resnet8")),
    "forms": (forms, ("claim-cka",)),
    "prunable": (prunable, ("claim-prunable",)),
    "phases": (phases, ("claim-hypersparse",)),
    "hoyer": (hoyer, ("claim-hoyer",)),
    "spheres": (spheres, ("paper-lp-sphere-fashion",)),
}
"""Functions that make the tables, and the suites whose results they use."""


def progress(names: Sequence[str]) -> str:
    """A sentence that states how many runs of the suites are done."""
    options = Options(out=RESULTS)
    counts = []
    for name in names:
        whole, missing = len(list(SUITES[name].parts(options))), len(SUITES[name].missing(options))
        counts.append(f"{whole - missing} of {whole} runs of `{name}`")
    return "Done: " + ", ".join(counts) + "."
