"""What SparsityMonitor adds to a training that logs every step.

    python -m benchmarks.monitor                      ResNet-20, batch 128, 32x32 images
    python -m benchmarks.monitor --quick              a perceptron, to see that it runs

One training of one model, pruned by magnitude, with a CSVLogger and `log_every_n_steps=1`; the monitor is switched on and
off from step to step. Two numbers: the step with it over the step without it, by pairs of neighbors; and the time inside
its hooks, loggers included, as a part of the step without it, which the noise of other steps cannot blur. What it reads at
the end of an epoch (layers, zeros, churn, dead outputs, costs) and once at the start (multiply-accumulates) is given by
itself, and as a part of an epoch of 391 steps, as CIFAR-10 has at this batch size.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import ratios, save, show
from lightning_sparse import MagnitudePruning, SparsityMonitor
from lightning_sparse.models import ResNet

WARM_UP = 6
EPOCH = 391


class Net(L.LightningModule):
    """The network, SGD with momentum."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        small = nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 10))
        self.net = small if quick else ResNet(10, 3, 32, depth=20)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


class Clock(L.Callback):
    """First of the callbacks: switches the monitor on and off, and times the steps."""

    def __init__(self, monitor: SparsityMonitor) -> None:
        self.on, self.started = True, 0.0
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.hooks: dict[str, list[float]] = {"step": [], "epoch": [], "start": []}
        for name, kind in (("on_train_batch_end", "step"), ("on_train_epoch_end", "epoch"), ("_begin", "start")):
            setattr(monitor, name, self.watched(getattr(monitor, name), kind))

    def watched(self, function: Any, kind: str) -> Any:
        def run(*args: Any) -> None:
            if kind != "step" or self.on:
                start = perf_counter()
                function(*args)
                self.hooks[kind].append(perf_counter() - start)

        return run

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        now = perf_counter()  # from start to start, so that nothing is missed
        if batch_idx > WARM_UP:
            self.steps[self.on].append(now - self.started)
        pair, place = divmod(batch_idx, 2)
        self.on = bool(place) != bool(pair % 2)
        self.started = perf_counter()


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    monitor = SparsityMonitor(table=False, report=False)
    clock = Clock(monitor)
    steps = 2 * rounds + WARM_UP + 2
    data = [(torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,)))] * steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock, MagnitudePruning(0.9, start=0.0), monitor],
        )
        trainer.fit(Net(quick), torch.utils.data.DataLoader(data, batch_size=None))
    pairs = [{"without": a, "with": b} for a, b in zip(clock.steps[False], clock.steps[True], strict=False)]
    table = ratios(pairs, "without")
    step = table["without"]["seconds"]
    inside = sorted(clock.hooks["step"])
    table["inside its hooks"] = {
        "ratio": statistics.median(inside) / step,
        "low": inside[len(inside) // 4] / step,
        "high": inside[-1 - len(inside) // 4] / step,
        "seconds": statistics.median(inside),
    }
    for kind in ("epoch", "start"):
        [seconds] = clock.hooks[kind]
        share = seconds / (EPOCH * step)
        table[f"once per {kind}, of {EPOCH} steps"] = {"ratio": share, "low": share, "high": share, "seconds": seconds}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = measure(arguments.quick, 20 if arguments.quick else arguments.rounds)
    title = f"step, {'perceptron' if arguments.quick else 'ResNet-20'}, batch 128, logged every step"
    show(f"{title}, ratio to the step without SparsityMonitor", table)
    if arguments.save:
        save("monitor_cpu", {title: table})


if __name__ == "__main__":
    main()
