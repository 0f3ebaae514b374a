"""What every method adds to a training step, and what it holds in memory.

    python -m benchmarks.methods                       a perceptron, ResNet-18 and a small ViT, batches of 32 and 128
    python -m benchmarks.methods --models mlp --batches 32 --steps 40
    python -m benchmarks.methods --steps 10 --save     what is committed; goes on where it was interrupted
    python -m benchmarks.methods --steps 5 --memory --save     peak memory instead
    python -m benchmarks.methods --quick               to see that it runs

For every method one short training. The time of each step is taken, and the part of it that is spent inside the method: in
its stations, its mask, its penalties on weights. The ratio is step / (step - part), so both numbers come from the same step,
and neither the place of memory nor what else the machine does can part them. The first number is the median step, the second
the mean over all steps, with all updates of masks: a short training has more of them per step than a long one.

A term in the loss also has a backward pass, which no station sees. Such a method does its part in every other step, four
times as many, and each of these is compared with the mean of the plain steps before and after it; the second number is what
that makes of its default, every fifth step.

Bytes are those of the tensors that the callback keeps, per weight it works on. With `--memory`, a process of its own makes
such a training, and the number is by how much its memory grows at most, what comes before the first step included, as a
ratio to a plain training.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.overhead import Net
from benchmarks.record import RESULTS, alone, growth, machine, save
from lightning_sparse import (
    SET,
    SNIP,
    STR,
    CKARegularization,
    GraNet,
    GraSP,
    HyperSparse,
    LayerSparsity,
    LotteryTicket,
    LpSphere,
    MagnitudePruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SynFlow,
    TrainableThreshold,
    WeightPenalty,
)
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.callbacks.stations import Stations

METHODS: dict[str, Callable[[], Sparsifier]] = {
    "RandomSparsity": lambda: RandomSparsity(0.9),
    "MagnitudePruning": lambda: MagnitudePruning(0.9),
    "SET": lambda: SET(0.9),
    "RigL": lambda: RigL(0.9),
    "GraNet": lambda: GraNet(0.9),
    "SNIP": lambda: SNIP(0.9),
    "GraSP": lambda: GraSP(0.9),
    "SynFlow": lambda: SynFlow(0.9),
    "HyperSparse": lambda: HyperSparse(0.9),
    "LotteryTicket": lambda: LotteryTicket(0.9, rounds=2),
    "WeightPenalty(l1)": lambda: WeightPenalty(0.9),
    "WeightPenalty(hoyer)": lambda: WeightPenalty(0.9, kind="hoyer"),
    "TrainableThreshold": TrainableThreshold,
    "STR": STR,
    "SparseConnectivityLearning": lambda: SparseConnectivityLearning(0.05),
    "LpSphere": lambda: LpSphere(1.3),
    "LpSphere(sparsity)": lambda: LpSphere(1.07, sparsity=0.9),
    "LayerSparsity": LayerSparsity,
    "CKARegularization": lambda: CKARegularization(every_n_batches=2),
}

STATIONS = ("before_step", "_after_step", "batch_start", "batch_end", "_direct_step")


class Clock(L.Callback):
    """First or last of the callbacks: notes the time of a step, and of what is inside the method."""

    def __init__(self, method: Sparsifier, warm_up: int, device: str = "cpu") -> None:
        self.method, self.warm_up, self.device = method, warm_up, device
        self.inside, self.depth, self.started = 0.0, 0, 0.0
        self.steps: list[tuple[float, float]] = []
        self.epochs: list[list[float]] = []
        self.bytes = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, the time in all stations is added up."""
        originals = {name: getattr(Stations, name) for name in STATIONS}
        for name, function in originals.items():
            setattr(Stations, name, self.watched(function))
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(Stations, name, function)

    def watched(self, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:  # one station may visit another
                    self.inside += self.now() - start

        return run

    def now(self) -> float:
        """The time, when the device has done all it was given: what a GPU would do meanwhile counts as waiting."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return perf_counter()

    def on_train_epoch_start(self, *args: Any) -> None:
        self.epochs.append([])

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        now = self.now()
        self.epochs[-1].append(now - self.started)
        if trainer.global_step > self.warm_up:
            self.steps.append((now - self.started, self.inside))
        weights = sum(weight.numel() for weight in self.method.weights.values())
        self.bytes = max(self.bytes, held(self.method) / weights)
        self.inside, self.started = 0.0, self.now()


def held(method: Sparsifier) -> int:
    """Bytes of all tensors that a callback keeps, each storage once, the model's own left out."""
    own = {p.untyped_storage().data_ptr() for p in method.stations.module.parameters()}
    own |= {p.grad.untyped_storage().data_ptr() for p in method.stations.module.parameters() if p.grad is not None}
    found: dict[int, int] = {}
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif type(value).__module__.startswith("lightning_sparse.core"):
            walk(vars(value))

    walk({name: value for name, value in vars(method).items() if name != "_stations"})
    return sum(found.values())


def train(model: str, batch: int, steps: int, callbacks: list[L.Callback], device: str) -> None:
    torch.manual_seed(0)
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * (steps // 5)
    runner = L.Trainer(
        max_epochs=5,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    runner.fit(Net(model), torch.utils.data.DataLoader(data, batch_size=None))


def measure(name: str, model: str, batch: int, steps: int, device: str = "cpu") -> dict[str, float]:
    """One training of one method."""
    method = METHODS[name]()
    in_the_loss = type(method).feature_penalty is not Sparsifier.feature_penalty
    clock = Clock(method, 2, device)
    with clock.watching():
        train(model, batch, 4 * steps if in_the_loss else steps, [method, clock], device)
    row = {"step, ms": 1e3 * statistics.median(step for step, _ in clock.steps), "bytes per weight": clock.bytes}
    if in_the_loss:
        median = statistics.median(neighbours(clock.epochs))
        return {"median": median, "mean": 1 + (median - 1) / 5, **row}
    ratios = [step / (step - inside) for step, inside in clock.steps]
    whole = sum(step for step, _ in clock.steps)
    return {
        "median": statistics.median(ratios),
        "mean": whole / (whole - sum(inside for _, inside in clock.steps)),
        "inside, ms": 1e3 * statistics.median(inside for _, inside in clock.steps),
        **row,
    }


def peak(name: str, model: str, batch: int, steps: int, device: str = "cpu") -> float:
    """By how many MiB memory grows at most in one training of one method, or of none."""
    callbacks: list[L.Callback] = [] if name == "dense" else [METHODS[name]()]
    return growth(lambda: train(model, batch, steps, callbacks, device), device)


def neighbours(epochs: list[list[float]]) -> list[float]:
    """Every second step from the third of an epoch on, as a ratio to the mean of the one before and the one after."""
    return [
        2 * times[i] / (times[i - 1] + times[i + 1])
        for times in epochs[1:]  # what the first epoch has to set up is no part of a step
        for i in range(2, len(times) - 1, 2)
    ]


def measured(arguments: argparse.Namespace, model: str, batch: int, name: str, rows: dict[str, Any]) -> dict[str, float]:
    """The row of a method: times, or memory."""
    if not arguments.memory:
        return measure(name, model, batch, arguments.steps)
    options = ["--models", model, "--batches", str(batch), "--steps", str(arguments.steps)]
    size = alone("benchmarks.methods", "--peak", name, *options)
    return {"MiB": size, "ratio": size / rows["dense"]["MiB"] if name != "dense" else 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mlp", "resnet18", "vit"])
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 128])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times (on Linux)")
    parser.add_argument("--peak", help="print by how many MiB memory grows while one method trains")
    parser.add_argument(
        "--save", action="store_true", help="write to benchmarks/results, and measure only what is not there"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.batches, arguments.steps = ["mlp"], [32], 20
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.peak:
        print(peak(arguments.peak, arguments.models[0], arguments.batches[0], arguments.steps))
        return
    result = "methods_memory" if arguments.memory else "methods_cpu"
    path = RESULTS / f"{result}.json"
    numbers: dict[str, Any] = {}
    if arguments.save and path.exists():
        found = json.loads(path.read_text())
        for package in ("lightning_sparse", "torch"):
            if (theirs := found["machine"][package]) != (mine := machine()[package]):
                raise SystemExit(f"{path.name} is of {package} {theirs}, this is {mine}; remove it to begin anew.")
        numbers = found["numbers"]
    for model in arguments.models:
        for batch in arguments.batches:
            rows = numbers.setdefault(f"{model}, batch {batch}", {})
            columns = "peak memory" if arguments.memory else "step with / step without; median, mean; bytes per weight"
            print(f"\n{model}, batch {batch}: {columns}")
            for name in [*(["dense"] if arguments.memory else []), *arguments.methods]:
                if name == "LayerSparsity" and model != "mlp":
                    continue  # no chain of layers that could merge
                row = rows[name] = rows.get(name) or measured(arguments, model, batch, name, rows)
                if arguments.save:
                    save(result, numbers)
                if arguments.memory:
                    shown = f"{row['ratio']:.3f}   {row['MiB']:.0f} MiB"
                else:
                    shown = f"{row['median']:.3f}  {row['mean']:.3f}  {row['bytes per weight']:6.2f}"
                    shown += f"   of {row['step, ms']:.1f} ms"
                print(f"  {name:30s} {shown}", flush=True)


if __name__ == "__main__":
    main()
