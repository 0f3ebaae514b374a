"""Shared parts of the benchmarks: quiet Trainers that can be paused or killed, networks by name, and random images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

import lightning as L
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_sparse
from benchmarks.record import Options
from lightning_sparse import AtomicCheckpointIO
from lightning_sparse.models import ResNet


def quiet(callbacks: Sequence[L.Callback] = (), device: str = "auto", **options: Any) -> L.Trainer:
    """Make a Trainer on one device that prints and writes nothing unless options request it."""
    how: dict[str, Any] = {"accelerator": "gpu" if device == "cuda" else device, "devices": 1, "logger": False}
    how |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(callbacks=list(callbacks), **how | options)


def wait_while(file: Path | None) -> None:
    """Wait until the file no longer exists."""
    while file is not None and file.exists():
        sleep(1.0)


class Pause(L.Callback):
    """Let a run finish its current step and save its state before it pauses or ends.

    Args:
        file: training pauses while this file exists.
        checkpoint: path for the state, saved when the run pauses or receives SIGTERM.
    """

    def __init__(self, file: Path | None, checkpoint: Path | None = None) -> None:
        self.file, self.checkpoint = file, checkpoint

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.checkpoint and (self.waits(trainer) or trainer.received_sigterm):
            trainer.save_checkpoint(self.checkpoint)
        self.on_validation_batch_end(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        while self.waits(trainer):
            sleep(1.0)

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.on_validation_batch_end(trainer)

    def waits(self, trainer: L.Trainer) -> bool:
        """Whether to pause. After SIGTERM, the Trainer ends the run by itself after the current step."""
        return self.file is not None and self.file.exists() and not trainer.received_sigterm


def resumable(
    checkpoint: Path | None, epochs: int, stop: Path | None = None
) -> tuple[list[L.Callback], dict[str, Any], Path | None]:
    """Callbacks and options of a Trainer that saves its state about twenty times, and the checkpoint to resume from.

    Args:
        checkpoint: path for the state; None saves nothing.
        epochs: number of epochs of the run.
        stop: training pauses while this file exists.
    """
    if checkpoint is None:
        return [Pause(stop)], {}, None
    saving = ModelCheckpoint(
        checkpoint.parent,
        checkpoint.stem,
        every_n_epochs=max(1, epochs // 20),
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    options = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    return [Pause(stop, checkpoint), saving], options, checkpoint if checkpoint.exists() else None


def trained(
    module: L.LightningModule, data: Any, callbacks: Sequence[L.Callback], name: str, options: Options, epochs: int
) -> L.LightningModule:
    """Train a module on the CPU and return it in evaluation mode.

    With `--work`, its state is kept in that folder, and the module is not trained again.
    """
    length = options.epochs or (1 if options.quick else epochs)
    checkpoint = options.work and options.work / f"{name}-{length}-epochs-{lightning_sparse.__version__}.ckpt"
    saving, keeping, begun = resumable(checkpoint, length, options.stop)
    trainer = quiet([*callbacks, *saving], "cpu", max_epochs=length, limit_val_batches=0, **keeping)
    trainer.fit(module, data, ckpt_path=begun, weights_only=False)
    return module.eval()


def perceptron(*sizes: int) -> nn.Module:
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(32, 4, 6, 3, 192, 768, num_classes=10)
    nn.init.normal_(net.heads.head.weight, std=0.02)  # zero by default, which makes scores meaningless
    return net


def resnet18() -> nn.Module:
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return net


def chain(layers: int) -> nn.Module:
    """A chain of layers so small that only the calls take time."""
    return nn.Sequential(
        nn.AdaptiveAvgPool3d((1, 4, 4)), nn.Flatten(), *(nn.Linear(16, 16, bias=False) for _ in range(layers))
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "quick": lambda: perceptron(3072, 512, 10),
    "mlp": lambda: perceptron(3072, 512, 512, 512, 10),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ),
    "resnet8": lambda: ResNet(depth=8),
    "resnet18": resnet18,
    "resnet20": lambda: ResNet(depth=20),
    "resnet50": torchvision.models.resnet50,
    "vit": vit,
    **{f"chain of {layers}": partial(chain, layers) for layers in (3, 50, 300)},
}
"""Networks for images of 32 pixels and ten classes, except ResNet-50."""


class Net(L.LightningModule):
    """A network by name, always with the same seed; trained by SGD with momentum, with an optional term in the loss."""

    def __init__(self, name: str, **sgd: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = NETWORKS[name]()
        self.sgd = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4} | sgd
        self.term: Callable[[], Tensor] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss if self.term is None else loss + self.term()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.sgd)


def random_images(batch: int, steps: int, side: int = 32, classes: int = 10) -> DataLoader[Any]:
    """The same random batch in every step."""
    return DataLoader([(torch.rand(batch, 3, side, side), torch.randint(0, classes, (batch,)))] * steps, batch_size=None)
