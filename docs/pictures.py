"""The pictures of the README and of the method pages, in one style.

    python docs/pictures.py            all of them, some minutes on two cores
    python docs/pictures.py rigl set   only the runs of these overlays
    python docs/pictures.py front      only the chart of the README, from the committed results

A method's picture shows the sparsity over a run, and the masks of one layer at three moments. The network is a perceptron on
the digits that come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import statistics
import sys
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
from torch import Tensor

from lightning_sparse.data import Digits
from lightning_sparse.models import MLP, Classifier
from lightning_sparse.observe.palette import SERIES, THEMES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.overlays import overlay  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
EPOCHS, WIDTHS = 30, (64, 48)
INK, SOFT, RULE, PAPER, SPARSE = *(THEMES["light"][name] for name in ("ink", "soft", "rule", "card")), SERIES["light"][0]
STYLE = {"svg.hashsalt": "lightning_sparse", "svg.fonttype": "path", "font.size": 9, "text.color": INK}
FRONT = {
    "GraNet": "GraNet",
    "HyperSparse": "HyperSparse",
    "gradual": "MagnitudePruning",
    "RigL": "RigL",
    "SynFlow": "SynFlow",
    "random": "RandomSparsity",
}
"""What the chart of the README shows: names in the results, and as labels."""
MOMENTS = (0.1, 0.5, 1.0)
"""Shares of the run at which masks are drawn."""


class Recorder(L.Callback):
    """Notes after every step what share of the hidden weights is zero, and keeps the zeros of one layer at some moments."""

    def __init__(self) -> None:
        self.curve: list[tuple[float, float]] = []
        self.shots: dict[float, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        progress = trainer.global_step / trainer.estimated_stepping_batches
        weights = [weight.detach() for weight in pl_module.parameters() if weight.ndim == 2]
        total = sum(weight.numel() for weight in weights)
        self.curve.append((progress, 1 - sum(int(weight.count_nonzero()) for weight in weights) / total))
        for moment in MOMENTS:
            if moment not in self.shots and progress >= moment:
                self.shots[moment] = weights[1] != 0


def train(name: str) -> Recorder:
    """A run with the callbacks of an overlay."""
    L.seed_everything(1)
    module = Classifier(partial(MLP, hidden=WIDTHS), in_channels=1, image_size=8)
    recorder = Recorder()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*overlay(ROOT / "configs" / "methods" / f"{name}.yaml"), recorder],
    )
    trainer.fit(module, Digits(batch_size=64))
    return recorder


def draw(recorder: Recorder, file: Path) -> None:
    """The curve, and the masks beside it."""
    mpl.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    mpl.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, 1 + len(MOMENTS), figsize=(9, 2.3), width_ratios=[1.6, 1, 1, 1], layout="constrained")
    progress, sparsity = zip(*recorder.curve, strict=True)
    first, *others = axes
    first.plot([100 * p for p in progress], [100 * s for s in sparsity], color=SPARSE, linewidth=2)
    first.set(xlim=(0, 100), ylim=(-2, 102), xlabel="share of the run, %", ylabel="weights at zero, %")
    first.annotate(f"{100 * sparsity[-1]:.1f} %", (100, 100 * sparsity[-1]), (-4, -12 if sparsity[-1] > 0.5 else 6),
                   textcoords="offset points", ha="right", color=SPARSE, weight="bold")  # fmt: skip
    first.grid(color=RULE, linewidth=0.6)
    first.spines[["top", "right"]].set_visible(False)
    first.tick_params(colors=SOFT)
    for axis, moment in zip(others, MOMENTS, strict=True):
        mask = recorder.shots[moment]
        axis.imshow(mask, cmap=ListedColormap([PAPER, SPARSE]), vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"after {100 * moment:.0f} %: {100 * float(mask.float().mean()):.0f} % kept", fontsize=9, color=INK)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color(RULE)
    others[0].set_ylabel("second layer, outputs", color=SOFT)
    others[0].set_xlabel("inputs", color=SOFT)
    figure.savefig(file, metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(figure)


def draw_front(file: Path) -> None:
    """Accuracy against sparsity, from the committed results; the axes are spread where methods differ."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update(STYLE)
    runs = json.loads((ROOT / "benchmarks" / "results" / "desk-lenet300.json").read_text())["runs"]
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run["method"]][run["sparsity"]].append(100 * run["test"])
    figure, axis = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    sparsities = sorted(found["gradual"])
    places = [-math.log10(1 - sparsity) for sparsity in sparsities]
    dense = statistics.mean(found["dense"][0.0])
    axis.axhline(dense, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    axis.annotate(f"dense, {dense:.1f} %", (places[0], dense), (0, 4), textcoords="offset points", color=SOFT)
    ends: list[float] = []
    means = {name: [statistics.mean(found[name][sparsity]) for sparsity in sparsities] for name in FRONT}
    for number, (name, label) in enumerate(sorted(FRONT.items(), key=lambda item: -means[item[0]][-1])):
        color, mark = SERIES["light"][number], "os^DvP"[number]
        axis.plot(places, means[name], color=color, marker=mark, markersize=4.5, linewidth=1.8)
        ends.append(min(means[name][-1], ends[-1] - 1.15) if ends else means[name][-1])
        axis.annotate(
            label, (places[-1], ends[-1]), (8, 0), textcoords="offset points", va="center", color=color, weight="bold"
        )
    axis.set(xticks=places, xticklabels=[f"{100 * sparsity:g}" for sparsity in sparsities], ylim=(68, 91))
    axis.set(xlabel="weights removed, %", ylabel="test accuracy, %")
    axis.grid(axis="y", color=RULE, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=SOFT)
    figure.savefig(file, metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(figure)


def shown() -> list[str]:
    """The overlays whose pictures the method pages show."""
    pages = (ROOT / "docs" / "methods").glob("*.md")
    return sorted({name for page in pages for name in re.findall(r"\.\./pictures/(\w+)\.svg", page.read_text())})


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlays", nargs="*", help="names in configs/methods; all that the pages show by default")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    FOLDER.mkdir(exist_ok=True)
    for name in parser.parse_args().overlays or ["front", *shown()]:
        if name == "front":
            draw_front(FOLDER / "front.svg")
        else:
            draw(train(name), FOLDER / f"{name}.svg")
        print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    main()
