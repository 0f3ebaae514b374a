"""Channel pruning to half of the multiplications, compared with Torch-Pruning at equal epochs.

python -m benchmarks desk-channels-resnet20 --data DIR     half-width ResNet-20
python -m benchmarks desk-channels-mobilenet --data DIR    timm's mobilenetv3_small_050

Torch-Pruning removes the channels from the network once, after half of the run, and the optimizer continues with the rest.
This package does the same with masks (`one-shot`), or removes channels gradually (`gradual`). Multiplications (`inference`)
and parameters are counted without the channels that have no effect, relative to the dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import Comparison, Setting
from lightning_sparse import MagnitudePruning
from lightning_sparse.core import count_macs
from lightning_sparse.data import CIFAR10, ImageData
from lightning_sparse.data.loader import Augmentation
from lightning_sparse.export import remove_dead
from lightning_sparse.models import Classifier

SHARE = 0.5
"""Fraction of the multiplications that is kept."""


class SmallImages(CIFAR10):
    """CIFAR-10 at 16x16 pixels, each the mean of four: a quarter of the work."""

    image_size = 16
    usual_augmentation = Augmentation(pad=2, flip=True)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = CIFAR10(self.root).load(train)
        return F.avg_pool2d(images.float(), 2).round().to(torch.uint8), labels


def mobilenet(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    network: nn.Module = timm.create_model("mobilenetv3_small_050", num_classes=num_classes, in_chans=in_channels)
    return network


class TorchPruning(L.Callback):
    """Remove channels with Torch-Pruning in the middle of the run, until half of the multiplications are gone.

    Args:
        everywhere: whether the channels of all layers compete; otherwise each layer loses the same fraction.
    """

    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert trainer.max_epochs
        if trainer.current_epoch == trainer.max_epochs // 2:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self.prune(pl_module.network, image_of(data))
            (group,) = trainer.optimizers[0].param_groups
            group["params"] = list(pl_module.parameters())
            trainer.optimizers[0].state.clear()

    def prune(self, network: nn.Module, image: Tensor) -> None:
        import torch_pruning

        training = network.training
        network.eval()
        allowed = SHARE * macs(network, image)
        last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
        pruner = torch_pruning.pruner.BasePruner(
            network,
            image,
            torch_pruning.importance.GroupMagnitudeImportance(),
            global_pruning=self.everywhere,
            pruning_ratio=1.0,
            iterative_steps=400,  # small steps, as in its examples, to stop near the target
            ignored_layers=[last],
        )
        while macs(network, image) > allowed:
            pruner.step()
        network.train(training)


def image_of(data: ImageData) -> Tensor:
    """A batch of two blank images in the shape that a network expects."""
    return torch.zeros(2, data.in_channels, data.image_size, data.image_size)


def macs(network: nn.Module, image: Tensor) -> int:
    """The multiplications of a network in its current shape."""
    training = network.training
    network.eval()
    counted = sum(count_macs(network, lambda: network(image), len(image)).values())
    network.train(training)
    return counted


ONE_SHOT = {"start": 0.5, "end": 0.5}
WAYS: dict[str, Callable[[], list[L.Callback]]] = {
    "dense": lambda: [],
    "Torch-Pruning, global": lambda: [TorchPruning(everywhere=True)],
    "Torch-Pruning, uniform": lambda: [TorchPruning(everywhere=False)],
    "one-shot": lambda: [MagnitudePruning(SHARE, structure="coupled", budget="macs", **ONE_SHOT)],
    "one-shot, uniform": lambda: [
        MagnitudePruning(SHARE, structure="coupled", budget="macs", allocation="uniform", **ONE_SHOT)
    ],
    "gradual": lambda: [MagnitudePruning(SHARE, structure="coupled", budget="macs")],
    "gradual, uniform": lambda: [MagnitudePruning(SHARE, structure="coupled", budget="macs", allocation="uniform")],
}


@dataclass(frozen=True)
class Slimmed(Setting):
    """A setting in which channels are removed from the network. The results include its remaining size."""

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        return WAYS[method]()

    def resumes(self, method: str) -> bool:
        return not method.startswith("Torch-Pruning")  # a checkpoint with other shapes does not load

    def read(
        self, module: Classifier, callbacks: Sequence[L.Callback], data: ImageData, stop: Path | None
    ) -> dict[str, Any]:
        dense = self.network(data.num_classes, data.in_channels, data.image_size)
        image, network = image_of(data), module.network.eval()
        if any(isinstance(callback, MagnitudePruning) for callback in callbacks):
            images = next(iter(data.test_dataloader()))[0]
            network = remove_dead(network, images)[0]
        sizes = [sum(p.numel() for p in each.parameters()) for each in (network, dense)]
        share = macs(network, image) / macs(dense, image)
        return {"inference": round(share, 5), "parameters": round(sizes[0] / sizes[1], 5)}


@dataclass(frozen=True)
class Slimming(Comparison):
    """A comparison of networks that lose channels."""

    values: ClassVar[Sequence[str]] = ("test", "inference", "parameters")
