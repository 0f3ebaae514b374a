"""Attributes that Lightning and torch keep private and that have no public counterpart: the only place that reads them.

Each function says what it needs and why there is no public way. If Lightning moves one of them, only this file changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim import Optimizer

__all__ = [
    "average_models",
    "combined_loader",
    "compiler_context",
    "forget_iterator",
    "logged_step",
    "trainer_of",
    "unscales_itself",
]


def average_models(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """The models in which `WeightAveraging` and `StochasticWeightAveraging` keep averages: they offer no hook."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        model = getattr(callback, "_average_model", None)
        if isinstance(model, nn.Module):
            yield model


def combined_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    """The training data as Lightning combines it: the public `train_dataloader` does not keep how loaders are combined."""
    return trainer.fit_loop._combined_loader


def compiler_context(module: pl.LightningModule) -> Any:
    """Not None for a module that went through `torch.compile`: Lightning unwraps it and keeps the wrapper's settings."""
    return module._compiler_ctx


def forget_iterator(loader: Any) -> None:
    """Let a copied loader open its own workers: persistent workers serve one iterator, which a copy would share."""
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator = None


def logged_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs its own numbers of this batch; with several optimizers, `global_step` differs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def trainer_of(module: Any) -> pl.Trainer | None:
    """The Trainer that a module is attached to: the public property raises if there is none."""
    return getattr(module, "_trainer", None)


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer divides gradients by their scale inside its step, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
