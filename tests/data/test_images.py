from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sparse.data import (
    CIFAR10,
    Augmentation,
    Digits,
    FashionMNIST,
    ImageData,
    ImageFolderData,
    TensorLoader,
    augment,
)
from lightning_sparse.models import Classifier, ResNet


def batches(loader: TensorLoader) -> list[torch.Tensor]:
    return [x for x, _ in loader]


def make(count: int = 20, batch_size: int = 3, **options: object) -> TensorLoader:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    zero, one = torch.zeros(1), torch.ones(1) / 255
    return TensorLoader(images, torch.arange(count), zero, one, batch_size, **options)  # type: ignore[arg-type]


def labels(loader: TensorLoader) -> list[int]:
    return [int(label) for _, y in loader for label in y]


def test_every_image_once_in_order() -> None:
    assert labels(make()) == list(range(20))
    assert len(make()) == len(list(make())) == 7
    assert [float(x[0, 0, 0, 0]) for x, _ in make(batch_size=5)] == [0, 5, 10, 15]


def test_every_epoch_has_its_own_order_whatever_the_generators_do() -> None:
    loader = make(shuffle=True)
    first = labels(loader)
    assert sorted(first) == list(range(20))
    assert first != list(range(20))
    torch.rand(3)
    assert labels(loader) == first
    loader.set_epoch(1)
    assert labels(loader) != first
    assert labels(make(shuffle=True, seed=1)) != first


def test_ranks_share_the_epoch() -> None:
    parts = [labels(make(shuffle=True, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [7, 7, 7]
    assert set().union(*parts) == set(range(20))


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resuming_inside_an_epoch(stop: int) -> None:
    options = {"shuffle": True, "augmentation": Augmentation(pad=1, flip=True, cutout=2)}
    loader = make(**options)  # type: ignore[arg-type]
    loader.set_epoch(4)
    whole = batches(loader)
    iterator = iter(loader)
    for _ in range(stop):
        next(iterator)
    again = make(**options)  # type: ignore[arg-type]
    again.load_state_dict(loader.state_dict())
    again.set_epoch(4)
    rest = batches(again)
    assert len(rest) == len(whole) - stop
    assert all(a.equal(b) for a, b in zip(rest, whole[stop:], strict=True))
    again.load_state_dict(loader.state_dict())
    again.set_epoch(5)
    assert len(batches(again)) == len(whole)  # another epoch starts at its first batch


def test_augmentation_against_a_loop() -> None:
    """The oracle looks for each image among all its crops, mirrored or not."""
    images = torch.rand(16, 2, 6, 6)
    made = augment(images, Augmentation(pad=2, flip=True), torch.Generator().manual_seed(0))
    found = set()
    for image, changed in zip(images, made, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")
        crops = {(r, c, f): padded[:, r : r + 6, c : c + 6] for r in range(5) for c in range(5) for f in (0, 1)}
        hits = [key for key, crop in crops.items() if (crop.flip(2) if key[2] else crop).equal(changed)]
        assert len(hits) == 1
        found.add(hits[0])
    assert len({key[2] for key in found}) == 2
    assert len(found) > 8


def test_cutout_is_a_square_of_zeros() -> None:
    made = augment(torch.ones(200, 1, 8, 8), Augmentation(cutout=4), torch.Generator().manual_seed(0))
    holes = 64 - made.sum((1, 2, 3))
    assert holes.max() == 16
    assert holes.min() == 4  # centered in a corner
    assert made.unique().tolist() == [0, 1]


def test_digits_are_split_without_overlap() -> None:
    data = Digits()
    data.setup("fit")
    sizes = {part: len(labels) for part, (_, labels) in data.parts.items()}
    assert sizes == {"train": 1294, "val": 144, "test": 359}
    rows = [row.tobytes() for images, _ in data.parts.values() for row in images.numpy()]
    assert len(set(rows)) > 0.99 * len(rows)
    images = data.parts["train"][0].float() / 255
    assert float(images.mean()) == pytest.approx(data.mean[0], abs=0.01)
    assert float(images.std()) == pytest.approx(data.std[0], abs=0.01)


@pytest.mark.parametrize(("cls", "shape"), [(CIFAR10, (30, 32, 32, 3)), (FashionMNIST, (30, 28, 28))])
def test_torchvision_sets(cls: type[ImageData], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torchvision's class, which refuses files of another checksum."""
    calls = []

    class StandIn:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            calls.append((root, train, download))
            self.data = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
            self.targets = list(range(10)) * 3

    monkeypatch.setattr(f"torchvision.datasets.{cls.__name__}", StandIn)
    data = cls(root="somewhere", download=True, batch_size=10)
    data.prepare_data()
    data.setup("fit")
    assert calls == [
        ("somewhere", True, True),
        ("somewhere", False, True),
        ("somewhere", True, False),
        ("somewhere", False, False),
    ]
    images, labels = data.parts["test"]
    assert images.shape == (30, data.in_channels, data.image_size, data.image_size)
    assert images[1, 0, 2, 3] == StandIn("", True, False).data[(1, 2, 3, 0) if len(shape) == 4 else (1, 2, 3)]
    assert labels.tolist() == list(range(10)) * 3
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (10, data.in_channels, data.image_size, data.image_size)


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    data = CIFAR10(root=str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"CIFAR10 is not in root='.*; give its folder as root, or set download=True"
    ):
        data.setup("fit")


def test_held_out_fraction_is_checked() -> None:
    with pytest.raises(ValueError, match="val_fraction=0 must be in"):
        Digits(val_fraction=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 10), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20, 24, 3), 10 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_image_folders(folder: Path) -> None:
    data = ImageFolderData(root=str(folder), image_size=16, batch_size=4, num_workers=0)
    assert data.num_classes == 2
    module = Classifier(lambda *shape: ResNet(*shape, depth=8, width=0.25), num_classes=2, in_channels=3, image_size=16)
    runner = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    runner.fit(module, data)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (18, 2, 4)
    assert runner.test(module, data, verbose=False)[0]["test/accuracy"] <= 1
    with pytest.raises(FileNotFoundError, match="has no folder 'train'"):
        ImageFolderData(root=str(folder / "train"))


def test_the_classifier_learns_the_digits() -> None:
    L.seed_everything(0)
    module = Classifier(lambda *shape: ResNet(*shape, depth=8, width=0.5), in_channels=1, image_size=8)
    runner = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    runner.fit(module, datamodule=Digits(batch_size=64))
    assert runner.test(module, datamodule=Digits(), verbose=False)[0]["test/accuracy"] > 0.8
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)
