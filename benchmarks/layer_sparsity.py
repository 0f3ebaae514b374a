"""Layer sparsity: deep networks that become shallow, and how their error changes.

    python -m benchmarks desk-layers-simulation              simulation E1 of the note: five seeds, every fit
    python -m benchmarks claim-layers                        ten seeds, teachers without a layer that could be merged
    python -m benchmarks desk-layers-fashion --data DIR      ten-layer perceptrons on Fashion-MNIST
    python -m benchmarks desk-layers-conv --data DIR         a plain convolutional network without batch normalization

Each fit is one entry of the results: plain, with weight decay, with the layer penalty (before and after merging), and the
refits of the merged network, warm and fresh. Errors are test errors after the last step. Results are listed for every
strength. Where one strength is selected, it is by the validation error of the same seed, never by the test set. Latencies of
both networks are measured interleaved, in one run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from time import perf_counter
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import have_data
from benchmarks.record import Options, Parts, Runs, Trainings
from benchmarks.trainers import Pause, quiet
from lightning_sparse import LayerSparsity, merge_layers
from lightning_sparse.data import Digits, FashionMNIST, Teacher
from lightning_sparse.export import MergeReport, fresh_start, pad_in_front
from lightning_sparse.models import MLP, Classifier, Regressor

DECAY = 1e-3
"""Factor of the sum of squared weights in all fits, except plain fits and fits that vary it."""


def plain_convolutions(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Eight convolutions, four per resolution, with padding in front of each chain and without normalization."""
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
    """The fits of one setting.

    Args:
        data: function that makes the data from a seed.
        module: class of the LightningModule.
        network: function that makes the network from (outputs, channels, size).
        rate: learning rate of Adam.
        epochs: number of epochs of every fit.
        strengths: values of r, with one fit for each.
        allow_growth: whether layers are merged if this adds parameters; kernels of convolutions grow.
        decays: values of c, with one fit without a penalty for each.
        tuned: whether to penalize at the decay that is best on validation data, and to refit only the network of the best
            strength; otherwise the usual decay is used and all networks are refit.
    """

    data: Callable[..., Any]
    module: type[L.LightningModule]
    network: Callable[..., nn.Module]
    rate: float
    epochs: int
    strengths: Sequence[float]
    allow_growth: bool = False
    decays: Sequence[float] = (DECAY,)
    tuned: bool = False

    def fit(self, module: L.LightningModule, data: Any, decay: float | None, strength: float, options: Options) -> float:
        """Train one fit and return its duration in seconds."""
        method: list[L.Callback] = [] if decay is None else [LayerSparsity(strength=strength, scale_decay=decay)]
        short: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 3} if options.quick else {"max_epochs": self.epochs}
        trainer = quiet([*method, Pause(options.stop)], limit_val_batches=0, **short)
        start = perf_counter()
        trainer.fit(module, data)
        return round(perf_counter() - start, 1)

    def runs(self, seed: int, options: Options) -> Runs:
        """Run all fits of one seed."""
        found: Runs = []
        quick = options.quick
        folder = {"root": options.data} if self.module is Classifier else {}
        data = Digits(seed=seed) if quick and folder else self.data(seed=seed, **folder)
        data.setup("fit")
        x = next(iter(data.test_dataloader()))[0][:128]

        def fitted(name: str, decay: float | None, strength: float | None) -> tuple[L.LightningModule, dict[str, Any]]:
            L.seed_everything(seed, verbose=False)
            shape = data.num_classes, data.in_channels, data.image_size
            module = self.module(self.network, *shape, partial(torch.optim.Adam, lr=self.rate))
            seconds = self.fit(module, data, decay, strength or 0.0, options)
            row = {"fit": name, "strength": strength, "decay": decay, "seconds": seconds}
            return module.cpu(), row | errors(module, data)

        found.append(fitted("plain", None, None)[1])
        for decay in self.decays[: 1 if quick else None]:
            module, row = fitted("weight decay", decay, 0.0)
            found.append(row | {"depth": merge_layers(module, x, allow_growth=self.allow_growth)[1].depth})
        decay = min(found[1:], key=itemgetter("val"))["decay"] if self.tuned else DECAY
        merges: list[tuple[L.LightningModule, dict[str, Any]]] = []
        for strength in self.strengths[: 1 if quick else None]:
            module, row = fitted("layer penalty", decay, strength)
            merged, report = merge_layers(module, x, allow_growth=self.allow_growth)
            after = {f"merged {what}": value for what, value in errors(merged, data).items()}
            merges.append((merged, row | after | plain_values(report)))
        found += [row for _, row in merges]
        for merged, row in [min(merges, key=lambda merge: merge[1]["merged val"])] if self.tuned else merges:
            for start in ("warm", "fresh"):
                L.seed_everything(seed + 1000, verbose=False)
                refit = copy.deepcopy(merged) if start == "warm" else fresh_start(copy.deepcopy(merged))
                seconds = self.fit(refit.train(), data, decay, 0.0, options)
                kept = {what: row[what] for what in ("strength", "decay", "depth")}
                found.append({"fit": f"refit, {start}", **kept, "seconds": seconds, **errors(refit, data)})
        return found


def perceptron(width: int, depth: int) -> Callable[..., nn.Module]:
    return lambda *shape: MLP(*shape, hidden=[width] * (depth - 1), kaiming=True)


def teacher(share: float = 1 / 3, depth: int = 8, width: int = 20, **grids: Any) -> Fits:
    data = partial(Teacher, signed=share, depth=depth, width=width, passes=150)
    return Fits(data, Regressor, perceptron(width, depth), 3e-3, 10, **{"strengths": (0.1, 0.3, 1.0), **grids})


SIMULATION = {
    "1/3 of inner layers signed": teacher(),
    "none signed": teacher(0.0),
    "all signed": teacher(1.0),
    "twelve layers": teacher(depth=12),
    "width 40": teacher(width=40),
}
GRIDS: dict[str, Any] = {"strengths": (0.1, 0.3, 1.0, 3.0), "decays": (3e-3, 1e-2, 3e-2, 1e-1), "tuned": True}
"""Weight decay is tuned first, without the penalty. The penalty then has to improve on it."""
SIGNED = {
    "eight layers": teacher(1.0, **GRIDS),
    "width 40": teacher(1.0, width=40, **GRIDS),
    "twelve layers": teacher(1.0, depth=12, **GRIDS),
}
"""Teachers whose inner layers all have weights of both signs. The student networks have the same shapes."""
FASHION = {"ten layers of 100": Fits(FashionMNIST, Classifier, perceptron(100, 10), 1e-3, 12, (0.1, 0.3))}
CONV = {"eight convolutions": Fits(FashionMNIST, Classifier, plain_convolutions, 1e-3, 3, (0.03, 0.1, 0.3, 1.0), True)}


def errors(module: L.LightningModule, data: Any) -> dict[str, float]:
    """Errors on test and validation data."""
    return {"error": mean_error(module, data.test_dataloader()), "val": mean_error(module, data.val_dataloader())}


def mean_error(module: L.LightningModule, batches: Iterable[Any]) -> float:
    """The mean squared error, or the fraction of wrong labels."""
    total, count = 0.0, 0
    module.eval()
    with torch.no_grad():
        for x, y in batches:
            out: Tensor = module(x.to(module.device)).cpu()
            wrong = (out.argmax(1) != y).sum() if y.dtype == torch.long else F.mse_loss(out, y, reduction="sum")
            total, count = total + float(wrong), count + y.numel()
    return total / count


def plain_values(report: MergeReport) -> dict[str, Any]:
    """The values of a report that are stored in the results."""
    names = ("depth", "parameters", "macs", "milliseconds", "change", "collapsed")
    levels = {level: sum(v.level == level and v.merged for v in report.layers) for level in ("certified", "near")}
    ratios = {v.layer: v.ratio for v in report.layers if v.ratio is not None}
    return {name: getattr(report, name) for name in names} | {"merged": levels, "ratios": ratios}


@dataclass(frozen=True)
class Layers(Trainings):
    """A suite of layer-sparsity fits. Each part is all fits of one setting and seed.

    Args:
        name: name of the suite and its result file.
        settings: settings by name.
        seeds: number of seeds per setting.
    """

    settings: Mapping[str, Fits]
    seeds: int
    by: ClassVar[Sequence[str]] = ("setting", "fit", "strength", "decay")
    values: ClassVar[Sequence[str]] = ("error", "merged error", "depth")

    def parts(self, options: Options) -> Parts:
        for setting, fits in self.settings.items():
            for seed in range(1 if options.quick else self.seeds):
                yield {"setting": setting, "seed": seed}, partial(fits.runs, seed, options)

    def recipe(self, options: Options) -> dict[str, Any]:
        return {"weight decay": DECAY}

    def prepare(self, options: Options) -> None:
        super().prepare(options)
        if any(fits.module is Classifier for fits in self.settings.values()):
            have_data(FashionMNIST, options)
