"""Sparse connectivity learning: what a step costs, what is held in memory, and accuracy against price.

    python -m benchmarks cost-sparse-connectivity-learning      ResNet-20, batch 128
    python -m benchmarks desk-prices --data DIR                 LeNet-300-100 on Fashion-MNIST

Prices: a sweep beside gradual magnitude pruning at the sparsities it led to, same seeds; and gradients normalized or not,
each with the mask rate that is best on validation data, at equal sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from time import process_time
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from benchmarks import accuracy
from benchmarks.record import LeftOut, Options, Parts, Trainings, pick
from benchmarks.trainers import Net, quiet, random_images
from benchmarks.turns import WARM_UP, Turns, Way, peak_memory
from lightning_sparse import MagnitudePruning, SparseConnectivityLearning
from lightning_sparse.data import Digits, FashionMNIST
from lightning_sparse.loop import Step
from lightning_sparse.models import LeNet300

# ---- time and memory ------------------------------------------------------------------------------------------------


def step_time(model: str, rounds: int) -> dict[str, Any]:
    """Step time with and without the callback, and the time inside its stations."""
    method = SparseConnectivityLearning(price=0.05, end=1.0)
    turns = Turns([method], lambda module: {"dense": Way(), "SparseConnectivityLearning": Way([method])})
    turns.fit(Net(model), 128, 2 * (rounds + WARM_UP))
    table = turns.table("dense")
    inside = turns.inside_of("SparseConnectivityLearning", table["dense"]["seconds"])
    return {**table, "inside the callback's stations": inside}


def memory(model: str) -> dict[str, float]:
    """Bytes per weight that the callback holds while training and in the checkpoint, and at most for a moment in a step."""
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

SETTING = accuracy.Setting(FashionMNIST, LeNet300, epochs=10, batch_size=256, lr=0.05)
COSTS = (0.02, 0.05, 0.1, 0.2, 0.5)
SEEDS = (0, 1, 2)
RATES = {"rms": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), "none": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)}
UNIT = {"rms": 0.01, "none": 3e-7}
"""Where the controller starts: a hundredth of the rms of the first layer's gradients, normalized and as they are (3e-5)."""
SPARSITIES = (0.95, 0.98)
FIXED = (1e-6, 3e-6, 1e-5, 3e-5)
"""Prices without normalization."""


@dataclass(frozen=True)
class Given(accuracy.Setting):
    """A setting with the callbacks of one run."""

    made: Sequence[L.Callback] = ()

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        return list(self.made)


def at_a_price(price: float, **options: Any) -> list[L.Callback]:
    return [SparseConnectivityLearning(price=price, end=1.0, **options)]


@dataclass(frozen=True)
class Prices(Trainings):
    """Some runs need what others have found: the sparsity that a price led to, the rate that was best."""

    by: ClassVar[Sequence[str]] = ("study", "price", "norm", "target", "rate")
    values: ClassVar[Sequence[str]] = ("sparsity", "val", "test")

    def parts(self, options: Options) -> Parts:
        """Prices, and gradual magnitude pruning at the sparsity that each led to; then normalized or not.

        The mask rate is chosen by validation accuracy of one seed, then judged on others.
        """

        def run(make: Callable[[], list[L.Callback]], seed: int) -> dict[str, Any]:
            start, callbacks = process_time(), make()
            setting = Given(**vars(replace(SETTING, data=Digits) if options.quick else SETTING), made=callbacks)
            numbers = accuracy.train(setting, "", 0.0, seed, options.data, 1 if options.quick else options.epochs)
            numbers["sparsity"] = 1 - numbers["kept"] / numbers["total"]
            numbers["rate"] = getattr(next(iter(callbacks), None), "learning_rate", None)
            kept = {key: numbers[key] for key in ("sparsity", "test", "val", "kept", "rate")}
            return {**kept, "cpu_seconds": round(process_time() - start, 1)}

        def best(study: str, **what: Any) -> dict[str, Any]:
            runs = pick(self.content(options.out).get("runs", []), study=study, **what)
            if not runs:
                raise LeftOut(f"it needs {study} {what}")
            return max(runs, key=lambda run: run["val"])

        def pruned(**what: Any) -> list[L.Callback]:
            return [MagnitudePruning(best("price", **what)["sparsity"])]

        def target(norm: str, target: float, rate: float | None = None) -> list[L.Callback]:
            rate = rate or best("rate", norm=norm, target=target)["rate"]
            return [SparseConnectivityLearning(price=UNIT[norm], sparsity=target, norm=norm, learning_rate=rate)]

        def fixed(price: float) -> list[L.Callback]:
            return at_a_price(price, norm="none", learning_rate=best("rate", norm="none")["rate"])

        for seed in SEEDS:
            yield {"study": "dense", "seed": seed}, partial(run, list, seed)
            for price in COSTS:
                key = {"seed": seed, "price": price}
                yield (
                    {"study": "price", **key},
                    partial(run, partial(at_a_price, price), seed),
                )
                yield {"study": "gradual", **key}, partial(run, partial(pruned, **key), seed)
        for norm, sparsity in product(RATES, SPARSITIES):
            for rate in RATES[norm]:
                key = {"norm": norm, "target": sparsity, "rate": rate}
                yield {"study": "rate", "seed": 10, **key}, partial(run, partial(target, **key), 10)
            for seed in SEEDS:
                key = {"norm": norm, "target": sparsity}
                yield {"study": "tuned", "seed": seed, **key}, partial(run, partial(target, **key), seed)
        for price in FIXED:
            yield {"study": "price without norm", "seed": 0, "price": price}, partial(run, partial(fixed, price), 0)

    def recipe(self, options: Options) -> dict[str, Any]:
        return SETTING.recipe() | {"epochs": options.epochs or SETTING.epochs}

    def prepare(self, options: Options) -> None:
        super().prepare(options)
        accuracy.have_data(SETTING.data, options)
