"""Image classification data modules: digits (bundled with scikit-learn), torchvision's data sets, and folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, final

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sparse.core import check_whole, first_line
from lightning_sparse.data.loader import Augmentation, TensorLoader

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "Digits", "FashionMNIST", "ImageData", "ImageFolderData"]

Arrays = tuple[Tensor, Tensor]
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Data sets of torchvision, which is imported only when needed."""


class ImageData(pl.LightningDataModule, ABC):
    """A small image set, held in memory.

    Args:
        root: folder of the data, in torchvision's layout.
        download: download the data if it is missing.
        batch_size: batch size per process.
        val_fraction: fraction of the training images held out for validation, in (0, 1).
        augmentation: augmentation of training batches; None uses the usual one for the data set.
        seed: seed of the split, the order and the augmentation.
    """

    num_classes: int
    in_channels: int
    image_size: int
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    usual_augmentation: ClassVar[Augmentation] = Augmentation()

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_whole("batch_size", batch_size, 1)
        check_whole("seed", seed, 0)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must be in (0, 1): a fraction of the training images.")
        self.root, self.download, self.batch_size = root, download, batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.augmentation = augmentation or self.usual_augmentation
        self.parts: dict[str, Arrays] = {}

    @abstractmethod
    def load(self, train: bool) -> Arrays:
        """All training or test images, as uint8 (count, channels, height, width), and their labels."""

    def setup(self, stage: str) -> None:
        """Load the images and hold out a part of the training images."""
        if self.parts:
            return
        images, labels = self.load(train=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        held_out = _held_out(len(labels), self.val_fraction)
        self.parts = {
            "train": (images[order[held_out:]], labels[order[held_out:]]),
            "val": (images[order[:held_out]], labels[order[:held_out]]),
            "test": self.load(train=False),
        }

    def loader(self, part: str, **options: Any) -> TensorLoader:
        """A loader over one part: train, val or test."""
        trainer = self.trainer
        images, labels = self.parts[part]
        return TensorLoader(
            images,
            labels,
            torch.tensor(self.mean),
            torch.tensor(self.std),
            self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            **options,
        )

    def train_dataloader(self) -> TensorLoader:
        return self.loader("train", shuffle=True, augmentation=self.augmentation)

    def val_dataloader(self) -> TensorLoader:
        return self.loader("val")

    def test_dataloader(self) -> TensorLoader:
        return self.loader("test")

    predict_dataloader = test_dataloader


@final
class Digits(ImageData):
    """1,797 handwritten digits of 8x8 pixels that come with scikit-learn: nothing to download.

    A fixed fifth of them is the test set. `root` and `download` are not used.
    """

    num_classes, in_channels, image_size = 10, 1, 8
    mean, std = (0.3053,), (0.3763,)

    def load(self, train: bool) -> Arrays:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        chosen = order[len(labels) // 5 :] if train else order[: len(labels) // 5]
        return images[chosen], labels[chosen]


class _TorchvisionData(ImageData):
    """A data set class of torchvision with `train`, `data` and `targets`."""

    def prepare_data(self) -> None:
        if self.download:
            try:
                self._open(train=True, download=True)
                self._open(train=False, download=True)
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"{type(self).__name__} cannot be downloaded to root='{self.root}' ({first_line(error)}); check the "
                    "network, or give a folder that holds it."
                ) from error

    def load(self, train: bool) -> Arrays:
        try:
            data = self._open(train=train, download=False)
        except RuntimeError as error:
            name = type(self).__name__
            raise FileNotFoundError(
                f"{name} is not in root='{self.root}' ({error}); give its folder as root, or set download=True."
            ) from None
        images = torch.as_tensor(data.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(data.targets).long()

    def _open(self, train: bool, download: bool) -> Any:
        import torchvision

        return getattr(torchvision.datasets, type(self).__name__)(self.root, train=train, download=download)


@final
class MNIST(_TorchvisionData):
    """MNIST: 70,000 handwritten digits of 28x28 pixels."""

    num_classes, in_channels, image_size = 10, 1, 28
    mean, std = (0.1307,), (0.3081,)


@final
class FashionMNIST(_TorchvisionData):
    """Fashion-MNIST: 70,000 pieces of clothing of 28x28 pixels."""

    num_classes, in_channels, image_size = 10, 1, 28
    mean, std = (0.2860,), (0.3530,)


@final
class CIFAR10(_TorchvisionData):
    """CIFAR-10: 60,000 color images of 32x32 pixels in 10 classes."""

    num_classes, in_channels, image_size = 10, 3, 32
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    usual_augmentation = Augmentation(pad=4, flip=True)


@final
class CIFAR100(_TorchvisionData):
    """CIFAR-100: 60,000 color images of 32x32 pixels in 100 classes."""

    num_classes, in_channels, image_size = 100, 3, 32
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    usual_augmentation = Augmentation(pad=4, flip=True)


@final
class ImageFolderData(pl.LightningDataModule):
    """Images in folders `train/<class>/` and `test/<class>/` (or `val/`), such as TinyImageNet, read from disk.

    Args:
        root: the folder that holds `train`.
        image_size: training images are padded by an eighth and cropped to it, others are resized and cropped to it.
        batch_size: batch size per process.
        val_fraction: fraction of the training images held out for validation, in (0, 1).
        num_workers: number of processes that read and decode.
        seed: seed of the split.
    """

    in_channels = 3
    mean, std = (0.48025, 0.44807, 0.39755), (0.27699, 0.26906, 0.28208)

    def __init__(
        self,
        root: str = "data",
        image_size: int = 64,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        folder = Path(root) / "train"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"root='{root}' has no folder 'train' with one folder per class; give its parent as root."
            )
        check_whole("batch_size", batch_size, 1)
        check_whole("image_size", image_size, 1)
        check_whole("num_workers", num_workers, 0)
        check_whole("seed", seed, 0)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must be in (0, 1): a fraction of the training images.")
        _check_classes(folder)
        self.root, self.image_size, self.batch_size = root, image_size, batch_size
        self.val_fraction, self.num_workers, self.seed = val_fraction, num_workers, seed
        self.num_classes = sum(entry.is_dir() for entry in folder.iterdir())

    def setup(self, stage: str) -> None:
        """Index the folders and hold out a part of the training images."""
        from torch.utils.data import Subset
        from torchvision import transforms as T
        from torchvision.datasets import ImageFolder

        size = self.image_size
        finish = [T.ToTensor(), T.Normalize(self.mean, self.std)]
        train = T.Compose(
            [T.Resize(size), T.CenterCrop(size), T.RandomCrop(size, size // 8), T.RandomHorizontalFlip(), *finish]
        )
        evaluate = T.Compose([T.Resize(size), T.CenterCrop(size), *finish])
        folder = Path(self.root)
        count = len(ImageFolder(str(folder / "train")))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = _held_out(count, self.val_fraction)
        _check_image(ImageFolder(str(folder / "train")))
        self.train_set = Subset(ImageFolder(str(folder / "train"), train), order[held_out:])
        self.val_set = Subset(ImageFolder(str(folder / "train"), evaluate), order[:held_out])
        test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        self.test_set = ImageFolder(str(test), evaluate) if test else self.val_set

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test_set)

    predict_dataloader = test_dataloader

    def _loader(self, data: Any, shuffle: bool = False) -> DataLoader[Any]:
        workers = self.num_workers
        return DataLoader(data, self.batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0)


def _held_out(count: int, val_fraction: float) -> int:
    """The number of training images held out for validation."""
    held_out = max(1, round(val_fraction * count))
    if held_out >= count:
        raise ValueError(f"val_fraction={val_fraction} of {count} images leaves none to train on; lower it.")
    return held_out


def _check_classes(folder: Path) -> None:
    """Refuse a training set of fewer than two classes, or with an empty one."""
    from torchvision.datasets.folder import has_file_allowed_extension

    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if len(classes) < 2:
        found = f"only '{classes[0].name}'" if classes else "none"
        raise ValueError(f"'{folder}' must contain at least two class folders; it has {found}.")
    for entry in classes:
        if not any(has_file_allowed_extension(str(file), IMG_EXTENSIONS) for file in entry.rglob("*")):
            raise ValueError(f"'{entry}' holds no image ({', '.join(IMG_EXTENSIONS)}); fill it, or remove the folder.")


def _check_image(data: Any) -> None:
    """Refuse a data set with an unreadable first image in any class: before training, not in a loader process."""
    seen: set[int] = set()
    for path, label in data.samples:
        if label not in seen:
            seen.add(label)
            try:
                data.loader(path)
            except OSError as error:
                raise ValueError(
                    f"'{path}' cannot be opened as an image ({first_line(error)}); remove or replace it."
                ) from error
