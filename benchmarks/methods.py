"""The time that every method adds to a training step, and the memory it uses.

    python -m benchmarks cost-methods          a perceptron, ResNet-18 and a small ViT, batches of 32 and 128
    python -m benchmarks cost-structures       the same for methods with a structure, a plain mask, and SCL
    python -m benchmarks cost-finetuning       for methods that start from an existing model, compared with a random mask
    python -m benchmarks memory-methods        peak memory of a training run, each in a separate process (on Linux)

Each method has one short training run, in which it is active in every other step. Each of its steps is compared with the
mean of the dense steps before and after, except dense steps right after a change of masks. The result is the median, with
the middle half. Steps on which masks change are reported separately from the others. Methods that change masks on a schedule
do so on every second of their steps here, so that both kinds of steps occur. `HyperSparse` counts while it regularizes. Work
between epochs is not part of a step.

Where a step takes long, the noise of the machine is larger than the cost of most methods. On a CPU, the time that a step
spends inside the method (in its stations, its masks and its penalties on weights) is therefore measured too, as a fraction
of the rest of the same step. A term in the loss also has a backward pass, which no station sees. For `CKARegularization`,
only the first comparison is made, on steps with its penalty (by default every fifth). Bytes are those of the tensors that
the callback keeps, per weight that it acts on.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.overhead import memory_parts, places
from benchmarks.record import Options, Parts
from benchmarks.trainers import Net, quiet, random_images
from benchmarks.turns import Step, Turns, Way, growth, held, middle
from lightning_sparse import (
    ACDC,
    SET,
    SNIP,
    SRSTE,
    STR,
    CKARegularization,
    Distillation,
    GraNet,
    GraSP,
    HyperSparse,
    KeepSparsity,
    LayerSparsity,
    LotteryTicket,
    LpSphere,
    MagnitudePruning,
    MovementPruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SparseGPT,
    SynFlow,
    TrainableThreshold,
    Wanda,
    WeightPenalty,
)
from lightning_sparse.core import InputTap
from lightning_sparse.loop import Method, Sparsifier

EPOCHS = 4

OFTEN: dict[str, Any] = {"start": 0.0, "end": 1.0, "every": "2 steps"}

FITTING = ["!:first"]
"""All layers but the first, whose three input channels are not divisible by four."""

METHODS: dict[str, Callable[[], Sparsifier]] = {
    "RandomSparsity": lambda: RandomSparsity(0.9),
    "MagnitudePruning": lambda: MagnitudePruning(0.9, **OFTEN),
    "SET": lambda: SET(0.9, **OFTEN),
    "RigL": lambda: RigL(0.9, **OFTEN),
    "GraNet": lambda: GraNet(0.9, every="2 steps"),
    "SNIP": lambda: SNIP(0.9),
    "GraSP": lambda: GraSP(0.9),
    "SynFlow": lambda: SynFlow(0.9),
    "HyperSparse": lambda: HyperSparse(0.9, strength=5e-6, pretrain=0, regularize=0.75),
    "ACDC": lambda: ACDC(0.9, start=0.0, every=0.2),
    "RigL(fan_in)": lambda: RigL(0.9, structure="fan_in", **OFTEN),
    "MagnitudePruning(block:4x4)": lambda: MagnitudePruning(0.9, structure="block:4x4", **OFTEN),
    "LotteryTicket": lambda: LotteryTicket(0.9, rounds=2),
    "WeightPenalty(l1)": lambda: WeightPenalty(0.9, end=1.0),
    "WeightPenalty(hoyer)": lambda: WeightPenalty(0.9, penalty="hoyer", end=1.0),
    "TrainableThreshold": TrainableThreshold,
    "STR": STR,
    "SRSTE": lambda: SRSTE(targets=FITTING),
    "SRSTE(soft)": lambda: SRSTE(soft=True, targets=FITTING),
    "SRSTE(transposable)": lambda: SRSTE(structure="transposable 2:4", every="40 steps", targets=FITTING),
    "SparseConnectivityLearning": lambda: SparseConnectivityLearning(price=0.05, end=1.0),
    "LpSphere": lambda: LpSphere(p=1.3),
    "LpSphere(sparsity)": lambda: LpSphere(p=1.07, sparsity=0.9, **OFTEN),
    "LayerSparsity": LayerSparsity,
    "CKARegularization": lambda: CKARegularization(every_n_batches=2),
    "KeepSparsity": KeepSparsity,
    "Wanda": lambda: Wanda(0.9, batches=1),
    "Wanda(schedule)": lambda: Wanda(0.9, batches=1, **OFTEN),
    "SparseGPT": lambda: SparseGPT(0.9, batches=1),
    "MovementPruning": lambda: MovementPruning(0.9, **OFTEN),
    "Distillation": Distillation,
}


STRUCTURED = (
    *("ACDC", "RigL(fan_in)", "MagnitudePruning(block:4x4)"),
    *("SRSTE", "SRSTE(soft)", "SRSTE(transposable)"),
)
"""Methods of the suite `cost-structures`. It also measures a plain mask, and another method that shows masked weights."""

FINETUNING = ("KeepSparsity", "Wanda", "Wanda(schedule)", "SparseGPT", "MovementPruning", "Distillation")
"""Methods of the suite `cost-finetuning`."""


class EveryOther(Turns):
    """Activate a method in every other step, starting with the first, and measure its memory."""

    def __init__(self, method: Sparsifier, device: str) -> None:
        own = Way([method], enter=partial(self.look, True), leave=partial(self.look, False))
        super().__init__([method], lambda module: {"own": own, "dense": Way()}, swing=False, device=device)
        self.method, self.bytes = method, 0.0

    def look(self, on: bool) -> None:
        """Turn observation on or off, for methods that observe inputs at every step."""
        tap = vars(self.method).get("_tap")
        if isinstance(tap, InputTap):
            tap.open = on

    def counts(self) -> bool:
        weights = sum(weight.numel() for weight in self.method.weights.values())
        self.bytes = max(self.bytes, held(self.method, self.module) / weights)
        return getattr(self.method, "phase", None) != "finetune"


def compared(steps: Sequence[Step], changed: bool) -> list[tuple[Step, float]]:
    """Select steps that change masks, or steps that do not, each with its ratio to the mean of its dense neighbors.

    A dense step right after a change does not count, because it has to reload what the change evicted from the caches. The
    first two steps of the method are warm-up.
    """
    found = []
    for i, step in enumerate(steps[4:-1], start=4):
        beside = [steps[j].seconds for j in (i - 1, i + 1) if not steps[j - 1].changed]
        if step.way == "own" and step.changed is changed and step.counts and beside:
            found.append((step, step.seconds / statistics.mean(beside)))
    return found


def measure(name: str, model: str, batch: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Train once with one method, for at least `rounds` of its steps."""
    method, net = METHODS[name](), Net(model)
    if name == "KeepSparsity":
        thin_out(net)
    turns = EveryOther(method, device)
    turns.fit(net, batch, 2 * math.ceil(rounds / EPOCHS), EPOCHS)
    row: dict[str, Any] = {}
    for title, changed in (("between", False), ("change", True)):
        if found := compared(turns.steps, changed):
            row[title] = {**middle([ratio for _, ratio in found]), "steps": len(found)}
            if device == "cpu" and not method.answers(Method.feature_penalty):
                row[title]["inside"] = statistics.median(s.inside / (s.seconds - s.inside) for s, _ in found)
    dense = [step.seconds for before, step in pairwise(turns.steps) if step.way == "dense" and not before.changed]
    return {**row, "dense, ms": 1e3 * statistics.median(dense), "bytes per weight": turns.bytes}


@torch.no_grad()
def thin_out(net: nn.Module) -> None:
    """Keep a random tenth of every matrix, for methods that preserve existing zeros."""
    for weight in net.parameters():
        if weight.ndim > 1:
            weight *= torch.rand_like(weight) < 0.1


def peak(name: str, model: str, batch: int, device: str = "cpu") -> float:
    """Peak memory growth in MiB in one training run with one method, or with none."""
    callbacks = [] if name == "dense" else [METHODS[name]()]
    return growth(lambda: quiet(callbacks, device, max_epochs=EPOCHS).fit(Net(model), random_images(batch, 1)), device)


def takes(model: str) -> list[str]:
    """The methods that apply to a model.

    `LayerSparsity` needs layers that can be merged, and `CKARegularization` needs two layers to compare.
    """
    unfit = {"LayerSparsity": model != "mlp", "CKARegularization": model == "quick"}
    return [name for name in METHODS if not unfit.get(name) and name not in (*STRUCTURED, *FINETUNING)]


def structured(options: Options) -> Parts:
    """Measure methods whose masks have a structure, or alternate with dense phases."""
    for model, batch in places(options):
        for name in ("RandomSparsity", *STRUCTURED, "SparseConnectivityLearning"):
            yield (f"{model}, batch {batch}", name), partial(measure, name, model, batch, options.times(12), options.device)


def finetuning(options: Options) -> Parts:
    """Measure methods that start from an existing model.

    One model of each kind is enough, because hooks and teachers cost in proportion to the model.
    """
    for model, batch in places(options) if options.quick or options.device != "cpu" else [("vit", 32), ("resnet18", 128)]:
        rounds = options.times(8 if batch == 128 else 12, quick=12)
        for name in ("RandomSparsity", *FINETUNING):
            yield (f"{model}, batch {batch}", name), partial(measure, name, model, batch, rounds, options.device)


def parts(options: Options) -> Parts:
    for model, batch in places(options):
        place = f"{model}, batch {batch}"
        rounds = options.times(8 if batch == 128 and model != "mlp" else 12, quick=12)  # fewer if steps take seconds
        for name in takes(model):
            yield (place, name), partial(measure, name, model, batch, rounds, options.device)
        for name in ["dense", *takes(model)] if options.device == "cuda" else []:
            yield (f"{place}, peak memory in MiB", name), partial(peak, name, model, batch, options.device)


def peaks(options: Options) -> Parts:
    return memory_parts(options, "benchmarks.methods", lambda model: ["dense", *takes(model)])


if __name__ == "__main__":
    print(peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))
