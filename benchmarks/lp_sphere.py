"""Training on unit Lp spheres: the cost of a step, and the published recipe.

python -m benchmarks cost-lp-sphere                     time of a step of ResNet-20 at batch 128, compared with SGD
python -m benchmarks desk-lp-sphere --data DIR          accuracy on Fashion-MNIST, reduced for one CPU core
python -m benchmarks paper-lp-sphere-fashion --data DIR the published recipe, for a GPU, or one to two hours per run
python -m benchmarks claim-hoyer --data DIR             sparsity of vectors on spheres, compared with the prediction
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.accuracy import Setting
from benchmarks.record import Options, Parts
from benchmarks.trainers import Net
from benchmarks.turns import WARM_UP, Turns, Way, in_turns, ratios
from lightning_sparse import LpSphere, RandomSparsity
from lightning_sparse.data import FashionMNIST, ImageData
from lightning_sparse.data.loader import Augmentation
from lightning_sparse.functional import expected_hoyer, hoyer_sparsity, piecewise_linear
from lightning_sparse.metrics import HoyerSparsity
from lightning_sparse.models import Classifier, WideResNet
from lightning_sparse.optim import LpSGD, sphere_groups

# ---- cost of a step -------------------------------------------------------------------------------------------------


def callback_step(model: str, rounds: int, every: str | None) -> dict[str, Any]:
    """Time steps with and without the callback. With `every`, connections are dropped and regrown at that interval."""
    topology = {"sparsity": 0.8, "start": 0, "every": every} if every else {}
    method = LpSphere(p=1.15, **topology)
    turns = Turns([method], lambda module: {"SGD": Way(), "SGD + LpSphere": Way([method])})
    turns.fit(Net(model, weight_decay=0, nesterov=True), 128, 2 * (rounds + WARM_UP))
    return turns.table("SGD")


def optimizer_step(model: str, rounds: int) -> dict[str, Any]:
    """Time forward pass, backward pass and step with SGD and with LpSGD, on one model, without Lightning."""
    net = Net(model).net
    images, labels = torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,))
    optimizers: dict[str, torch.optim.Optimizer] = {
        "SGD": torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True),
        "LpSGD": LpSGD(sphere_groups(net, 1.15, lr=0.01), lr=0.01),
    }

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    ways = {name: partial(step, optimizer) for name, optimizer in optimizers.items()}
    return ratios(in_turns(ways, rounds), "SGD")


def parts(options: Options) -> Parts:
    model, rounds = "quick" if options.quick else "resnet20", options.times(30, quick=8)
    yield ("callback, no topology",), partial(callback_step, model, rounds, None)
    yield ("callback, topology every 40 steps",), partial(callback_step, model, rounds, "40 steps")
    yield ("callback, topology every step",), partial(callback_step, model, rounds, "1 step")
    yield ("optimizer",), partial(optimizer_step, model, rounds)


# ---- accuracy -------------------------------------------------------------------------------------------------------

EXPONENTS = {0.5: (1.4, 1.3), 0.8: (1.3, 1.15), 0.9: (1.2, 1.07)}
"""p of the first four constrained layers and of the others, by sparsity."""
LP_KNOTS = ((0, 0.02), (1 / 6, 1), (1 / 3, 0.25), (0.94, 0.002), (1, 0.0001))
SGD_KNOTS = ((0, 0.025), (1 / 6, 1), (1 / 3, 0.5), (0.94, 0.005), (1, 0.00025))


class Clothes(FashionMNIST):
    """Fashion-MNIST as in the published recipe, optionally at a lower resolution, using all training images."""

    mean, std = (0.13,), (0.31,)
    pooling = 1

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = FashionMNIST(self.root).load(train)
        pooled = F.avg_pool2d(images.float(), self.pooling) if self.pooling > 1 else images
        return pooled.round().to(torch.uint8), labels


class Recipient(Classifier):
    """A classifier whose learning rate follows the published knots, step by step."""

    knots: tuple[tuple[float, float], ...] = ()

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())

        def factor(step: int) -> float:
            # As in the base class: reading the length at step 0 would load the data before the checkpoint.
            return piecewise_linear(step / self.trainer.estimated_stepping_batches if step else 0.0, self.knots)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


@dataclass(frozen=True)
class Recipe(Setting):
    """A comparison on Fashion-MNIST with WRN-18-1: plain SGD, dense or with a static mask, and spheres.

    Args:
        data: class of the images.
        network: function that makes the network.
        epochs: number of epochs; published: 50.
        batch_size: images per step.
        lr: peak learning rate of plain SGD.
        weight_decay: weight decay of the dense network.
        val_fraction: fraction of held-out validation data, as small as possible.
        pooling: side of the squares of pixels that are averaged first.
        mixing: peak of eta; published: 2 / batch size.
        free_lr: peak learning rate of all parameters that are not on a sphere. The loss here is a mean, not a sum, hence two
            rates.
    """

    data: type[ImageData] = Clothes
    network: Callable[[int, int, int], nn.Module] = WideResNet
    epochs: int = 50
    batch_size: int = 256
    lr: float = 0.4
    weight_decay: float = 4e-4
    val_fraction: float = 1e-5
    pooling: int = 1
    mixing: float = 2 / 256
    free_lr: float = 2.0

    def images(self, root: str, seed: int) -> ImageData:
        images = super().images(root, seed)
        if isinstance(images, Clothes):
            images.pooling, images.image_size = self.pooling, 28 // self.pooling
            images.augmentation = Augmentation(pad=4 // self.pooling, flip=True, cutout=6 // self.pooling)
        return images

    def module(self, method: str, data: ImageData, annealing: float) -> Classifier:
        sphere, dense = method == "LpSphere", method == "dense"
        lr, decay = self.free_lr if sphere else self.lr, self.weight_decay if dense else 0.0
        sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=not dense, weight_decay=decay)
        module = Recipient(self.network, data.num_classes, data.in_channels, data.image_size, sgd)
        module.knots = LP_KNOTS if sphere else SGD_KNOTS
        return module

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        if method == "dense":
            return []
        if method == "static":
            return [RandomSparsity(sparsity, allocation="uniform")]
        first, others = EXPONENTS[sparsity]
        return [LpSphere(p=[first] * 4 + [others] * 13, sparsity=sparsity, mixing=self.mixing, of_all_parameters=True)]

    def read(self, module: nn.Module, callbacks: Sequence[Any], *rest: Any) -> dict[str, Any]:
        weights = [p for p in module.parameters() if p.ndim > 1]
        everything = sum(p.numel() for p in module.parameters())
        hoyer = HoyerSparsity().to(module.device)
        hoyer.update(module)
        return {
            "masked of all parameters": sum(c.masks.total - c.masks.kept for c in callbacks) / everything,
            "zeros of all weights": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
            "hoyer": float(hoyer.compute()),
            "hoyer per layer": [round(float(hoyer_sparsity(w).mean()), 4) for w in weights],
        }


PUBLISHED = Recipe()
HALF = Recipe(epochs=4, batch_size=128, pooling=2, mixing=2 / 128, free_lr=1.0, lr=0.2)
"""For one CPU core: 4 epochs at half the resolution.

Batches of half the size make up for only a few of the missing steps. The rates of the free parameters are lowered to match,
and eta is raised.
"""


# ---- sparsity of vectors --------------------------------------------------------------------------------------------

FIGURE = {
    "1.1": (0.761, 0.771, 0.865, 0.363, 0.898, 0.882),
    "1.2": (0.700, 0.675, 0.769, 0.361, 0.889, 0.820),
    "1.4": (0.572, 0.524, 0.597, 0.347, 0.868, 0.721),
    "1.6": (0.476, 0.412, 0.452, 0.332, 0.849, 0.616),
    "2": (0.320, 0.273, 0.275, 0.313, 0.819, 0.456),
    "3": (0.172, 0.139, 0.116, 0.297, 0.785, 0.317),
    "6": (0.036, 0.033, 0.027, 0.285, 0.762, 0.241),
}
"""Hoyer sparsity by p, layer by layer, read from the curves of a figure in the authors' repository."""
BY_EXPONENT = tuple(f"p = {p}" for p in FIGURE)


class FigureNet(nn.Sequential):
    """Three convolutions and three linear layers with the vector lengths of the figure: 25, 144, 288, 3136, 512, 64.

    Only these lengths are known of the authors' network. The batch norms, which scale the spheres, are our choice.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs, size in ((in_channels, 16, 5), (16, 32, 3), (32, 64, 3)):
            layers += [nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if outputs < 64 else [nn.Flatten()]
        for inputs, outputs in ((64 * (image_size // 4) ** 2, 512), (512, 64)):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Linear(64, num_classes))


@dataclass(frozen=True)
class OnSpheres(Recipe):
    """All weights on spheres of one p and none removed, as in the authors' code when the figure was made."""

    network: Callable[[int, int, int], nn.Module] = FigureNet
    epochs: int = 6
    free_lr: float = 1.0

    def module(self, method: str, data: ImageData, annealing: float) -> Classifier:
        return super().module("LpSphere", data, annealing)

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        return [LpSphere(p=float(method.removeprefix("p = ")), mixing=self.mixing, free=())]

    def read(self, module: nn.Module, callbacks: Sequence[Any], *rest: Any) -> dict[str, Any]:
        weights = [weight for weight in module.parameters() if weight.ndim > 1]
        p = callbacks[0].p
        return {
            "hoyer per layer": [round(float(hoyer_sparsity(weight).mean()), 4) for weight in weights],
            "predicted": [round(expected_hoyer(p, weight[0].numel()), 4) for weight in weights],
        }
