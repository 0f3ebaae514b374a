"""What masks and penalties add to a training step, in time and in memory, beside the ways people use now.

    python -m benchmarks.overhead                     a perceptron, ResNet-18 and a small ViT, batches of 32 and 128
    python -m benchmarks.overhead --models resnet18 --batches 128 --rounds 60
    python -m benchmarks.overhead --memory            peak memory instead of times (on Linux)
    python -m benchmarks.overhead --quick             small, to see that it runs

All ways take turns, step by step, on one and the same model in one and the same run: two models, or two runs of one, differ
by more than what is measured here, through where their memory happens to lie. Each step is compared with the dense step of
its round; the median over rounds is the number.

Of fasterai, which brings a trainer of its own, `Sparsifier` (masks, multiplied after each step) and the term that its
`RegularizeCallback` adds to the loss take part, without fastai: `pip install --no-deps fasterai fastcore einops`. Of
Torch-Pruning its sparse training takes part: `GroupNormPruner.regularize`. What is not installed is left out.

Peak memory is by how much a process of its own grows at most while it makes a few steps in one way, what comes before the
first step included; all ways take turns again, as often as `--repeats` says.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from time import perf_counter
from typing import Any

import lightning as L
import torch

from benchmarks.competitors import PEERS, SPARSITY, Net, Way, layers, ours
from benchmarks.record import growth, peaks, ratios, resumed, save, show
from lightning_sparse.loop import Sparsifier


class Turns(L.Callback):
    """First of the callbacks: before each step, hands the model over to another way.

    Args:
        methods: ours.
        only: these ways instead of all.
    """

    def __init__(self, methods: dict[str, Sparsifier], only: list[str] | None = None) -> None:
        self.methods, self.only = methods, only
        self.ways: dict[str, Way] = {}
        self.left_out: dict[str, str] = {}
        self.now, self.started = "", 0.0
        self.stations: Any = None
        self.inside: Inside | None = None

    def names(self) -> list[str]:
        return [name for name in ["dense", *self.methods, *self.ways] if self.only is None or name in self.only]

    def _set_up(self, trainer: L.Trainer, module: Net) -> None:
        found = {
            layer: torch.empty_like(layer.weight, dtype=torch.bool).bernoulli_(1 - SPARSITY) for layer in layers(module)
        }
        if "MagnitudePruning" in self.methods:
            masks = self.methods["MagnitudePruning"].masks
            found = {layer: masks[f"{name}.weight"] for name, layer in module.named_modules() if layer in found}
        for name, way in PEERS.items():
            try:
                if self.only is None or name in self.only:
                    self.ways[name] = way(module, found)
            except Exception as error:  # a peer that is not there, or does not take this model
                self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        for method in self.methods.values():
            self.stations = method.stations
        if self.stations is not None:
            self.inside = Inside(self.stations)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # in the first, our methods begin
            if batch_idx == 1:
                self._set_up(trainer, pl_module)
            order = self.names() if (batch_idx // len(self.names())) % 2 else self.names()[::-1]
            self._hand_over(trainer, order[batch_idx % len(order)])
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.started = perf_counter()

    def _hand_over(self, trainer: L.Trainer, name: str) -> None:
        if name == self.now:
            return
        if self.now in self.ways:
            self.ways[self.now].leave()
        if self.stations is not None:
            for handle in self.stations._handles:
                handle.remove()
            self.stations._handles.clear()
            leader = next(iter(self.methods.values()))
            leader._leads = lambda trainer: name in self.methods  # type: ignore[method-assign]
        if name in self.methods:
            self.stations.methods = [self.methods[name]]
            self.stations._handles.append(trainer.optimizers[0].register_step_post_hook(self.stations._after_step))
        elif name in self.ways:
            self.ways[name].enter()
        self.now = name

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if self.now in self.ways:
            self.ways[self.now].before_step()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.now in self.ways:
            self.ways[self.now].after_step()


class Stop(L.Callback):
    """Last of the callbacks: notes the time."""

    def __init__(self, turns: Turns, warm_up: int) -> None:
        self.turns, self.warm_up = turns, warm_up
        self.times: dict[str, list[float]] = {}
        self.inside: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - self.turns.started
        if not batch_idx:
            return
        names = self.turns.names()
        if batch_idx >= self.warm_up * len(names):
            self.times.setdefault(self.turns.now, []).append(seconds)
            if self.turns.now == "MagnitudePruning" and self.turns.inside is not None:
                self.inside.append(self.turns.inside.seconds)
        if self.turns.inside is not None:
            self.turns.inside.seconds = 0.0


class Inside:
    """Adds up the time that a step spends in the stations of our methods."""

    def __init__(self, stations: Any) -> None:
        self.seconds = 0.0
        self.per_step: list[float] = []
        for name in ("before_step", "_after_step", "batch_start", "batch_end"):
            setattr(stations, name, self.watched(getattr(stations, name)))

    def watched(self, function: Any) -> Any:
        def run(*args: Any) -> Any:
            start = perf_counter()
            result = function(*args)
            self.seconds += perf_counter() - start
            return result

        return run


def train(size: str, batch: int, batches: int, device: str, precision: Any, only: list[str] | None, warm_up: int) -> Stop:
    """All ways in turns, or some."""
    torch.manual_seed(0)
    turns = Turns({name: method for name, method in ours().items() if only is None or name in only}, only)
    stop = Stop(turns, warm_up)
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * batches
    runner = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[turns, *turns.methods.values(), stop],
    )
    runner.fit(Net(size), torch.utils.data.DataLoader(data, batch_size=None))
    return stop


def steps(size: str, batch: int, rounds: int, device: str, precision: Any, only: list[str] | None = None) -> dict[str, Any]:
    """Step time of every way, taking turns on one model."""
    count = len(PEERS) + len(ours()) + 1
    stop = train(size, batch, count * (rounds + 2), device, precision, only, 2)
    names = stop.turns.names()
    seen = [dict(zip(names, times, strict=True)) for times in zip(*(stop.times[name] for name in names), strict=False)]
    table: dict[str, Any] = ratios(seen, "dense")
    if stop.inside:
        dense, inside = sorted(stop.times["dense"]), sorted(stop.inside)
        middle, quarter = dense[len(dense) // 2], len(inside) // 4
        table["inside MagnitudePruning's stations"] = {
            "ratio": inside[len(inside) // 2] / middle,
            "low": inside[quarter] / middle,
            "high": inside[-1 - quarter] / middle,
            "seconds": inside[len(inside) // 2],
        }
    for name, reason in stop.turns.left_out.items():
        print(f"  left out: {name} ({reason})")
    return table


def peak(name: str, size: str, batch: int) -> float:
    """By how many MiB memory grows at most while a model is trained in one way."""

    def run() -> None:
        stop = train(size, batch, 6, "cpu", "32-true", [name], 0)
        if name not in stop.times:
            raise SystemExit(f"{name} is left out: {stop.turns.left_out}")

    return growth(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--save", action="store_true", help="write to benchmarks/results, and measure only what is not there"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--models", nargs="*", default=["mlp", "resnet18", "vit"])
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times (on Linux)")
    parser.add_argument("--repeats", type=int, default=3, help="of --memory")
    parser.add_argument("--peak", help="print by how many MiB memory grows while a model is trained in one way")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.peak:
        print(peak(arguments.peak, arguments.models[0], arguments.batches[0]))
        return
    if arguments.quick:
        arguments.models, arguments.batches, arguments.rounds = ["quick"], [128], 12
    places = [(model, batch) for model in arguments.models for batch in arguments.batches]
    if arguments.memory:
        names = ["dense", *ours(), *PEERS]
        peaks("overhead", dict.fromkeys(places, names), arguments.repeats, arguments.save)
        return
    numbers: dict[str, Any] = resumed(f"overhead_{arguments.device}") if arguments.save else {}
    for model, batch in places:
        title = f"step, {model}, batch {batch}, {arguments.precision}, {arguments.device}"
        if title not in numbers:
            numbers[title] = steps(model, batch, arguments.rounds, arguments.device, arguments.precision)
            if arguments.save:
                save(f"overhead_{arguments.device}", numbers)
        show(f"{title}, ratio to dense", numbers[title])


if __name__ == "__main__":
    main()
