"""Data from a deep network in which only a few layers have weights of both signs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, final

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse.core import check_whole

__all__ = ["Teacher", "teacher_network"]


def teacher_network(
    inputs: int, width: int, depth: int, signed: int, generator: torch.Generator | None = None
) -> nn.Sequential:
    """A random ReLU network whose inner layers are non-negative, except for some that are drawn at random.

    Args:
        inputs: number of inputs of the first layer.
        width: width of all hidden layers.
        depth: number of layers with weights.
        signed: number of inner layers (neither first nor last) with weights and biases of both signs.
        generator: the only source of randomness.
    """
    inner = torch.randperm(depth - 2, generator=generator)[:signed] + 1
    layers: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(pairwise([inputs, *[width] * (depth - 1), 1])):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5)
            layer.bias.copy_(0.1 * torch.randn(fan_out, generator=generator))
            if 0 < number < depth - 1 and number not in inner:
                layer.weight.abs_()
                layer.bias.abs_()
                layer.weight.div_(0.56 * width**0.5)  # by which a non-negative layer would raise the mean signal
            layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


@final
class Teacher(pl.LightningDataModule):
    """Regression on the outputs of a random ReLU network in which only some inner layers have weights of both signs.

    Inputs are standard normal; targets have variance 1 before noise. Validation data has noise, test data has none, so that
    the test error is the distance to the teacher. The setting is that of our pilot, not of a paper.

    Args:
        samples: number of training samples; half as many for validation.
        inputs: number of inputs of the teacher.
        width: width of its hidden layers.
        depth: number of its layers with weights, at least 2.
        signed: fraction of inner layers with weights of both signs, in [0, 1].
        noise: standard deviation of the noise added to training targets.
        batch_size: None uses all samples at once.
        passes: passes over the samples per epoch.
        seed: seed of teacher, samples and order.

    Example:
        >>> data = Teacher(samples=20, depth=4)
        >>> data.setup("fit")
        >>> [tuple(tensor.shape) for tensor in next(iter(data.train_dataloader()))]
        [(20, 10), (20, 1)]
    """

    num_classes, image_size = 1, 1

    def __init__(
        self,
        samples: int = 300,
        inputs: int = 10,
        width: int = 20,
        depth: int = 8,
        signed: float = 1 / 3,
        noise: float = 0.3,
        batch_size: int | None = None,
        passes: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"samples": samples, "inputs": inputs, "width": width, "passes": passes, "batch_size": batch_size or 1}
        for name, value in sizes.items():
            check_whole(name, value, 1)
        check_whole("seed", seed, 0)
        if batch_size == 0:
            raise ValueError("batch_size=0 must be an integer >= 1, or None for all samples at once.")
        if depth < 2:
            raise ValueError(f"depth={depth} must be >= 2: a first and a last layer.")
        if not 0 <= signed <= 1:
            raise ValueError(f"signed={signed} must be in [0, 1]: the fraction of inner layers with weights of both signs.")
        if noise < 0:
            raise ValueError(f"noise={noise} must be >= 0.")
        self.samples, self.inputs, self.width, self.depth = samples, inputs, width, depth
        self.signed, self.noise, self.batch_size, self.passes, self.seed = signed, noise, batch_size, passes, seed
        self.in_channels = inputs
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Draw the teacher, inputs and noise."""
        if self.parts:
            return
        generator = torch.Generator().manual_seed(self.seed)
        self.network = teacher_network(self.inputs, self.width, self.depth, round(self.signed * (self.depth - 2)), generator)
        probe = self.network(torch.randn(4000, self.inputs, generator=generator))
        mean, std = probe.mean(), probe.std().clamp(min=1e-12)
        for part, count, noise in (
            ("train", self.samples, self.noise),
            ("val", max(1, self.samples // 2), self.noise),
            ("test", 2000, 0.0),
        ):
            x = torch.randn(count, self.inputs, generator=generator)
            y = (self.network(x) - mean) / std + noise * torch.randn(count, 1, generator=generator)
            self.parts[part] = x, y

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = (tensor.repeat(self.passes, 1) for tensor in self.parts["train"])
        if self.batch_size is None:
            return DataLoader([(x[: self.samples], y[: self.samples])] * self.passes, batch_size=None)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(TensorDataset(x, y), self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.parts["val"]), len(self.parts["val"][0]))

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.parts["test"]), len(self.parts["test"][0]))
