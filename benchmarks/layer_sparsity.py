"""Layer sparsity: deep networks that become shallow, and what they lose or win.

    python -m benchmarks desk-layers-simulation              the simulation of the note, E1: five seeds, every fit
    python -m benchmarks desk-layers-fashion --data DIR      ten-layer perceptrons on Fashion-MNIST
    python -m benchmarks desk-layers-conv --data DIR         a plain convolutional net without batch normalization

Every fit is one line of the result: plain, weight decay, with layer penalty (before and after merging), and the refits of
the merged network, warm and fresh. Errors are test errors after the last step; strengths are listed, none is chosen by
looking at the test set. Latency is measured in one run, both networks taking turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import have_data
from benchmarks.record import Options, Parts, Runs, Trainings
from benchmarks.trainers import quiet
from lightning_sparse import LayerSparsity, merge_layers
from lightning_sparse.data import Digits, FashionMNIST, Teacher
from lightning_sparse.export import MergeReport, fresh_start, pad_in_front
from lightning_sparse.models import MLP, Classifier, Regressor

DECAY = 1e-3
"""Times the sum of squared weights: of all fits but the plain ones."""


def plain_convolutions(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Eight convolutions, four per resolution, padding in front of each chain; no normalization."""
    layers: list[nn.Module] = []
    channels = in_channels
    for width in (8, 16):
        for _ in range(4):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return pad_in_front(net)


@dataclass(frozen=True)
class Fits:
    """What is fitted, and how long.

    Args:
        data: made with a seed.
        module: the class of the module.
        network: called with (outputs, channels, size).
        rate: of Adam.
        epochs: of every fit.
        strengths: r, a fit each.
        allow_growth: of merges; kernels of convolutions grow.
    """

    data: Callable[..., Any]
    module: type[L.LightningModule]
    network: Callable[..., nn.Module]
    rate: float
    epochs: int
    strengths: Sequence[float]
    allow_growth: bool = False

    def fit(self, module: L.LightningModule, data: Any, decay: float | None, strength: float, quick: bool) -> float:
        """Seconds of a fit."""
        method = [] if decay is None else [LayerSparsity(strength=strength, scale_decay=decay)]
        short: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 3} if quick else {"max_epochs": self.epochs}
        trainer = quiet(method, limit_val_batches=0, **short)
        start = perf_counter()
        trainer.fit(module, data)
        return round(perf_counter() - start, 1)

    def runs(self, seed: int, root: str, quick: bool) -> Runs:
        """All fits of one seed."""
        found: Runs = []
        folder = {"root": root} if self.module is Classifier else {}
        data = Digits(seed=seed) if quick and folder else self.data(seed=seed, **folder)
        data.setup("fit")
        rows: list[tuple[str, float | None]] = [("plain", None), ("weight decay", 0.0)]
        rows += [("layer penalty", strength) for strength in self.strengths[: 1 if quick else None]]
        for name, strength in rows:
            L.seed_everything(seed, verbose=False)
            shape = data.num_classes, data.in_channels, data.image_size
            module = self.module(self.network, *shape, partial(torch.optim.Adam, lr=self.rate))
            seconds = self.fit(module, data, None if strength is None else DECAY, strength or 0.0, quick)
            row: dict[str, Any] = {"fit": name, "strength": strength, "seconds": seconds}
            if name != "layer penalty":
                found.append(row | {"error": test_error(module, data), "depth": None})
                continue
            x = next(iter(data.test_dataloader()))[0][:128]
            merged, report = merge_layers(module.cpu(), x, allow_growth=self.allow_growth)
            before, after = test_error(module, data), test_error(merged, data)
            found.append(row | {"error": before, "merged error": after, **plain_values(report)})
            for start in ("warm", "fresh"):
                L.seed_everything(seed + 1000, verbose=False)
                refit = copy.deepcopy(merged) if start == "warm" else fresh_start(copy.deepcopy(merged))
                row["seconds"] = self.fit(refit.train(), data, DECAY, 0.0, quick)
                row |= {"fit": f"refit, {start}", "error": test_error(refit, data), "depth": report.depth}
                found.append(dict(row))
        return found


def perceptron(width: int, depth: int) -> Callable[..., nn.Module]:
    return lambda *shape: MLP(*shape, hidden=[width] * (depth - 1), kaiming=True)


def teacher(share: float = 1 / 3, depth: int = 8, width: int = 20) -> Fits:
    data = partial(Teacher, signed=share, depth=depth, width=width, passes=150)
    return Fits(data, Regressor, perceptron(width, depth), 3e-3, 10, (0.1, 0.3, 1.0))


SIMULATION = {
    "1/3 of inner layers signed": teacher(),
    "none signed": teacher(0.0),
    "all signed": teacher(1.0),
    "twelve layers": teacher(depth=12),
    "width 40": teacher(width=40),
}
FASHION = {"ten layers of 100": Fits(FashionMNIST, Classifier, perceptron(100, 10), 1e-3, 12, (0.1, 0.3))}
CONV = {"eight convolutions": Fits(FashionMNIST, Classifier, plain_convolutions, 1e-3, 3, (0.03, 0.1, 0.3, 1.0), True)}


def test_error(module: L.LightningModule, data: Any) -> float:
    """Mean squared error, or the share of wrong labels."""
    total, count = 0.0, 0
    module.eval()
    with torch.no_grad():
        for x, y in data.test_dataloader():
            out: Tensor = module(x.to(module.device)).cpu()
            wrong = (out.argmax(1) != y).sum() if y.dtype == torch.long else F.mse_loss(out, y, reduction="sum")
            total, count = total + float(wrong), count + y.numel()
    return total / count


def plain_values(report: MergeReport) -> dict[str, Any]:
    """What a report says."""
    names = ("depth", "parameters", "macs", "milliseconds", "change", "collapsed")
    levels = {level: sum(v.level == level and v.merged for v in report.layers) for level in ("certified", "near")}
    ratios = {v.layer: v.ratio for v in report.layers if v.ratio is not None}
    return {name: getattr(report, name) for name in names} | {"merged": levels, "ratios": ratios}


@dataclass(frozen=True)
class Layers(Trainings):
    """A part is all fits of one setting and seed.

    Args:
        name: of the suite and of its file.
        settings: by name.
        seeds: of each.
    """

    settings: Mapping[str, Fits]
    seeds: int
    by: ClassVar[Sequence[str]] = ("setting", "fit", "strength")
    values: ClassVar[Sequence[str]] = ("error", "merged error", "depth")

    def parts(self, options: Options) -> Parts:
        for setting, fits in self.settings.items():
            for seed in range(1 if options.quick else self.seeds):
                yield {"setting": setting, "seed": seed}, partial(fits.runs, seed, options.data, options.quick)

    def recipe(self, options: Options) -> dict[str, Any]:
        return {"weight decay": DECAY}

    def prepare(self, options: Options) -> None:
        super().prepare(options)
        if self.settings is not SIMULATION:
            have_data(FashionMNIST, options)
