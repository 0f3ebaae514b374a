"""A module, data and methods small enough to train in a fraction of a second."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_sparse
from lightning_sparse.data import TensorLoader
from lightning_sparse.loop import Sparsifier, Step

ROOT = Path(__file__).parent.parent
OVERLAYS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
BATCHES, BATCH = 4, 8

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def overlay(path: Path) -> list[L.Callback]:
    """The callbacks of an overlay, as the command line makes them."""
    made = []
    for entry in yaml.safe_load(path.read_text())["trainer"]["callbacks+"]:
        module, _, name = entry["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module) if module else lightning_sparse, name)
        made.append(cls(**entry.get("init_args", {})))
    return made


def network() -> nn.Sequential:
    """Convolutions, a shared resolution, linear layers; every size divides by four except the single input channel."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


class Toy(L.LightningModule):
    """A classifier of random images."""

    def __init__(self, optimizer: str = "sgd", net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else network()
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x.to(next(self.parameters()).dtype)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def toy(optimizer: str = "sgd", seed: int = 0, **options: Any) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Toy(optimizer, **options)


def loader(batches: int = BATCHES, batch_size: int = BATCH, rank: int = 0, world_size: int = 1) -> TensorLoader:
    generator = torch.Generator().manual_seed(5)
    count = batches * batch_size * world_size
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    ones = torch.ones(1)
    return TensorLoader(images, labels, ones / 2, ones / 2, batch_size, shuffle=True, rank=rank, world_size=world_size)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**settings, **options}, callbacks=list(callbacks))


def fit(
    module: L.LightningModule, *callbacks: L.Callback, ckpt_path: Any = None, batch_size: int = BATCH, **options: Any
) -> L.Trainer:
    """Train a module on the toy data."""
    runner = trainer(*callbacks, **options)
    runner.fit(module, loader(BATCHES * BATCH // batch_size, batch_size), loader(1), ckpt_path=ckpt_path)
    return runner


def method_of(callbacks: list[L.Callback]) -> Sparsifier:
    return next(c for c in callbacks if isinstance(c, Sparsifier))


class Watcher(L.Callback):
    """Calls a function at every moment at which somebody may look at the weights."""

    def __init__(self, look: Callable[[str, L.LightningModule], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("batch end", pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("validation", pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look("epoch end", pl_module)


class L2Penalty(Sparsifier):
    """Exercises the station for penalties on weights: half the squared norm."""

    def __init__(self, strength: float, **options: Any) -> None:
        super().__init__(**options)
        self.strength = strength

    def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
        for name, weight in step.weights.items():
            yield name, self.strength * weight.detach()


class FeaturePenalty(Sparsifier):
    """Exercises the station for penalties on features: the mean square of the first layer's output."""

    def __init__(self, strength: float, **options: Any) -> None:
        super().__init__(**options)
        self.strength = strength
        self.feature: Tensor | None = None
        self.handle: Any = None

    def begin(self) -> None:
        self.resume()

    def resume(self) -> None:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.feature = output

        self.handle = self.run.module.net[0].register_forward_hook(keep)

    def feature_penalty(self) -> Tensor | None:
        return None if self.feature is None else self.strength * self.feature.float().square().mean()

    def release(self) -> None:
        self.feature = None
        if self.handle is not None:
            self.handle.remove()


class UnitNorm(Sparsifier):
    """Exercises the station for projections other than masks: every weight tensor on the unit sphere."""

    def begin(self) -> None:
        for weight in self.weights.values():
            weight.div_(weight.norm())

    def project(self, step: Step) -> None:
        for weight in step.weights.values():
            weight.div_(weight.norm())
