"""HyperSparse on models that compute a loss in train mode only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sparse import HyperSparse, SparsityMonitor
from lightning_sparse.loop.dry_run import train_but_leaves
from lightning_sparse.methods.hypersparse.training_score import TrainingScore
from lightning_sparse.testing import Toy, fit, toy, trainer
from tests.helpers.detectors import Detection, Detector

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Trying to infer the `batch_size`")


def batches(size: int, channels: int = 1, count: int = 8) -> DataLoader[Any]:
    dice = torch.Generator().manual_seed(0)
    box = torch.tensor([[4.0, 4.0, size / 2, size / 2]])
    data = [
        (torch.rand(channels, size, size, generator=dice), {"boxes": box, "labels": torch.ones(1, dtype=torch.long)})
        for _ in range(count)
    ]
    return DataLoader(data, batch_size=4, collate_fn=lambda samples: tuple(map(list, zip(*samples, strict=True))))


def test_a_detector_is_scored_by_its_loss() -> None:
    modes: list[tuple[bool, ...]] = []

    class Seeing(Detector):
        def forward(self, *args: Any) -> Any:
            parts = (self, self.backbone[0], self.backbone[1], self.backbone[3], self.head)
            modes.append(tuple(part.training for part in parts))
            return super().forward(*args)

    torch.manual_seed(0)
    module, method = Detection(Seeing()), HyperSparse(0.5, pretrain=0, regularize="1 epoch")
    trainer(method, max_epochs=2).fit(module, batches(8))
    in_training, refused, tried = (True,) * 5, (False,) * 5, (True, *(False,) * 4)
    assert modes == [*([in_training] * 2), refused, tried, tried, *([in_training] * 2)]
    assert all(entry["pruned"] < 0 for entry in method.history)
    weights = [weight for name, weight in module.named_parameters() if name in method.masks]
    assert sum(int((weight == 0).sum()) for weight in weights) == sum(weight.numel() for weight in weights) // 2 + 1


def test_norms_and_dropout_of_a_trial_stay_as_in_evaluation() -> None:
    torch.manual_seed(0)
    net = Detector()
    images, targets = [torch.rand(1, 8, 8) for _ in range(4)], [{"boxes": torch.rand(1, 4)} for _ in range(4)]
    before = copy.deepcopy(net.state_dict())
    train_but_leaves(net)
    first, second = net(images, targets)["boxes"], net(images, targets)["boxes"]
    assert first.equal(second)
    assert all(before[name].equal(value) for name, value in net.state_dict().items())
    boxes = torch.cat([found["boxes"] for found in net.eval()(images)])
    assert first.equal((boxes - torch.cat([target["boxes"] for target in targets])).abs().mean())


def test_a_model_that_has_a_loss_is_tried_in_evaluation_mode_alone() -> None:
    modes: list[bool] = []

    class Seeing(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            modes.append(self.training)
            return self.loss(batch)

    fit(Seeing(), HyperSparse(0.5, pretrain=0, regularize="1 epoch"), max_epochs=2)
    assert modes == [True] * 4 + [False] * 4 + [True] * 4


def test_what_fails_in_both_modes_is_raised() -> None:
    class Broken(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if next(self.parameters()).numel() and (self.net[0].weight == 0).any():
                raise RuntimeError("a pruned model is none")
            return self.loss(batch)

    with pytest.raises(RuntimeError, match="a pruned model is none"):
        fit(Broken(net=toy().net), HyperSparse(0.5, pretrain=0, regularize="1 epoch"), max_epochs=2)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large"])
def test_detectors_of_torchvision(name: str) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    net: nn.Module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=2)
    method = HyperSparse(0.5, pretrain=0, regularize="1 epoch")
    trainer(method, max_epochs=2, limit_train_batches=1).fit(Detection(net), batches(64, channels=3, count=4))
    assert method.phase == "finetune"
    assert len(method.history) == 1
    assert method.history[0]["pruned"] < 0


def test_the_monitor_counts_a_detector() -> None:
    monitor = SparsityMonitor(table=False, report=False)
    trainer(monitor, max_epochs=1).fit(Detection(Detector()), batches(8))
    assert monitor.macs == {"model.backbone.0.weight": 9 * 8 * 64, "model.head.weight": 32}


def with_another_rank(failures: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every sum over ranks contain one more rank, which scored 8 samples with a loss of 1, or failed."""
    other = torch.tensor([-8.0, 8.0], dtype=torch.float64)

    def over_ranks(trainer: Any, numbers: Tensor) -> Tensor:
        counts = numbers[0] >= 0  # a number of failures; sums of scores are negative losses
        return numbers + (torch.tensor([failures, 8.0]).double() if counts else other)

    monkeypatch.setattr(TrainingScore, "over_ranks", staticmethod(over_ranks))


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")
def test_a_rank_without_samples_goes_on_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    class Skipping(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            modes.append(self.training)
            return self.loss(batch) if self.training else None

    with_another_rank(0.0, monkeypatch)
    method = HyperSparse(0.5, pretrain=0, regularize="1 epoch")
    fit(Skipping(), method, max_epochs=2)
    assert modes == [True] * 4 + [False] * 4 + [True] * 4
    assert len(method.history) == 1


def test_all_ranks_try_train_mode_if_one_fails_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    class Seeing(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            modes.append(self.training)
            return self.loss(batch)

    with_another_rank(1.0, monkeypatch)
    fit(Seeing(), HyperSparse(0.5, pretrain=0, regularize="1 epoch"), max_epochs=2)
    assert modes == [True] * 4 + [False] * 4 + [True] * 8
