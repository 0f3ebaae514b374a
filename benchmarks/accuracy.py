"""Accuracy at a given sparsity: all methods use the same recipe, data order and number of epochs.

    python -m benchmarks desk --data DIR                     the missing runs of all suites that fit on two CPU cores
    python -m benchmarks paper --data DIR --at-once 6        the papers' own recipes, six runs at once on one GPU
    python -m benchmarks desk-cka --data DIR                 one suite of the first group
    python -m benchmarks desk-cka --table                    print its results so far

Each run is one entry of the results: method, sparsity, seed, torch version, test accuracy after the last epoch (no epoch is
selected on the test set), and kept weights, counted as non-zeros. An interrupted suite continues where it stopped, and an
interrupted run resumes from its last checkpoint.

Two numbers state what a run would cost if nothing were ever multiplied by zero, as ratios to the dense network. `inference`
is the cost of the final weights. `training` is the mean over the run of a forward pass and both parts of the backward pass.
Gradients of weights count as sparse, or as dense for methods that need dense gradients at every step. Dense gradients that a
method reads only occasionally (at its updates, or before the first step) are not counted.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from benchmarks.record import Options, Parts, Trainings
from benchmarks.trainers import quiet, resumable
from lightning_sparse import (
    ACDC,
    SET,
    SNIP,
    SRSTE,
    CKARegularization,
    GraNet,
    GraSP,
    HyperSparse,
    LotteryTicket,
    MagnitudePruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SynFlow,
    WeightPenalty,
)
from lightning_sparse.core import count_macs, effective_macs, find_targets
from lightning_sparse.data import Digits, ImageData
from lightning_sparse.loop import Sparsifier
from lightning_sparse.models import Classifier
from lightning_sparse.observe import SimilarityMap

METHODS: dict[str, Callable[[float], list[L.Callback]]] = {
    "dense": lambda s: [],
    "random": lambda s: [RandomSparsity(s)],
    "random + CKA-SR": lambda s: [RandomSparsity(s), CKARegularization(strength=1e-4)],
    "random + CKA-SR, all samples": lambda s: [
        RandomSparsity(s),
        CKARegularization(strength=8e-4, samples=None, every_n_batches=1),
    ],
    "random + AugCKA-SR": lambda s: [
        RandomSparsity(s),
        CKARegularization(strength=0.1, samples=None, every_n_batches=1, pairs="all", reduction="mean", unbiased=False),
    ],
    "SNIP": lambda s: [SNIP(s, batches=10)],
    "GraSP": lambda s: [GraSP(s, batches=10)],
    "SynFlow": lambda s: [SynFlow(s)],
    "L1, then one-shot": lambda s: [WeightPenalty(s)],
    "lottery ticket": lambda s: [LotteryTicket(s, rounds=3)],
    "one-shot + fine-tuning": lambda s: [MagnitudePruning(s, start=0.5, end=0.5)],
    "gradual": lambda s: [MagnitudePruning(s)],
    "AC/DC": lambda s: [ACDC(s)],
    "RigL, fan-in": lambda s: [RigL(s, structure="fan_in")],
    "gradual, blocks of 4": lambda s: [MagnitudePruning(s, structure="block:4x4")],
    "gradual 2:4": lambda s: [MagnitudePruning(structure="2:4")],
    "AC/DC 2:4": lambda s: [ACDC(structure="2:4")],
    "SR-STE": lambda s: [SRSTE()],
    "S-STE": lambda s: [SRSTE(soft=True)],
    "SR-STE, transposable": lambda s: [SRSTE(structure="transposable 2:4", every="40 steps")],
    "SET": lambda s: [SET(s)],
    "RigL": lambda s: [RigL(s)],
    "RigL, drop_fraction=0.1": lambda s: [RigL(s, drop_fraction=0.1)],
    "RigL, growth_per_output=True": lambda s: [RigL(s, growth_per_output=True)],
    "GraNet": lambda s: [GraNet(s)],
    "L1-ART": lambda s: [HyperSparse(s, penalty="l1")],
    "HyperSparse": lambda s: [HyperSparse(s)],
    "HyperSparse, 2 : 4 : 3": lambda s: [HyperSparse(s, pretrain=2 / 9, regularize=4 / 9)],
    "L1-ART, 2 : 4 : 3": lambda s: [HyperSparse(s, penalty="l1", pretrain=2 / 9, regularize=4 / 9)],
    "SCL": lambda s: [SparseConnectivityLearning(sparsity=s)],
}

OPEN_ENDED: dict[str, Callable[[float, Callable[[int], str]], list[L.Callback]]] = {
    "HyperSparse, as published": lambda s, epochs: [
        HyperSparse(s, strength=5e-6, growth=1.05, pretrain=epochs(60), regularize=epochs(200), finetune=epochs(160))
    ]
}
"""Methods that end training themselves. The lengths of their phases go through a function that may shorten them."""

DENSE_GRADIENTS = ("SCL",)
"""Methods that need the gradients of all weights at every step, including those of pruned weights."""


@dataclass(frozen=True)
class Setting:
    """A training recipe.

    The learning rate follows a cosine to zero, or is divided by ten at each milestone, unless a method sets its own rates.
    """

    data: type[ImageData]
    network: Callable[[int, int, int], nn.Module]
    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    nesterov: bool = False
    milestones: Sequence[int] = ()
    precision: Any = "32-true"
    memory_format: torch.memory_format = torch.contiguous_format
    val_fraction: float = 0.1

    def recipe(self) -> dict[str, Any]:
        """The settings that can be stored as JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("data", "network", "memory_format")}
        return json.loads(json.dumps({"data": self.data.__name__, "network": self.network.__name__, **plain}))

    def images(self, root: str, seed: int) -> ImageData:
        return self.data(root=root, batch_size=self.batch_size, val_fraction=self.val_fraction, seed=seed)

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        return METHODS[method](sparsity)

    def module(self, method: str, data: ImageData, annealing: float) -> Classifier:
        """The network to train, with a cosine schedule that reaches zero after the fraction `annealing` of the run."""
        sgd = partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=self.nesterov)
        steps = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=list(self.milestones)) if self.milestones else None
        shape = data.num_classes, data.in_channels, data.image_size
        return Classifier(self.network, *shape, sgd, steps, annealing=annealing)

    def resumes(self, method: str) -> bool:
        """Whether a run with this method can resume from a checkpoint."""
        return True

    def read(
        self, module: Classifier, callbacks: Sequence[L.Callback], data: ImageData, stop: Path | None
    ) -> dict[str, Any]:
        """Additional results from the trained network. Slow evaluations pause while the file `stop` exists."""
        return {}


class Large(Digits):
    """The digits of scikit-learn at twice their size, to check that a suite runs."""

    image_size = 16

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load(train)
        return images.repeat_interleave(2, -1).repeat_interleave(2, -2), labels


class Work(L.Callback):
    """Record the cost of forward passes without multiplications by zero during training."""

    def __init__(self, macs: dict[str, int], every: int = 50) -> None:
        self.macs, self.every, self.readings, self.sizes = macs, every, list[float](), dict[str, int]()

    def read(self, module: nn.Module) -> float:
        """The current cost, as a ratio to the dense network."""
        weights = {target.name: target.weight.detach() for target in find_targets(module)}
        self.sizes = self.sizes or {name: weight.numel() for name, weight in weights.items()}
        left = effective_macs(self.macs, weights)
        shares = {name: weight.numel() / self.sizes[name] for name, weight in weights.items()}  # channels may be gone
        return sum(count * shares.get(name, 1.0) for name, count in left.items()) / sum(self.macs.values())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every == 0:
            self.readings.append(self.read(pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {"readings": self.readings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.readings = list(state_dict["readings"])

    def training(self, dense_gradients: bool) -> float:
        """The mean cost of a step: the forward pass, the gradients of activations and the gradients of weights."""
        mean = statistics.mean(self.readings)
        return (2 * mean + (1.0 if dense_gradients else mean)) / 3


def train(
    setting: Setting,
    method: str,
    sparsity: float,
    seed: int,
    root: str,
    epochs: int | None = None,
    similarity: bool = False,
    checkpoint: Path | None = None,
    stop: Path | None = None,
) -> dict[str, Any]:
    """Train one network and return the results of the run.

    With `similarity`, these include the mean similarity of layers on validation data before and after training. With
    `checkpoint`, the state is saved to that path about twenty times, and an existing checkpoint is resumed. Training pauses
    while the file `stop` exists.
    """
    L.seed_everything(seed, verbose=False)
    data = setting.images(root, seed)
    length = epochs or setting.epochs
    if method in OPEN_ENDED:
        callbacks = OPEN_ENDED[method](sparsity, lambda phase: f"{math.ceil(phase * length / setting.epochs)} epochs")
        max_epochs = -1
    else:
        callbacks, max_epochs = setting.callbacks(method, sparsity), length
    rounds = [callback.plan.count + 1 for callback in callbacks if isinstance(callback, LotteryTicket)]
    module = setting.module(method, data, annealing=1 / max([1, *rounds]))  # the schedule spans one round
    module = module.to(memory_format=setting.memory_format)
    similarities = SimilarityMap(figure=False)
    if similarity:
        with isolate_rng():
            quiet([similarities]).validate(module, data, verbose=False)
    image = torch.zeros(1, data.in_channels, data.image_size, data.image_size)
    work = Work(count_macs(module, lambda: module(image)))
    saving, keeping, begun = resumable(checkpoint, length, stop)
    trainer = quiet([*callbacks, *saving, work], max_epochs=max_epochs, precision=setting.precision, **keeping)
    start = perf_counter()
    trainer.fit(module, data, ckpt_path=begun)
    seconds = perf_counter() - start
    scores = trainer.validate(module, data, verbose=False) + trainer.test(module, data, verbose=False)
    weights = [target.weight for target in find_targets(module)]
    numbers = {
        "test": scores[1]["test/accuracy"],
        "val": scores[0]["val/accuracy"],
        "test_loss": scores[1]["test/loss"],
        "kept": sum(int(weight.count_nonzero()) for weight in weights),
        "total": sum(weight.numel() for weight in weights),
        "inference": round(work.read(module), 5),
        "training": round(work.training(dense_gradients=method in DENSE_GRADIENTS), 5),
        "epochs": trainer.current_epoch,
        "seconds": round(seconds, 1),
    }
    if similarity:
        quiet([similarities], precision=setting.precision).validate(module, data, verbose=False)
        numbers["similarity"] = [round(value, 4) for value in similarities.history]
    for callback in callbacks:
        if isinstance(callback, Sparsifier):
            numbers |= {key: value for key in ("stop_reason", "history") if (value := getattr(callback, key, None))}
    numbers |= setting.read(module, callbacks, data, stop)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return numbers


@dataclass(frozen=True)
class Comparison(Trainings):
    """A comparison of methods: one training run for each method, sparsity and seed.

    Args:
        name: name of the suite and its result file.
        setting: recipe of all runs.
        methods: names in `METHODS` or `OPEN_ENDED`, or names that the setting defines.
        sparsities: sparsities of every method except `dense`.
        seeds: seeds of every pair of method and sparsity.
        similarity: whether to measure the similarity of layers.
        published: published accuracies in percent by method, for the first sparsities.
    """

    by: ClassVar[Sequence[str]] = ("method", "sparsity")
    values: ClassVar[Sequence[str]] = ("test", "inference", "training")
    setting: Setting
    methods: Sequence[str]
    sparsities: Sequence[float]
    seeds: Sequence[int] = (0, 1, 2)
    similarity: bool = False
    published: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def sparsities_of(self, method: str) -> Sequence[float]:
        return (0.0,) if method == "dense" else self.sparsities

    def parts(self, options: Options) -> Parts:
        """One part per run, with all runs of the first seed first."""
        setting = replace(self.setting, data=Large) if options.quick else self.setting
        epochs = options.epochs or (3 if options.quick else setting.epochs)
        how = {"root": options.data, "similarity": self.similarity, "epochs": epochs, "stop": options.stop}
        pairs = [(method, sparsity) for method in self.methods for sparsity in self.sparsities_of(method)]
        for seed, (method, sparsity) in product(self.seeds[: 1 if options.quick else None], pairs):
            key = {"seed": seed, "method": method, "sparsity": sparsity}
            kept = self.checkpoint(options, key) if setting.resumes(method) else None
            yield key, partial(train, setting, **key, **how, checkpoint=kept)

    def recipe(self, options: Options) -> dict[str, Any]:
        return self.setting.recipe() | {"epochs": options.epochs or self.setting.epochs}

    def prepare(self, options: Options) -> None:
        super().prepare(options)
        have_data(self.setting.data, options)

    def reference(self, method: str, sparsity: float) -> str:
        known = dict(zip(self.sparsities_of(method), self.published.get(method, ()), strict=False))
        return f"{known[sparsity] / 100:.4f}" if sparsity in known else ""


def have_data(data: type[ImageData], options: Options) -> None:
    """Download missing data if requested, and refuse to continue without it."""
    if options.quick:
        return
    made = data(root=options.data, download=options.download)
    try:
        made.prepare_data()
        made.load(train=False)
    except FileNotFoundError as error:
        raise SystemExit(f"{str(error).partition(' (')[0]}; give its folder with --data, or add --download.") from None
