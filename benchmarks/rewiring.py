"""The cost of rewiring: `python -m benchmarks cost-rewiring`.

Between updates: training without masks, with static random masks and with each method is interleaved step by step, on one
model with the same masks. Each step is compared with the static step of its round. Updates: one update of every method over
all weights of a ResNet-50, including the copy of its gradients, is interleaved with a dense training step of the same
network at batch 128 and 224 pixels. On a CPU, this step is split into micro-batches of 16 to fit into memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch

from benchmarks import loop
from benchmarks.record import Options, Parts
from benchmarks.trainers import Net, quiet, random_images
from benchmarks.turns import WARM_UP, Turns, Way, held, in_turns, now, ratios
from lightning_sparse import SET, GraNet, RandomSparsity, RigL
from lightning_sparse.families import Rewiring

SPARSITY = 0.9


def _granet(sparsity: float, end: float = 1.0, **options: Any) -> GraNet:
    """GraNet with the argument names of the other methods: `end` is where rewiring ends."""
    return GraNet(sparsity, rewiring_end=end, **options)


METHODS: dict[str, Callable[..., Rewiring]] = {"RigL": RigL, "SET": SET, "GraNet": _granet}


def steps(model: str, batch: int, rounds: int, device: str = "cpu", precision: Any = "32-true") -> dict[str, Any]:
    """Time steps without an update; every step still checks whether one is due."""
    static = RandomSparsity(SPARSITY)

    def make(module: Any) -> dict[str, Way]:
        ways = {"static masks": Way([static]), "no masks": Way()}
        for name, method in METHODS.items():
            moving = method(SPARSITY, every="100000 steps")
            loop.stand_in(moving, static)
            ways[name] = Way([moving])
        return ways

    turns = Turns([static], make, device=device)
    turns.fit(Net(model), batch, (2 + len(METHODS)) * (WARM_UP + rounds), precision=precision)
    return turns.table("static masks")


class Stopwatch(L.Callback):
    """Measure the seconds that a method spends on steps with an update, including reading gradients."""

    def __init__(self, method: Rewiring, device: str) -> None:
        self.method, self.device = method, device
        self.seconds, self.most, self.before = 0.0, 0, 0
        self.updates: list[float] = []

    def on_train_start(self, *args: Any) -> None:
        for name in ("before_step", "evolve"):
            setattr(self.method, name, self.watched(getattr(self.method, name)))

    def watched(self, function: Any) -> Any:
        def run(*args: Any) -> Any:
            start = now(self.device)
            result = function(*args)
            self.seconds += now(self.device) - start
            return result

        return run

    def on_train_batch_start(self, *args: Any) -> None:
        self.seconds, self.before = 0.0, self.method.updates

    def on_train_batch_end(self, *args: Any) -> None:
        if self.method.updates > self.before:
            self.updates.append(self.seconds)


def update(name: str, model: str, device: str) -> float:
    """Median time of three updates over all weights, in seconds, after one warm-up update.

    The cost of an update does not depend on the images, so there are only a few small ones.
    """
    method = METHODS[name](SPARSITY, every="2 steps", end=1.0, drop_fraction=0.3)
    watch = Stopwatch(method, device)
    quiet([watch, method], device, max_epochs=1).fit(Net(model), random_images(2, 10, 64))
    return statistics.median(watch.updates[1:])


def updates(quick: bool, rounds: int, device: str) -> dict[str, Any]:
    """Time updates of all methods against a dense training step."""
    model = "resnet8" if quick else "resnet50"
    net = Net(model).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    batch, micro, side = (16, 16, 64) if quick else (128, 128 if device == "cuda" else 16, 224)
    images, labels = torch.rand(batch, 3, side, side, device=device), torch.randint(0, 10, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        for x, y in zip(images.split(micro), labels.split(micro), strict=True):
            (net.training_step((x, y), 0) * micro / batch).backward()
        optimizer.step()

    ways: dict[str, Callable[[], Any]] = {"dense training step": step}
    ways |= {f"update of {name}": partial(update, name, model, device) for name in METHODS}
    return ratios(in_turns(ways, rounds, device, warm_up=int(device == "cuda")), "dense training step")


class Scales(L.Callback):
    """Measure the memory that a method keeps, between steps and right before the optimizer step; listed last."""

    def __init__(self, method: Rewiring) -> None:
        self.method, self.usual, self.most = method, 0, 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.most = max(self.most, held(self.method, pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.usual = held(self.method, pl_module)


def memory() -> dict[str, float]:
    """Bytes per weight that a method keeps, at all times and on a step with an update."""
    table: dict[str, float] = {}
    for name, make in METHODS.items():
        method = make(SPARSITY, every="2 steps", end=1.0)
        scales = Scales(method)
        quiet([method, scales], "cpu", max_epochs=1).fit(Net("quick"), random_images(2, 6))
        table[f"{name}, at all times"] = scales.usual / method.masks.total
        table[f"{name}, gradients on a step with an update"] = (scales.most - scales.usual) / method.masks.total
    return table


def parts(options: Options) -> Parts:
    cuda, quick = options.device == "cuda", options.quick
    yield ("memory, bytes per weight",), memory
    net = "ResNet-8, batch 16" if quick else "ResNet-50, batch 128, 224 pixels"
    yield (f"update, {net}",), partial(updates, quick, 10 if cuda and not quick else 3, options.device)
    model, precision = "quick" if quick else "resnet18", "16-mixed" if cuda and not quick else "32-true"
    rounds = options.times(30 if cuda else 15)
    title = f"step without an update, {model}, batch 128, {precision}, {options.device}"
    yield (title,), partial(steps, model, 128, rounds, options.device, precision)
