"""What moving connections costs: a step between updates beside static masking, and an update beside a dense step.

    python -m benchmarks.rewiring                     ResNet-18 steps; updates of ResNet-50 beside its training step
    python -m benchmarks.rewiring --quick             small, to see that it runs

Between updates: no masking, static random masks and each method take turns, step by step, on one model with the same masks
in one run; each step is compared with the static one of its round. An update: one of every method over all weights of a
ResNet-50, the copy of its gradients included, and one dense training step of the same network at batch 128 and 224 pixels,
in turns. On a CPU that step is made of micro-batches of 16, so that it fits into memory.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from benchmarks.competitors import Net
from benchmarks.record import ratios, save, show, timed
from lightning_sparse import SET, GraNet, RandomSparsity, RigL
from lightning_sparse.core import FINAL
from lightning_sparse.families import Masked, Rewiring

SPARSITY = 0.9
METHODS: dict[str, Callable[..., Rewiring]] = {"RigL": RigL, "SET": SET, "GraNet": GraNet}


def synchronize(trainer: L.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


def runner(callbacks: list[L.Callback], device: str, precision: Any, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )


# ---- between updates ------------------------------------------------------------------------------------------------


class Turns(L.Callback):
    """First of the callbacks: lets another method train the model before each step, by the same masks."""

    def __init__(self, owner: RandomSparsity) -> None:
        self.owner = owner
        self.ways: dict[str, Masked | None] = {"static masks": owner, "no masks": None}
        self.order: list[str] = []
        self.way = "static masks"
        self.started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        stations = self.owner.stations
        if batch_idx == 1:
            for name, make in METHODS.items():
                method = make(SPARSITY, every="100000 steps")
                method.chosen, method._stations, method.masks = self.owner.chosen, stations, self.owner.masks
                method._length, method.steps = self.owner._length, 1
                method.window.start, method.window.end, method._pruned = 0.0, 1.0, 0.5  # type: ignore[attr-defined]
                method._tick = FINAL  # no update is due, and every step finds that out anew
                self.ways[name] = method
                for owned in stations._owned.values():
                    owned[id(method)] = owned[id(self.owner)]
            self.order = list(self.ways)
        if batch_idx > 0:
            turn, place = divmod(batch_idx, len(self.order))
            self.way = (self.order if turn % 2 else self.order[::-1])[place]
            method = self.ways[self.way]
            stations.methods = [] if method is None else [method]
        synchronize(trainer)
        self.started = perf_counter()


class Stop(L.Callback):
    """Last of the callbacks: notes the time."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.times: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        synchronize(trainer)
        if batch_idx >= 3 * len(self.turns.ways):  # three rounds warm up
            self.times.setdefault(self.turns.way, []).append(perf_counter() - self.turns.started)


def steps(size: str, batch: int, rounds: int, device: str, precision: Any) -> dict[str, Any]:
    """Time of a step on which no update is due."""
    torch.manual_seed(0)
    static = RandomSparsity(SPARSITY)
    turns = Turns(static)
    stop = Stop(turns)
    ways = 2 + len(METHODS)
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * (ways * (rounds + 3))
    fit = runner([turns, static, stop], device, precision)
    fit.fit(Net(size), torch.utils.data.DataLoader(data, batch_size=None))
    names = list(turns.ways)
    seen = [dict(zip(names, times, strict=True)) for times in zip(*(stop.times[name] for name in names), strict=True)]
    return ratios(seen, "static masks")


# ---- an update ------------------------------------------------------------------------------------------------------


class Large(L.LightningModule):
    """ResNet-50 on few small images: what an update costs does not depend on them."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18() if quick else torchvision.models.resnet50()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Stopwatch(L.Callback):
    """Adds up the time that a method spends on the steps of its updates, reading gradients included."""

    def __init__(self, method: Rewiring) -> None:
        self.method = method
        self.seconds = 0.0
        self.updates: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name in ("before_step", "evolve"):
            setattr(self.method, name, self.watched(getattr(self.method, name), trainer))

    def watched(self, function: Any, trainer: L.Trainer) -> Any:
        def run(*args: Any) -> Any:
            synchronize(trainer)
            start = perf_counter()
            result = function(*args)
            synchronize(trainer)
            self.seconds += perf_counter() - start
            return result

        return run

    def on_train_batch_start(self, *args: Any) -> None:
        self.seconds, self.before = 0.0, self.method.updates

    def on_train_batch_end(self, *args: Any) -> None:
        if self.method.updates > self.before:
            self.updates.append(self.seconds)


def update(name: str, quick: bool, device: str) -> list[float]:
    """Seconds of each of four updates over all weights; the first warms up."""
    method = METHODS[name](SPARSITY, every="2 steps", end=1.0, drop_fraction=0.3)
    watch = Stopwatch(method)
    data = [(torch.rand(2, 3, 64, 64), torch.randint(0, 1000, (2,)))] * 10
    runner([watch, method], device, "32-true").fit(Large(quick), torch.utils.data.DataLoader(data, batch_size=None))
    return watch.updates[1:]


def dense_step(quick: bool, device: str) -> Callable[[], None]:
    """One training step of the dense network at batch 128."""
    net = Large(quick).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    batch, micro, side = (16, 16, 64) if quick else (128, 128 if device == "cuda" else 16, 224)
    images, labels = torch.rand(batch, 3, side, side, device=device), torch.randint(0, 1000, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        for x, y in zip(images.split(micro), labels.split(micro), strict=True):
            (net.training_step((x, y), 0) * micro / batch).backward()
        optimizer.step()

    return step


def updates(quick: bool, rounds: int, device: str) -> dict[str, Any]:
    """Updates of all methods beside a dense step."""
    step = dense_step(quick, device)
    if device == "cuda":
        step()
    seen = []
    for _ in range(rounds):
        times = {"dense training step": timed(step, device)}
        for name in METHODS:
            costs = sorted(update(name, quick, device))
            times[f"update of {name}"] = costs[len(costs) // 2]
        seen.append(times)
    return ratios(seen, "dense training step")


class Scales(L.Callback):
    """Weighs the gradients that a method holds when an update begins."""

    def __init__(self, method: Rewiring) -> None:
        self.method, self.most = method, 0

    def weigh(self) -> int:
        held = [gradient for gradient in self.method._gradients.values() if gradient is not None]
        return sum(gradient.numel() * gradient.element_size() for gradient in held)

    def on_train_start(self, *args: Any) -> None:
        evolve = self.method.evolve

        def weighed(position: Any) -> None:
            self.most = max(self.most, self.weigh())
            evolve(position)

        self.method.evolve = weighed  # type: ignore[method-assign]


def memory() -> dict[str, float]:
    """Bytes per weight that a method holds, always and on a step with an update."""
    table: dict[str, float] = {}
    for name, make in METHODS.items():
        method = make(SPARSITY, every="2 steps", end=1.0)
        scales = Scales(method)
        data = [(torch.rand(2, 3, 32, 32), torch.randint(0, 10, (2,)))] * 6
        fit = runner([scales, method], "cpu", "32-true")
        fit.fit(Net("quick"), torch.utils.data.DataLoader(data, batch_size=None))
        masks = sum(bits.numel() * bits.element_size() for bits in method.masks._bits.values())
        table[f"{name}, at all times"] = (masks + scales.weigh()) / method.masks.total
        table[f"{name}, gradients on a step with an update"] = scales.most / method.masks.total
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--update-rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size, rounds = ("quick", 12) if arguments.quick else ("resnet18", arguments.rounds)
    numbers: dict[str, Any] = {"memory, bytes per weight": memory()}
    for name, value in numbers["memory, bytes per weight"].items():
        print(f"  {name:50s} {value:.3f} bytes per weight")
    net = "ResNet-18, batch 16" if arguments.quick else "ResNet-50, batch 128, 224 pixels"
    numbers[f"update, {net}"] = updates(arguments.quick, arguments.update_rounds, arguments.device)
    show(f"update over all weights, {net}, {arguments.device}, ratio to a dense step", numbers[f"update, {net}"])
    title = f"step without an update, {size}, batch {arguments.batch}, {arguments.precision}, {arguments.device}"
    numbers[title] = steps(size, arguments.batch, rounds, arguments.device, arguments.precision)
    show(f"{title}, ratio to static masks", numbers[title])
    if arguments.save:
        save(f"rewiring_{arguments.device}", numbers)


if __name__ == "__main__":
    main()
