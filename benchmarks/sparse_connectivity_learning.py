"""Sparse connectivity learning: the cost of a step, memory, and accuracy by price.

    python -m benchmarks cost-sparse-connectivity-learning      ResNet-20, batch 128
    python -m benchmarks desk-prices --data DIR                 LeNet-300-100 on Fashion-MNIST
    python -m benchmarks claim-norms-lenet5 claim-norms-resnet8 --data DIR

`desk-prices` compares a sweep over prices with gradual magnitude pruning to the resulting sparsities, on the same seeds. It
also compares normalized with unnormalized gradients at equal sparsity, each with the mask rate that is best on validation
data. The last two suites make only the second comparison, on convolutional networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from time import process_time
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks import accuracy
from benchmarks.record import LeftOut, Options, Parts, Trainings, pick
from benchmarks.trainers import Net, quiet, random_images
from benchmarks.turns import WARM_UP, Turns, Way, peak_memory
from lightning_sparse import MagnitudePruning, SparseConnectivityLearning
from lightning_sparse.data import FashionMNIST
from lightning_sparse.loop import Step
from lightning_sparse.models import LeNet300

# ---- time and memory ------------------------------------------------------------------------------------------------


def step_time(model: str, rounds: int) -> dict[str, Any]:
    """Time steps with and without the callback, and the time inside its stations."""
    method = SparseConnectivityLearning(price=0.05, end=1.0)
    turns = Turns([method], lambda module: {"dense": Way(), "SparseConnectivityLearning": Way([method])})
    turns.fit(Net(model), 128, 2 * (rounds + WARM_UP))
    table = turns.table("dense")
    inside = turns.inside_of("SparseConnectivityLearning", table["dense"]["seconds"])
    return {**table, "inside the callback's stations": inside}


def memory(model: str) -> dict[str, float]:
    """Bytes per weight that the callback keeps while training and in the checkpoint, and its short peak before the step."""
    method = SparseConnectivityLearning(price=0.05, end=1.0)
    numbers: dict[str, float] = {}

    def per_weight(size: float) -> float:
        return size / sum(weight.numel() for weight in method.weights.values())

    class Scales(L.Callback):
        @torch.no_grad()
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            step = Step(optimizer, method.weights)
            during = peak_memory(lambda: (method.before_step(step), method.silence(step)))
            method.undo_step(step)
            numbers["for a moment, before the step"] = per_weight(during)

        def on_train_batch_end(self, *args: Any) -> None:
            kept = [t for group in (method.hidden, method.variables, method.velocity) for t in group.values()]
            every = [value for group in method.memorize().values() if isinstance(group, dict) for value in group.values()]
            saved = [value for value in every if isinstance(value, Tensor)]
            numbers["while training"] = per_weight(sum(t.untyped_storage().nbytes() for t in kept))
            numbers["in the checkpoint"] = per_weight(sum(t.untyped_storage().nbytes() for t in saved))

    quiet([Scales(), method], "cpu", max_epochs=1).fit(Net(model), random_images(8, 2))
    return numbers


def costs(options: Options) -> Parts:
    depth = 8 if options.quick else 20
    yield (f"step, ResNet-{depth}, batch 128",), partial(step_time, f"resnet{depth}", options.times(30, quick=6))
    yield ("memory, bytes per weight",), partial(memory, f"resnet{depth}")


# ---- accuracy against price -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(accuracy.Setting):
    """A setting with the callbacks of one run. Results include the gradients of features if a callback records them."""

    made: Sequence[L.Callback] = ()

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        return list(self.made)

    def read(self, module: nn.Module, callbacks: Sequence[L.Callback], *rest: Any) -> dict[str, Any]:
        found = [callback.found() for callback in self.made if isinstance(callback, Features)]
        return {"features": found[0]} if found else {}


class Features(L.Callback):
    """Record the gradients of mask variables early, midway and late in training: the root mean square in each feature.

    Args:
        method: method that has the variables; it must not normalize gradients and must be listed after this callback.
        batches: number of batches at the start of each of the three epochs over which squares are averaged.
    """

    def __init__(self, method: SparseConnectivityLearning, batches: int = 50) -> None:
        self.method, self.batches = method, batches
        self.squares: dict[str, dict[str, Tensor]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        last = (trainer.max_epochs or 1) - 1
        names = {0: "first epoch", last // 2: "middle epoch", last: "last epoch"}
        batch = trainer.fit_loop.epoch_loop.batch_idx
        if trainer.current_epoch not in names or batch >= self.batches:
            return
        squares = self.squares.setdefault(names[trainer.current_epoch], {})
        for name, weight in self.method.weights.items():
            gradient = (weight.detach() + self.method.hidden[name]) * weight.grad
            square = gradient.flatten(1).square().mean(1) / self.batches
            squares[name] = squares[name] + square if name in squares else square

    def state_dict(self) -> dict[str, Any]:
        return {"squares": self.squares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.squares = state_dict["squares"]

    def found(self) -> dict[str, dict[str, list[float]]]:
        """The recorded values by epoch and weight, one per feature."""
        return {
            epoch: {name: [float(f"{value:.3g}") for value in square.sqrt().tolist()] for name, square in squares.items()}
            for epoch, squares in self.squares.items()
        }


@dataclass(frozen=True)
class Searched(Trainings):
    """A suite in which some runs need results of earlier ones: the sparsity that a price led to, or the best mask rate.

    Args:
        name: name of the suite and its result file.
        setting: recipe of all runs.
    """

    by: ClassVar[Sequence[str]] = ("study", "price", "norm", "target", "rate")
    values: ClassVar[Sequence[str]] = ("sparsity", "val", "test")
    setting: accuracy.Setting

    def trained(self, options: Options, key: Mapping[str, Any], make: Callable[[], list[L.Callback]]) -> dict[str, Any]:
        """Train once. The callbacks are created only now, after earlier runs have finished."""
        start, callbacks = process_time(), make()
        setting = replace(self.setting, data=accuracy.Large) if options.quick else self.setting
        numbers = accuracy.train(
            Given(**vars(setting), made=callbacks),
            *("", 0.0, key["seed"], options.data),
            epochs=1 if options.quick else options.epochs,
            checkpoint=self.checkpoint(options, key),
            stop=options.stop,
        )
        numbers["sparsity"] = 1 - numbers["kept"] / numbers["total"]
        methods = [callback for callback in callbacks if isinstance(callback, SparseConnectivityLearning)]
        numbers["rate"] = methods[0].learning_rate if methods else None
        kept = {name: numbers[name] for name in ("sparsity", "test", "val", "kept", "rate", "features") if name in numbers}
        return {**kept, "cpu_seconds": round(process_time() - start, 1)}

    def best(self, options: Options, study: str, **what: Any) -> dict[str, Any]:
        """The run with the best validation accuracy."""
        runs = pick(self.content(options.out).get("runs", []), study=study, **what)
        if not runs:
            raise LeftOut(f"it needs the results of {study} {what}")
        return max(runs, key=lambda run: run["val"])

    def recipe(self, options: Options) -> dict[str, Any]:
        return self.setting.recipe() | {"epochs": options.epochs or self.setting.epochs}

    def prepare(self, options: Options) -> None:
        super().prepare(options)
        accuracy.have_data(self.setting.data, options)


UNIT = {"rms": 0.01, "l2": 5e-4, "none": 3e-7}
"""Initial price of the controller: a hundredth of the root mean square of gradients, normalized or not."""


def steered(norm: str, target: float, rate: float) -> SparseConnectivityLearning:
    """A method whose price is adjusted until the density is reached, so that all runs are compared at the same density."""
    return SparseConnectivityLearning(price=UNIT[norm], sparsity=target, norm=norm, learning_rate=rate)


PRICED = accuracy.Setting(FashionMNIST, LeNet300, epochs=10, batch_size=256, lr=0.05)
COSTS = (0.02, 0.05, 0.1, 0.2, 0.5)
RATES = {"rms": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), "none": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)}
FIXED = (1e-6, 3e-6, 1e-5, 3e-5)
"""Prices without normalization."""


def at_a_price(price: float, **options: Any) -> list[L.Callback]:
    return [SparseConnectivityLearning(price=price, end=1.0, **options)]


class Prices(Searched):
    """Prices, gradual magnitude pruning to the sparsity that each of them led to, and normalized or unnormalized gradients.

    The mask rate is selected by the validation accuracy of one seed and then evaluated on other seeds.
    """

    def parts(self, options: Options) -> Parts:
        def part(make: Callable[[], list[L.Callback]], **key: Any) -> tuple[dict[str, Any], Callable[[], Any]]:
            return key, partial(self.trained, options, key, make)

        def pruned(**what: Any) -> list[L.Callback]:
            return [MagnitudePruning(self.best(options, "price", **what)["sparsity"])]

        def target(norm: str, target: float, rate: float | None = None) -> list[L.Callback]:
            return [steered(norm, target, rate or self.best(options, "rate", norm=norm, target=target)["rate"])]

        def fixed(price: float) -> list[L.Callback]:
            return at_a_price(price, norm="none", learning_rate=self.best(options, "rate", norm="none")["rate"])

        for seed in range(3):
            yield part(list, study="dense", seed=seed)
            for price in COSTS:
                yield part(partial(at_a_price, price), study="price", seed=seed, price=price)
                yield part(partial(pruned, seed=seed, price=price), study="gradual", seed=seed, price=price)
        for norm, sparsity in product(RATES, (0.95, 0.98)):
            for rate in RATES[norm]:
                how = {"norm": norm, "target": sparsity, "rate": rate}
                yield part(partial(target, **how), study="rate", seed=10, **how)
            for seed in range(3):
                yield part(partial(target, norm, sparsity), study="tuned", seed=seed, norm=norm, target=sparsity)
        for price in FIXED:
            yield part(partial(fixed, price), study="price without norm", seed=0, price=price)


DECADES = {"rms": (1e-4, 1e-3, 1e-2, 1e-1), "l2": (3e-3, 3e-2, 3e-1, 3.0), "none": (1.0, 10.0, 100.0, 1000.0)}
"""Mask rates. In units of the gradients they are the same, because only the ratio of initial variables to rate matters."""
TUNED_AT = 0.95


class Norms(Searched):
    """Whether to normalize the gradients of features: three options, each at the same densities with its own mask rate.

    The rate is selected by the validation accuracy of one seed at 95%. It is then evaluated on other seeds, and at 90 and
    98% too.
    """

    targets: ClassVar[Sequence[float]] = (0.9, 0.95, 0.98)
    seeds: ClassVar[Sequence[int]] = (0, 1, 2)

    def parts(self, options: Options) -> Parts:
        def made(norm: str, target: float, rate: float | None = None) -> list[L.Callback]:
            method = steered(norm, target, rate or self.best(options, "rate", norm=norm)["rate"])
            return [*([Features(method)] if norm == "none" else []), method]

        for norm, rates in DECADES.items():
            for rate in rates:
                key = {"study": "rate", "seed": 10, "norm": norm, "target": TUNED_AT, "rate": rate}
                yield key, partial(self.trained, options, key, partial(made, norm, TUNED_AT, rate))
        for seed, target, norm in product(self.seeds, self.targets, DECADES):
            key = {"study": "tuned", "seed": seed, "norm": norm, "target": target}
            yield key, partial(self.trained, options, key, partial(made, norm, target))
