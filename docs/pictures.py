"""The pictures of the README and of the site, in one style.

    python docs/pictures.py            all of them, some minutes on two cores
    python docs/pictures.py rigl set   only the runs of these overlays
    python docs/pictures.py report     only the report that the quickstart writes, as a browser shows it
    python docs/pictures.py front      only the chart of the README, from the committed results

A method's picture shows the sparsity over a run, and the masks of one layer at three moments. The network is a perceptron on
the digits that come with scikit-learn, so nothing is downloaded. `report` and `comparison` need Chromium.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import torch
from torch import Tensor

from lightning_sparse import CKARegularization, LayerSparsity, MagnitudePruning, RigL, SparsityMonitor
from lightning_sparse.data import Digits, Teacher
from lightning_sparse.functional import distillation_loss, round_symmetric
from lightning_sparse.models import MLP, Classifier, Regressor, ResNet
from lightning_sparse.observe import SimilarityMap
from lightning_sparse.observe.palette import THEMES
from lightning_sparse.observe.report import find_reports, read_report, write_report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.figures import FIGURES  # noqa: E402
from tests.helpers.browser import CHROMIUM, look  # noqa: E402
from tests.helpers.overlays import Sparsened, overlay  # noqa: E402

mpl.use("svg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

DOCS = ROOT / "docs"
FOLDER = DOCS / "pictures"
EPOCHS, WIDTHS = 30, (64, 48)
INK, SOFT, RULE, PAPER = (THEMES["light"][name] for name in ("ink", "soft", "rule", "card"))
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
STARTS_SPARSE = {"keep_sparsity": "magnitude"}
"""Overlays that work on a network which is sparse already, and the one that makes it so."""
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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


class Distance(L.Callback):
    """Notes after every step how far the predictions for new images are from those of the network at the start."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.curve: list[tuple[float, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = self._logits(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        progress = trainer.global_step / trainer.estimated_stepping_batches
        self.curve.append((progress, float(distillation_loss(self._logits(pl_module), self.start, temperature=1.0))))

    @torch.no_grad()
    def _logits(self, module: L.LightningModule) -> Tensor:
        was_training = module.training
        logits: Tensor = module.eval()(self.images)
        module.train(was_training)
        return logits


def train(name: str, *observers: L.Callback, start: L.LightningModule | None = None) -> L.LightningModule:
    """A run with the callbacks of an overlay; an empty name is a dense one."""
    L.seed_everything(1)
    module = copy.deepcopy(start) or Classifier(partial(MLP, hidden=WIDTHS), in_channels=1, image_size=8)
    found = overlay(ROOT / "configs" / "methods" / f"{name}.yaml") if name else []
    methods = [callback for callback in found if not isinstance(callback, Sparsened)]
    L.Trainer(max_epochs=EPOCHS, callbacks=[*methods, *observers], **QUIET).fit(module, Digits(batch_size=64))  # type: ignore[arg-type]
    return module


def save(figure: Any, file: Path) -> None:
    """Without a date, so that the same picture is the same file."""
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def draw_sparsity(axis: Any, recorder: Recorder) -> None:
    """What share of the weights is zero, over the run."""
    progress, sparsity = zip(*recorder.curve, strict=True)
    axis.plot([100 * p for p in progress], [100 * s for s in sparsity])
    axis.set(xlim=(0, 100), ylim=(-2, 102), xlabel="share of the run, %", ylabel="weights at zero, %")
    axis.annotate(f"{100 * sparsity[-1]:.1f} %", (100, 100 * sparsity[-1]), (-4, -12 if sparsity[-1] > 0.5 else 6),
                  textcoords="offset points", ha="right", color="C0", weight="bold")  # fmt: skip


def draw_method(name: str, file: Path) -> None:
    """The curve, and the masks beside it."""
    recorder = Recorder()
    train(name, recorder, start=train(STARTS_SPARSE[name]) if name in STARTS_SPARSE else None)
    figure, (first, *others) = plt.subplots(1, 1 + len(MOMENTS), figsize=(9, 2.3), width_ratios=[1.6, 1, 1, 1])
    draw_sparsity(first, recorder)
    for axis, moment in zip(others, MOMENTS, strict=True):
        mask = recorder.shots[moment]
        axis.imshow(mask, cmap=ListedColormap([PAPER, "C0"]), vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"after {100 * moment:.0f} %: {100 * float(mask.float().mean()):.0f} % kept", loc="center")
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set(visible=True, color=RULE)
    others[0].set_ylabel("second layer, outputs", color=SOFT)
    others[0].set_xlabel("inputs", color=SOFT)
    save(figure, file)


def draw_distillation(file: Path) -> None:
    """The curve, and how far the predictions are from the teacher's, with the callback and without."""
    data = Digits()
    data.setup("test")
    dense, images = train(""), torch.cat([images for images, _ in data.test_dataloader()])
    recorder, with_it, without = Recorder(), Distance(images), Distance(images)
    train("distillation", recorder, with_it, start=dense)
    train("magnitude", without, start=dense)
    figure, (first, second) = plt.subplots(1, 2, figsize=(9, 2.3), width_ratios=[1, 1.6])
    draw_sparsity(first, recorder)
    for color, label, seen, lift in (("C1", "pruning alone", without, 5), ("C0", "with Distillation", with_it, -5)):
        places, values = zip(*seen.curve, strict=True)
        second.plot([100 * place for place in places], values, color=color)
        second.annotate(label, (100, values[-1]), (6, lift), textcoords="offset points", va="center", color=color,
                        weight="bold", annotation_clip=False)  # fmt: skip
    second.set(xlim=(0, 100), ylim=(0, None), xlabel="share of the run, %")
    second.set_title("distance of the predictions from the teacher's (KL divergence, nats)")
    save(figure, file)


def draw_grid(file: Path) -> None:
    """The curve, and how far the weights of a layer are from the codes of int8, with the callback and without."""
    recorder = Recorder()
    aware, plain = train("quantization_aware", recorder), train("magnitude")
    figure, (first, *others) = plt.subplots(1, 3, figsize=(9, 2.3), width_ratios=[1.2, 1, 1])
    draw_sparsity(first, recorder)
    for axis, module, title, color in (
        (others[0], plain, "pruning alone", "C1"),
        (others[1], aware, "with QuantizationAware", "C0"),
    ):
        weight = [weight.detach() for weight in module.parameters() if weight.ndim == 2][1]
        codes = 127 * weight / weight.abs().amax(1, keepdim=True)
        assert module is plain or torch.equal(weight, round_symmetric(weight)), "the weights are on the grid of int8"
        errors = (codes - codes.round())[weight != 0]
        axis.hist(errors.tolist(), bins=[(i - 10.5) / 20 for i in range(22)], color=color)
        axis.set_title(title, color=color, weight="bold")
        axis.set(xlim=(-0.55, 0.55), xlabel="distance from an int8 code, steps")
    others[0].set_ylabel("weights left")
    save(figure, file)


def draw_layers(file: Path) -> None:
    """How far each layer is from linear, over a run with data that come from a network of few layers."""
    L.seed_everything(0)
    data, method = Teacher(passes=50, seed=0), LayerSparsity(strength=0.3)
    module = Regressor(partial(MLP, hidden=[20] * 7, kaiming=True), 1, data.in_channels, data.image_size)
    L.Trainer(max_epochs=EPOCHS, limit_val_batches=0, callbacks=[method], **QUIET).fit(module, data)  # type: ignore[arg-type]
    figure, axis = plt.subplots(figsize=(9, 2.6))
    places = [100 * epoch / EPOCHS for epoch in range(EPOCHS + 1)]
    for number, layer in enumerate(method.history[-1]["ratios"]):
        ratios = [entry["ratios"][layer] for entry in method.history]
        axis.semilogy(places, ratios, color=f"C{number}", label=f"layer {number + 2} of 8")
    axis.set(xlim=(0, 100), ylim=(1e-5, 2), xlabel="share of the run, %", ylabel="negative part, share")
    axis.set_title("a line that leaves the chart is a layer that has become linear")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, file)


def draw_similarity(file: Path) -> None:
    """How similar the blocks of a residual network are, trained without the penalty and with it."""
    data, strengths = Digits(batch_size=64), (0.0, 0.1)
    figure, axes = plt.subplots(1, len(strengths), figsize=(9, 3))
    for axis, strength in zip(axes, strengths, strict=True):
        L.seed_everything(0)
        module = Classifier(partial(ResNet, depth=14, width=0.5), in_channels=1, image_size=8)
        callbacks = [CKARegularization(strength=strength, every_n_batches=1)]
        L.Trainer(max_epochs=6, limit_val_batches=0, callbacks=[*callbacks], **QUIET).fit(module, data)  # type: ignore[arg-type]
        seen = SimilarityMap(figure=False)
        L.Trainer(callbacks=[seen], **QUIET).validate(module, data, verbose=False)  # type: ignore[arg-type]
        image = axis.imshow(seen.metric.compute(), vmin=0, vmax=1)
        blocks = [name.removeprefix("network.stages.") for name in seen.metric.names]
        axis.set_xticks(range(len(blocks)), blocks)
        axis.set_yticks(range(len(blocks)), blocks)
        axis.set(title=f"strength {strength:g}", xlabel="stage.block")
        axis.grid(visible=False)
    axes[0].set_ylabel("stage.block")
    figure.colorbar(image, ax=axes, label="CKA on the validation images")
    save(figure, file)


def draw_front(file: Path) -> None:
    """Accuracy against sparsity, from the committed results; the axes are spread where methods differ."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "desk-lenet300.json").read_text())["runs"]
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run["method"]][run["sparsity"]].append(100 * run["test"])
    figure, axis = plt.subplots(figsize=(7.2, 3.2))
    sparsities = sorted(found["gradual"])
    places = [-math.log10(1 - sparsity) for sparsity in sparsities]
    dense = statistics.mean(found["dense"][0.0])
    axis.axhline(dense, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    axis.annotate(f"dense, {dense:.1f} %", (places[0], dense), (0, 4), textcoords="offset points", color=SOFT)
    ends: list[float] = []
    means = {name: [statistics.mean(found[name][sparsity]) for sparsity in sparsities] for name in FRONT}
    for number, (name, label) in enumerate(sorted(FRONT.items(), key=lambda item: -means[item[0]][-1])):
        color, mark = f"C{number}", "os^DvP"[number]
        axis.plot(places, means[name], color=color, marker=mark)
        ends.append(min(means[name][-1], ends[-1] - 1.15) if ends else means[name][-1])
        axis.annotate(
            label, (places[-1], ends[-1]), (8, 0), textcoords="offset points", va="center", color=color, weight="bold"
        )
    axis.set(xticks=places, xticklabels=[f"{100 * sparsity:g}" for sparsity in sparsities], ylim=(68, 91))
    axis.set(xlabel="weights removed, %", ylabel="test accuracy, %")
    save(figure, file)


def shoot_report(file: Path) -> None:
    """The report of the quickstart, by day."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_sparse.cli", "fit", "--config=quickstart"]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, check=True, stdout=subprocess.DEVNULL)
        look(next(Path(folder).rglob("report.html")), "return {}", 1280, 1005, "light", file)


def shoot_comparison(file: Path) -> None:
    """One page for runs of two methods, by night."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            for method in (MagnitudePruning, RigL):
                for sparsity in (0.9, 0.95, 0.98):
                    _observed_run(Path(folder) / f"{method.__name__} {sparsity} {seed}", seed, method(sparsity))
            _observed_run(Path(folder) / f"dense {seed}", seed)
        page = Path(folder) / "comparison.html"
        write_report(page, *(run for found in find_reports([folder]) for run in read_report(found)))
        look(page, "return {}", 1280, 920, "dark", file)


def _observed_run(folder: Path, seed: int, *methods: L.Callback) -> None:
    L.seed_everything(seed)
    trainer = L.Trainer(
        max_epochs=20,
        default_root_dir=folder,
        callbacks=[*methods, SparsityMonitor(table=False)],
        **QUIET,  # type: ignore[arg-type]
    )
    data = Digits(batch_size=64)
    module = Classifier(partial(ResNet, depth=8), in_channels=1, image_size=8)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)


def shown() -> list[str]:
    """The overlays whose pictures the method pages show."""
    pages = (DOCS / "methods").glob("*.md")
    return sorted({name for page in pages for name in re.findall(r"\.\./pictures/(\w+)\.svg", page.read_text())})


OTHERS: dict[str, tuple[Callable[[Path], None], Path]] = {
    "front": (draw_front, FOLDER / "front.svg"),
    "distillation": (draw_distillation, FOLDER / "distillation.svg"),
    "quantization_aware": (draw_grid, FOLDER / "quantization_aware.svg"),
    "layer_sparsity": (draw_layers, FOLDER / "layer_sparsity.svg"),
    "cka": (draw_similarity, FOLDER / "cka.svg"),
    "report": (shoot_report, DOCS / "report.png"),
    "comparison": (shoot_comparison, DOCS / "comparison.png"),
    **{name.removesuffix(".png"): (make, DOCS / name) for name, make in FIGURES.items()},
}
"""Pictures that are not a curve with its masks: how they are made, and where they go."""


def main() -> None:
    """Train and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    overlays = sorted(file.stem for file in (ROOT / "configs" / "methods").glob("*.yaml"))
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"an overlay in configs/methods, or one of {', '.join(OTHERS)}"
    )
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in (*overlays, *OTHERS)]:
        parser.error(f"no picture {', '.join(unknown)}; choose from {', '.join([*OTHERS, *overlays])}.")
    names = names or sorted({*OTHERS, *shown()})
    if CHROMIUM is None and {"report", "comparison"} & {*names}:
        parser.error("report and comparison are pictures of pages in a browser; install Chromium, or name the others.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    plt.style.use("lightning_sparse.observe.figures")
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        make, file = OTHERS.get(name, (partial(draw_method, name), FOLDER / f"{name}.svg"))
        make(file)
        print(file.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
