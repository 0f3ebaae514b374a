"""Small image sets as tensors: whole batches are sliced and augmented at once, and a run can resume inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augmentation", "TensorLoader", "augment"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training batch, drawn per image.

    Args:
        pad: pixels of reflection padding before a crop of the original size; 0 for none.
        flip: mirror left to right with probability one half.
        cutout: side of a square that is set to zero; 0 for none.
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop, mirror and cut each image of a batch at random.

    Args:
        images: float, of shape (batch, channels, height, width).
        how: the changes and their strength.
        generator: CPU generator; the only source of randomness.
    """
    count, _, height, width = images.shape
    if how.pad:
        padded = F.pad(images, (how.pad,) * 4, mode="reflect")
        offsets = torch.randint(2 * how.pad + 1, (2, count), generator=generator)
        rows = offsets[0, :, None] + torch.arange(height)
        columns = offsets[1, :, None] + torch.arange(width)
        images = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if how.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if how.cutout:
        center = torch.stack([torch.randint(size, (count,), generator=generator) for size in (height, width)])
        low, high = center - how.cutout // 2, center - how.cutout // 2 + how.cutout
        inside = [
            (torch.arange(size) >= low[axis, :, None]) & (torch.arange(size) < high[axis, :, None])
            for axis, size in enumerate((height, width))
        ]
        images = images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)
    return images.contiguous()


class TensorLoader:
    """Batches of (images, labels) from tensors in memory.

    Order and augmentation depend only on (seed, epoch, batch). So ranks agree, resumed runs see the remaining batches, and
    no global generator is used.

    Args:
        images: uint8 of shape (count, channels, height, width).
        labels: of shape (count,).
        mean: mean per channel, on the scale 0 to 1.
        std: standard deviation per channel.
        batch_size: batch size per rank.
        shuffle: use a new order every epoch; otherwise keep the order.
        augmentation: augmentation of training batches.
        seed: seed of order and augmentation.
        rank: rank of this process.
        world_size: number of processes; each takes every world_size-th image, and the last ones are repeated so that all get
            the same number.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.labels = images, labels
        self.scale = (1 / (255 * std)).view(1, -1, 1, 1)
        self.shift = (mean / std).view(1, -1, 1, 1)
        self.batch_size, self.shuffle, self.augmentation = batch_size, shuffle, augmentation
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self._served = 0
        self._resume = (0, 0)

    batch_sampler = None

    @property
    def sampler(self) -> TensorLoader:
        """The loader itself: Lightning tells a loader's `sampler` which epoch begins."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        per_rank = -(-len(self.images) // self.world_size)
        return -(-per_rank // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.images))
        if self.shuffle:
            order = torch.randperm(len(order), generator=self._generator(0))
        order = torch.cat([order, order[: -len(order) % self.world_size]])[self.rank :: self.world_size]
        epoch, served = self._resume
        self._resume = (0, 0)
        for batch in range(served if epoch == self.epoch else 0, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.images[index].float() * self.scale - self.shift
            if self.augmentation is not None:
                images = augment(images, self.augmentation, self._generator(1 + batch * self.world_size + self.rank))
            self._served = batch + 1
            yield images, self.labels[index]

    def _generator(self, stream: int) -> torch.Generator:
        words = torch.tensor([self.seed, self.epoch, stream]) * torch.tensor([1_000_003, 97_003_153, 7_919])
        return torch.Generator().manual_seed(int(words.sum()) % (1 << 63))

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the position in it."""
        return {"epoch": self.epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """If the next iteration is of the same epoch, continue after the batches that were already served."""
        self._resume = (state["epoch"], state["served"])
