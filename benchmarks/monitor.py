"""The overhead of SparsityMonitor in a training run that logs every step: `python -m benchmarks cost-monitor`.

ResNet-20 is trained once, pruned by magnitude, with a CSVLogger and `log_every_n_steps=1`. The monitor is switched on and
off from step to step. There are two numbers: the time of a step with the monitor relative to the neighboring step without
it; and the time inside its hooks, including loggers, relative to a step without it. The second is free of the noise between
steps. What the monitor reads at the end of an epoch (layers, zeros, churn, dead outputs, costs) and once at the start
(multiply-accumulates) is reported separately, also as a fraction of an epoch of 391 steps, which is the length for CIFAR-10
at this batch size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from benchmarks.record import Options, Parts
from benchmarks.trainers import Net
from benchmarks.turns import WARM_UP, Turns, Way, share, timed
from lightning_sparse import MagnitudePruning, SparsityMonitor

EPOCH = 391


class Logging(Net):
    """A network with a forward pass and a logged loss."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class StartToStart(Turns):
    """End each step where the next one starts, to include what loggers do after the last callback."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            super().end()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def end(self) -> None:
        pass


def step(model: str, rounds: int) -> dict[str, Any]:
    """Time steps with and without the monitor, and the time inside its hooks."""
    monitor, pruning = SparsityMonitor(table=False, report=False), MagnitudePruning(0.9, start=0.0)
    hooks: dict[str, list[float]] = {}
    on = [True]

    def watched(name: str) -> Callable[..., None]:
        hook, seconds = getattr(monitor, name), hooks.setdefault(name, [])

        def run(*args: Any) -> None:
            if on or name == "on_train_epoch_end":
                seconds.append(timed(lambda: hook(*args)))

        return run

    for name in ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"):
        setattr(monitor, name, watched(name))
    monitored = Way([pruning], enter=lambda: on.append(True), leave=on.clear)
    turns = StartToStart([pruning], lambda module: {"without": Way([pruning]), "with": monitored})
    with tempfile.TemporaryDirectory() as folder:
        logging = {"logger": CSVLogger(folder), "log_every_n_steps": 1, "callbacks": [monitor]}
        turns.fit(Logging(model), 128, 2 * (rounds + WARM_UP) + 1, **logging)
    table = turns.table("without")
    without = table["without"]["seconds"]
    first, *starts = hooks["on_train_batch_start"]
    inside = [start + end for start, end in zip(starts, hooks["on_train_batch_end"][1:], strict=True)]
    table["inside its hooks"] = share(inside, without)
    table[f"once per epoch, of {EPOCH} steps"] = share(hooks["on_train_epoch_end"], EPOCH * without)
    table[f"once per start, of {EPOCH} steps"] = share([first], EPOCH * without)
    return table


def parts(options: Options) -> Parts:
    model, name = ("quick", "perceptron") if options.quick else ("resnet20", "ResNet-20")
    yield (f"step, {name}, batch 128, logged every step",), partial(step, model, options.times(40, quick=20))
