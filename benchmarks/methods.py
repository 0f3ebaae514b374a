"""What every method adds to a training step, and what it holds in memory.

    python -m benchmarks.methods                       a perceptron, ResNet-18 and a small ViT, batches of 32 and 128
    python -m benchmarks.methods --models mlp --batches 32 --rounds 40
    python -m benchmarks.methods --save                what is committed; goes on where it was interrupted
    python -m benchmarks.methods --memory --save       peak memory instead (on Linux)
    python -m benchmarks.methods --quick               to see that it runs

For every method one short training, in which it takes part in every other step; each of its steps is compared with the mean
of the dense steps before and after, but for those just after a change of masks. The number is the median, with the middle
half; steps on which masks change count apart from those between. Methods that change them by a schedule do so on every
second of their steps here, so that there are both; `HyperSparse` counts while it regularizes. What happens between epochs is
no part of a step.

Where a step takes long, what else the machine does parts two steps by more than most methods do. So on a CPU the time is
also taken that a step spends inside the method, in its stations, its masks, its penalties on weights, as a share of the rest
of the same step. A term in the loss has a backward pass too, which no station sees: of `CKARegularization` there is the
comparison alone, of steps with its penalty (by default every fifth).

Bytes are those of the tensors that the callback keeps, per weight it works on. With `--memory`, a process of its own makes
such a training, and the number is by how much its memory grows at most, what comes before the first step included, as a
ratio to a plain training; all take turns again, as often as `--repeats` says.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from benchmarks.competitors import Net
from benchmarks.record import growth, middle, peaks, resumed, save
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
from lightning_sparse.core import MaskSet
from lightning_sparse.loop import Sparsifier
from lightning_sparse.loop.loop import Stations

EPOCHS = 4

OFTEN: dict[str, Any] = {"start": 0.0, "end": 1.0, "every": "2 steps"}

METHODS: dict[str, Callable[[], Sparsifier]] = {
    "RandomSparsity": lambda: RandomSparsity(0.9),
    "MagnitudePruning": lambda: MagnitudePruning(0.9, **OFTEN),
    "SET": lambda: SET(0.9, **OFTEN),
    "RigL": lambda: RigL(0.9, **OFTEN),
    "GraNet": lambda: GraNet(0.9, **OFTEN),
    "SNIP": lambda: SNIP(0.9),
    "GraSP": lambda: GraSP(0.9),
    "SynFlow": lambda: SynFlow(0.9),
    "HyperSparse": lambda: HyperSparse(0.9, strength=5e-6, pretrain=0, regularize=0.75),
    "LotteryTicket": lambda: LotteryTicket(0.9, rounds=2),
    "WeightPenalty(l1)": lambda: WeightPenalty(0.9, end=1.0),
    "WeightPenalty(hoyer)": lambda: WeightPenalty(0.9, kind="hoyer", end=1.0),
    "TrainableThreshold": TrainableThreshold,
    "STR": STR,
    "SparseConnectivityLearning": lambda: SparseConnectivityLearning(0.05),
    "LpSphere": lambda: LpSphere(1.3),
    "LpSphere(sparsity)": lambda: LpSphere(1.07, sparsity=0.9, **OFTEN),
    "LayerSparsity": LayerSparsity,
    "CKARegularization": lambda: CKARegularization(every_n_batches=2),
}

STATIONS = ("before_step", "_after_step", "batch_start", "batch_end", "_direct_step")


class Step(NamedTuple):
    """Its time, the part of it inside the method, whether masks changed (None: it is dense), and whether it counts."""

    seconds: float
    inside: float
    changed: bool | None
    counts: bool


class Turns(L.Callback):
    """First of the callbacks: lets the only method take part in every other step, from the first on, and times them all."""

    def __init__(self, method: Sparsifier, device: str) -> None:
        self.method, self.device = method, device
        self.steps: list[Step] = []
        self.active, self.changed = True, False
        self.started, self.inside, self.depth = 0.0, 0.0, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, changes of masks are noted, and on a CPU the time in all stations is added up."""
        watched: list[tuple[type, str, Any]] = [(MaskSet, "replace", self.noting)]
        if self.device == "cpu":  # a GPU would have to be waited for
            watched += [(Stations, name, self.timing) for name in STATIONS]
        originals = [getattr(owner, name) for owner, name, _ in watched]
        for (owner, name, wrapped), original in zip(watched, originals, strict=True):
            setattr(owner, name, wrapped(original))
        try:
            yield
        finally:
            for (owner, name, _), original in zip(watched, originals, strict=True):
                setattr(owner, name, original)

    def noting(self, function: Any) -> Any:
        def run(*args: Any) -> Any:
            self.changed = True
            return function(*args)

        return run

    def timing(self, function: Any) -> Any:
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

    def hand_over(self, trainer: L.Trainer, active: bool) -> None:
        """Let the method take part from now on, or not."""
        self.active, stations, optimizer = active, self.method.stations, trainer.optimizers[0]
        self.method._leads = lambda trainer: active  # type: ignore[method-assign]
        for handle in stations._handles:
            handle.remove()
        stations._handles.clear()
        if active:
            stations._handles.append(optimizer.register_step_pre_hook(stations._direct_step))
            stations._handles.append(optimizer.register_step_post_hook(stations._after_step))

    def now(self) -> float:
        """The time, when the device has done all it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.hand_over(trainer, True)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.hand_over(trainer, trainer.global_step % 2 == 0)
        self.inside, self.changed, self.started = 0.0, False, self.now()

    def end(self) -> None:
        """The step is over."""
        changed = self.changed if self.active else None
        counts = getattr(self.method, "phase", None) != "finetune"
        self.steps.append(Step(self.now() - self.started, self.inside, changed, counts))


class Stop(L.Callback):
    """Last of the callbacks."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.bytes = turns, 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        self.turns.end()
        method = self.turns.method
        self.bytes = max(self.bytes, held(method) / sum(weight.numel() for weight in method.weights.values()))


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
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * (steps // EPOCHS)
    runner = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    runner.fit(Net(model), torch.utils.data.DataLoader(data, batch_size=None))


def compared(steps: Sequence[Step], changed: bool) -> list[tuple[Step, float]]:
    """The steps on which masks change, or do not, each with its ratio to the mean of its dense neighbors.

    A dense step just after a change is none: it has to fetch again what the change drove out of the caches. The method's
    first two steps warm up.
    """
    found = []
    for i, step in enumerate(steps[4:-1], start=4):
        if step.changed is changed and step.counts:
            beside = [steps[j].seconds for j in (i - 1, i + 1) if not steps[j - 1].changed]
            found.append((step, step.seconds / statistics.mean(beside)))
    return found


def measure(name: str, model: str, batch: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """One training of one method, with at least so many of its steps."""
    method = METHODS[name]()
    turns = Turns(method, device)
    stop = Stop(turns)
    with turns.watching():
        train(model, batch, 2 * EPOCHS * math.ceil(rounds / EPOCHS), [turns, method, stop], device)
    in_the_loss = type(method).feature_penalty is not Sparsifier.feature_penalty
    row: dict[str, Any] = {}
    for title, changed in (("between", False), ("change", True)):
        if found := compared(turns.steps, changed):
            row[title] = {**middle([ratio for _, ratio in found]), "steps": len(found)}
            if device == "cpu" and not in_the_loss:
                row[title]["inside"] = statistics.median(s.inside / (s.seconds - s.inside) for s, _ in found)
    dense = statistics.median(
        step.seconds for before, step in pairwise(turns.steps) if step.changed is None and not before.changed
    )
    return {**row, "dense, ms": 1e3 * dense, "bytes per weight": stop.bytes}


def peak(name: str, model: str, batch: int, device: str = "cpu") -> float:
    """By how many MiB memory grows at most in one training of one method, or of none."""
    callbacks: list[L.Callback] = [] if name == "dense" else [METHODS[name]()]
    return growth(lambda: train(model, batch, EPOCHS, callbacks, device), device)


def takes(name: str, model: str) -> bool:
    """Whether a method can do something for a model."""
    return name != "LayerSparsity" or model == "mlp"  # a chain of layers that could merge


def shown(row: dict[str, Any]) -> str:
    cells = []
    for title in ("between", "change"):
        found = row.get(title)
        cells.append(f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})" if found else "")
        cells.append(f"{100 * found['inside']:.1f} %" if found and "inside" in found else "")
    return "{:24s} {:>8s}   {:24s} {:>8s}".format(*cells) + f"   {row['bytes per weight']:5.2f}   {row['dense, ms']:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mlp", "resnet18", "vit"])
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 128])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times (on Linux)")
    parser.add_argument("--repeats", type=int, default=3, help="of --memory")
    parser.add_argument("--peak", help="print by how many MiB memory grows while one method trains")
    parser.add_argument(
        "--save", action="store_true", help="write to benchmarks/results, and measure only what is not there"
    )
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.peak:
        print(peak(arguments.peak, arguments.models[0], arguments.batches[0]))
        return
    if arguments.quick:
        arguments.models, arguments.batches = ["quick"], [32]
    places = {
        (model, batch): [name for name in arguments.methods if takes(name, model)]
        for model in arguments.models
        for batch in arguments.batches
    }
    if arguments.memory:
        peaks("methods", {place: ["dense", *names] for place, names in places.items()}, arguments.repeats, arguments.save)
        return
    numbers: dict[str, Any] = resumed("methods_cpu") if arguments.save else {}
    for (model, batch), names in places.items():
        rows = numbers.setdefault(f"{model}, batch {batch}", {})
        print(f"\n{model}, batch {batch}: times a dense step, inside; the same where masks change; bytes per weight; dense")
        for name in names:
            rows[name] = rows.get(name) or measure(name, model, batch, arguments.rounds)
            if arguments.save:
                save("methods_cpu", numbers)
            print(f"  {name:28s} {shown(rows[name])}", flush=True)


if __name__ == "__main__":
    main()
