import math

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sparse.core import find_targets
from lightning_sparse.models import MLP, VGG, Classifier, LeNet5, LeNet300, Regressor, ResNet, TorchvisionNetwork, WideResNet
from lightning_sparse.testing import fit


def weights(net: nn.Module) -> int:
    return sum(target.weight.numel() for target in find_targets(net))


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (lambda: ResNet(10, depth=32, width=2), 1_855_584),
        (lambda: ResNet(100, depth=32, width=2), 1_867_104),
        (lambda: ResNet(200, depth=32, width=2), 1_879_904),
        (lambda: VGG(10), 20_024_000),
        (lambda: VGG(100), 20_070_080),
        (lambda: VGG(200, image_size=64), 20_121_280),
        (lambda: ResNet(100, depth=20), 276_656),
        (lambda: LeNet300(), 266_200),
        (lambda: LeNet5(), 430_500),
    ],
)
def test_prunable_weights(net: object, expected: int) -> None:
    with torch.device("meta"):
        assert weights(net()) == expected  # type: ignore[operator]


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (lambda: WideResNet(10, 1, blocks=(1, 2, 2)), 170_298),
        (lambda: WideResNet(10, 1, blocks=(2, 3, 3)), 267_514),
        (lambda: WideResNet(10, 3, blocks=(3, 4, 3), width=2), 1_154_074),
        (lambda: WideResNet(200, 3, blocks=(3, 4, 3), width=4), 4_644_120),
    ],
)
def test_all_parameters(net: object, expected: int) -> None:
    with torch.device("meta"):
        assert parameters(net()) == expected  # type: ignore[operator]


@pytest.mark.parametrize(
    ("net", "channels", "size"),
    [
        (lambda: MLP(7, 3, 9, hidden=[5], batch_norm=True), 3, 9),
        (lambda: MLP(7, 1, 8, hidden=[]), 1, 8),
        (lambda: LeNet300(7), 1, 28),
        (lambda: LeNet5(7, 3, 16), 3, 16),
        (lambda: ResNet(7, 3, depth=8, width=0.5), 3, 8),
        (lambda: WideResNet(7, 1, blocks=(1, 1, 1)), 1, 28),
        (lambda: VGG(7, 3, 64, width=0.1), 3, 64),
        (lambda: TorchvisionNetwork(7, model="squeezenet1_1"), 3, 32),
    ],
)
def test_outputs(net: object, channels: int, size: int) -> None:
    made = net()  # type: ignore[operator]
    assert made(torch.rand(2, channels, size, size)).shape == (2, 7)


def test_resnet_56_has_its_published_depth() -> None:
    with torch.device("meta"):
        layers = [m for m in ResNet(depth=56).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 56 + 2  # and two shortcuts


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ResNet(depth=21), "depth=21 is not 6n"),
        (lambda: WideResNet(blocks=(1, 2)), "must name three stages"),
        (lambda: LeNet5(image_size=8), "at least 16 pixels, not image_size=8"),
        (lambda: VGG(image_size=8), "at least 16 pixels"),
        (lambda: TorchvisionNetwork(model="resnet1"), "model='resnet1' is no classifier of torchvision"),
        (lambda: TorchvisionNetwork(in_channels=1), "wants three channels, not in_channels=1"),
    ],
)
def test_refusals(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]


def test_data_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=1 is regression, not classification; use the model Regressor"):
        Classifier(LeNet300, num_classes=1)
    module = Regressor(MLP, 10, 1, 8)
    with pytest.raises(
        ValueError, match=r"Regressor predicts numbers of shape \[4, 10\], but the targets are torch.int64 of"
    ):
        module.training_step((torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), 0)


def test_the_classifier_takes_optimizer_and_scheduler() -> None:
    module = Classifier(
        LeNet300,
        in_channels=1,
        image_size=28,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.5),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    )
    made = module.configure_optimizers()
    assert isinstance(made["optimizer"], torch.optim.Adam)
    assert isinstance(made["lr_scheduler"], torch.optim.lr_scheduler.StepLR)


def test_the_default_cosine_may_end_before_the_run_does() -> None:
    """As methods that rewind the learning rate need it: half of twelve steps, and then zero."""
    module = Classifier(LeNet300, in_channels=1, image_size=8, num_classes=4, annealing=0.5)
    rates: list[float] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(module, Note())
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * min(step, 6) / 6)) for step in range(12)])
    with pytest.raises(ValueError, match=r"annealing=2 must be a fraction of the run, above 0 and up to 1"):
        Classifier(annealing=2)
