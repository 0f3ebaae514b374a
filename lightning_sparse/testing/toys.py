"""A module, data and optimizers small enough to train in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_sparse.data import TensorLoader
from lightning_sparse.loop import SparsityMixin

__all__ = [
    "BATCH",
    "BATCHES",
    "EPOCHS",
    "OPTIMIZERS",
    "Architecture",
    "Manual",
    "Toy",
    "attention_network",
    "fit",
    "loader",
    "network",
    "plain_network",
    "toy",
    "trainer",
    "with_architecture",
]

EPOCHS, BATCHES, BATCH = 3, 4, 8
"""Epochs that `fit` trains, batches per epoch, and images per batch."""

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}
"""The optimizers that the contract trains with, by name."""


Architecture: TypeAlias = Callable[[float], nn.Sequential]
"""Takes a dropout rate and makes a network from images of shape (batch, 1, 8, 8) to four logits. There must be weights both
in its first four modules and in the rest."""


def plain_network(dropout: float = 0.1) -> nn.Sequential:
    """Two convolutions and two linear layers; every size divides by four except the single input channel.

    Args:
        dropout: dropout rate before the first linear layer; with 0 nothing draws random numbers.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout) if dropout else nn.Identity(),
        nn.Linear(8 * 16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def attention_network(dropout: float = 0.1) -> nn.Sequential:
    """A convolution, a transformer encoder layer with four heads, and a linear layer; the channels are the tokens.

    Args:
        dropout: dropout rate of the transformer layer; with 0 nothing draws random numbers.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 2, stride=2),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(16, 4, 16, dropout, batch_first=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )


_ARCHITECTURE: ContextVar[Architecture] = ContextVar("architecture", default=plain_network)


@contextmanager
def with_architecture(architecture: Architecture) -> Iterator[None]:
    """Use another network for toys within the context."""
    token = _ARCHITECTURE.set(architecture)
    try:
        yield
    finally:
        _ARCHITECTURE.reset(token)


def network(dropout: float = 0.1) -> nn.Sequential:
    """Make the network of a toy: `plain_network`, or that of the case under test.

    Args:
        dropout: dropout rate; with 0 nothing draws random numbers.
    """
    return _ARCHITECTURE.get()(dropout)


class Toy(pl.LightningModule):
    """A classifier of random images.

    Args:
        optimizer: a name in `OPTIMIZERS`.
        net: a network from images of shape (batch, 1, 8, 8) to four logits; default: `network()`.
    """

    def __init__(self, optimizer: str = "sgd", net: nn.Module | None = None) -> None:
        super().__init__()
        self.net: Any = net if net is not None else network()
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        """Cross entropy of a batch, in the precision of the parameters."""
        x, y = batch
        return F.cross_entropy(self.net(x.to(next(self.parameters()).dtype)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Manual(SparsityMixin, Toy):
    """A toy with manual optimization: two optimizers, the second stepped every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        early, late = ([p for layer in part for p in layer.parameters()] for part in (self.net[:4], self.net[4:]))
        return torch.optim.SGD(early, lr=0.05, momentum=0.9), torch.optim.AdamW(late, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizers: Any = self.optimizers()
        loss = self.loss(batch) + self.sparsity_penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        optimizers[0].step()
        if batch_idx % 2 == 0:
            optimizers[1].step()
        return loss.detach()


def toy(optimizer: str = "sgd", seed: int = 0, **options: Any) -> Toy:
    """Make a `Toy` whose initial weights depend only on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Toy(optimizer, **options)


def loader(batches: int = BATCHES, batch_size: int = BATCH, rank: int = 0, world_size: int = 1) -> TensorLoader:
    """Make a loader of random images and labels, the same at every call; a run can resume inside an epoch."""
    generator = torch.Generator().manual_seed(5)
    count = batches * batch_size * world_size
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    ones = torch.ones(1)
    return TensorLoader(images, labels, ones / 2, ones / 2, batch_size, shuffle=True, rank=rank, world_size=world_size)


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    """Make a Trainer for three epochs on the CPU without output; `options` are passed to it."""
    settings = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options}, callbacks=list(callbacks))


def fit(
    module: pl.LightningModule, *callbacks: Callback, ckpt_path: Any = None, batch_size: int = BATCH, **options: Any
) -> pl.Trainer:
    """Train a module on the toy data.

    Args:
        module: the module to train.
        callbacks: callbacks for the Trainer.
        ckpt_path: a checkpoint to resume from.
        batch_size: images per batch; an epoch has the same images with any batch size.
        options: options for the Trainer.

    Returns:
        The Trainer after training.
    """
    runner = trainer(*callbacks, **options)
    runner.fit(module, loader(BATCHES * BATCH // batch_size, batch_size), loader(1), ckpt_path=ckpt_path)
    return runner
