"""The case under test, and a recorded training run that several checks share."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing.state import Watcher, masks_of, nonzero, state_of
from lightning_sparse.testing.toys import Architecture, fit, plain_network, toy

__all__ = ["Case", "Inapplicable", "Make", "Recording", "quiet", "recorded", "require"]

Make: TypeAlias = Callable[[], Callback | Sequence[Callback]]
"""A function that returns the callbacks of a case, new ones at each call."""


class Inapplicable(Exception):
    """Raised by a check that does not apply to this case, or that cannot run on this machine."""


def require(holds: bool, sentence: str) -> None:
    """Raise an AssertionError with this sentence unless `holds`; unlike `assert`, also under `python -O`."""
    if not holds:
        raise AssertionError(sentence)


@dataclass(frozen=True, eq=False)
class Case:
    """What a check tests: a factory of callbacks, and the network of the toy module.

    Args:
        make: returns new callbacks at every call: one, or a list. At least one is a method.
        network: makes the network of the toy module.
    """

    make: Make
    network: Architecture = plain_network

    def callbacks(self) -> list[Callback]:
        """Return new callbacks as a list."""
        made = self.make()
        return [made] if isinstance(made, Callback) else list(made)

    def fresh(self) -> tuple[list[Callback], list[Sparsifier]]:
        """Return new callbacks, and the methods among them.

        Raises:
            AssertionError: if there is no method, or if two calls return the same callback object.
        """
        callbacks, others = self.callbacks(), self.callbacks()
        methods = [callback for callback in callbacks if isinstance(callback, Sparsifier)]
        require(bool(methods), f"{[type(callback).__name__ for callback in callbacks]} hold no Sparsifier; make one.")
        require(
            not {id(callback) for callback in callbacks} & {id(callback) for callback in others},
            "The callbacks of two calls are the same objects; make new ones at every call.",
        )
        return callbacks, methods


@dataclass(frozen=True, eq=False)
class Recording:
    """A complete training run with a checkpoint of every step, checked by a `Watcher` throughout.

    Args:
        names: names of the parameters before training.
        module: the module after training.
        trainer: the Trainer after training.
        methods: the methods after training.
        state: the state of module, Trainer and methods after training.
        wrong: the errors that the watcher found, one sentence each.
        moments: the moments at which the watcher looked.
        kept: masks after every step, by step and name, for all methods together.
        folder: holds `full/step=*.ckpt` and `bare/step=*.ckpt`; the latter contain weights only.
    """

    names: list[str]
    module: pl.LightningModule
    trainer: pl.Trainer
    methods: list[Sparsifier]
    state: dict[str, Any]
    wrong: list[str]
    moments: set[str]
    kept: dict[int, dict[str, Tensor]]
    folder: Path

    def files(self, kind: str) -> dict[int, Path]:
        """Return the checkpoints by step; `kind` is "full" or "bare"."""
        found = (self.folder / kind).glob("step=*.ckpt")
        return dict(sorted((int(file.stem.removeprefix("step=")), file) for file in found))


OPTIONS: dict[str, Any] = {"val_check_interval": 2}
"""Trainer options of the recorded run and of runs that resume it: they also validate inside epochs."""


@functools.lru_cache(maxsize=3)  # one case with all optimizers
def recorded(case: Case, optimizer: str) -> Recording:
    """Train a toy with the callbacks of a case; checks that need the same run share it."""
    torch.manual_seed(1)
    callbacks, methods = case.fresh()
    module = toy(optimizer)
    names = [name for name, _ in module.named_parameters()]
    wrong: list[str] = []
    moments: set[str] = set()
    kept: dict[int, dict[str, Tensor]] = {}

    def look(moment: str, observed: pl.LightningModule) -> None:
        moments.add(moment)
        step = observed.trainer.global_step
        for method in methods:
            wrong.extend(
                f"at {moment}, step {step}: '{name}' is not zero where dropped" for name in nonzero(method, observed)
            )
            wrong.extend(f"at {moment}, step {step}: {sentence}" for sentence in _moving(method, observed.trainer))
        if moment == "batch end":
            kept[step] = {name: mask for method in methods for name, mask in masks_of(method).items()}

    folder = Path(tempfile.mkdtemp())
    full = ModelCheckpoint(folder / "full", "{step}", every_n_train_steps=1, save_top_k=-1)
    bare = ModelCheckpoint(folder / "bare", "{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=True)
    try:
        runner = fit(module, Watcher(look), *callbacks, full, bare, **OPTIONS)
    except BaseException:
        shutil.rmtree(folder)
        raise
    state = copy.deepcopy(state_of(module, runner, *methods))
    recording = Recording(names, module, runner, methods, state, wrong, moments, kept, folder)
    weakref.finalize(recording, shutil.rmtree, folder)
    return recording


def _moving(method: Sparsifier, trainer: pl.Trainer) -> Iterator[str]:
    """Yield a sentence for each optimizer state that is not zero at removed entries."""
    if method.dropped_live_on:
        return
    weights = method.weights
    for name, mask in masks_of(method).items():
        for optimizer in trainer.optimizers:
            for key, value in optimizer.state.get(weights[name], {}).items():
                if isinstance(value, Tensor) and value.shape == mask.shape and bool(value[~mask].any()):
                    yield f"the optimizer's {key} of '{name}' is not zero where dropped"


NOISE = [
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*does not have many workers",
    r".*GPU available but not used",
    r"The number of training batches .* is smaller than the logging interval",
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    r"You're using the WeightAveraging callback with a model that overrides",
    r"Using ModelCheckpoint with manual optimization",
]
"""Patterns of Lightning's warnings that say nothing about a method."""


@contextmanager
def quiet() -> Iterator[None]:
    """Run with one thread, a fixed seed and without Lightning's warnings about toys; restore everything afterwards."""
    threads, seed = torch.get_num_threads(), os.environ.pop("PL_GLOBAL_SEED", None)
    with warnings.catch_warnings(), torch.random.fork_rng():
        for beginning in NOISE:
            warnings.filterwarnings("ignore", beginning)
        torch.manual_seed(0)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            if seed is not None:
                os.environ["PL_GLOBAL_SEED"] = seed
