"""What every method adds to a training step, and what it holds in memory.

    python -m benchmarks.methods                       a perceptron, ResNet-18 and a small ViT, batches of 32 and 128
    python -m benchmarks.methods --models mlp --batches 32 --steps 40
    python -m benchmarks.methods --steps 10 --save     what is committed; goes on where it was interrupted
    python -m benchmarks.methods --quick               to see that it runs

For every method one short training. The time of each step is taken, and the part of it that is spent inside the method: in
its stations, its mask, its penalties on weights. The ratio is step / (step - part), so both numbers come from the same step,
and neither the place of memory nor what else the machine does can part them. A term in the loss also has a backward pass,
which `benchmarks.cka` measures. The first number is the median step, the second the mean over all steps, with all updates of
masks: a short training has more of them per step than a long one.

Memory is that of the tensors which the callback keeps between steps, in bytes per weight it works on.
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
from benchmarks.record import RESULTS, machine, save
from lightning_sparse import (
    SET,
    SNIP,
    STR,
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
}

STATIONS = ("before_step", "_after_step", "batch_start", "batch_end", "_direct_step")


class Clock(L.Callback):
    """First or last of the callbacks: notes the time of a step, and of what is inside the method."""

    def __init__(self, method: Sparsifier, warm_up: int) -> None:
        self.method, self.warm_up = method, warm_up
        self.inside, self.depth, self.started = 0.0, 0, 0.0
        self.steps: list[tuple[float, float]] = []
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
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:  # one station may visit another
                    self.inside += perf_counter() - start

        return run

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        now = perf_counter()
        if trainer.global_step > self.warm_up:
            self.steps.append((now - self.started, self.inside))
        weights = sum(weight.numel() for weight in self.method.weights.values())
        self.bytes = max(self.bytes, held(self.method) / weights)
        self.inside, self.started = 0.0, perf_counter()


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


def measure(name: str, model: str, batch: int, steps: int) -> dict[str, float]:
    """One training of one method."""
    torch.manual_seed(0)
    method = METHODS[name]()
    warm_up = 2
    clock = Clock(method, warm_up)
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * (steps // 5)
    runner = L.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[method, clock],
    )
    with clock.watching():
        runner.fit(Net(model), torch.utils.data.DataLoader(data, batch_size=None))
    ratios = [step / (step - inside) for step, inside in clock.steps]
    whole = sum(step for step, _ in clock.steps)
    return {
        "median": statistics.median(ratios),
        "mean": whole / (whole - sum(inside for _, inside in clock.steps)),
        "inside, ms": 1e3 * statistics.median(inside for _, inside in clock.steps),
        "step, ms": 1e3 * statistics.median(step for step, _ in clock.steps),
        "bytes per weight": clock.bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mlp", "resnet18", "vit"])
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 128])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--save", action="store_true", help="write to benchmarks/results, and measure only what is not there"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.batches, arguments.steps = ["mlp"], [32], 20
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    path = RESULTS / "methods_cpu.json"
    numbers: dict[str, Any] = {}
    if arguments.save and path.exists():
        found = json.loads(path.read_text())
        if (theirs := found["machine"]["lightning_sparse"]) != (mine := machine()["lightning_sparse"]):
            raise SystemExit(f"{path.name} is of lightning_sparse {theirs}, this is {mine}; remove it to begin anew.")
        numbers = found["numbers"]
    for model in arguments.models:
        for batch in arguments.batches:
            rows = numbers.setdefault(f"{model}, batch {batch}", {})
            print(f"\n{model}, batch {batch}: step with / step without; median, mean; bytes per weight")
            for name in arguments.methods:
                if name == "LayerSparsity" and model != "mlp":
                    continue  # no chain of layers that could merge
                row = rows[name] = rows.get(name) or measure(name, model, batch, arguments.steps)
                if arguments.save:
                    save("methods_cpu", numbers)
                shown = f"{row['median']:.3f}  {row['mean']:.3f}  {row['bytes per weight']:6.2f}"
                print(f"  {name:30s} {shown}   of {row['step, ms']:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
