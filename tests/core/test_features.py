"""Which layers are compared, and what is seen of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_sparse.core import FeatureLayer, FeatureTap, feature_layers, group_features
from lightning_sparse.models import MLP, VGG, Classifier, LeNet5, ResNet, WideResNet

MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "ResNet-20": (ResNet, 32, {"32x32": 3, "16x16": 3, "8x8": 3}),
    "ResNet-56": (lambda: ResNet(depth=56), 32, {"32x32": 9, "16x16": 9, "8x8": 9}),
    "WRN-18": (WideResNet, 32, {"32x32": 2, "16x16": 3, "8x8": 3}),
    "VGG-19": (VGG, 32, {"32x32": 2, "16x16": 2, "8x8": 4, "4x4": 4, "2x2": 4}),
    "ResNet-18": (torchvision.models.resnet18, 64, {"16x16": 2, "8x8": 2, "4x4": 2, "2x2": 2}),
    "ResNet-50": (torchvision.models.resnet50, 64, {"16x16": 3, "8x8": 4, "4x4": 6, "2x2": 3}),
    "ViT": (lambda: torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32), 32, {"tokens": 3}),
    "MLP": (lambda: MLP(in_channels=3, image_size=32), 32, {"vectors": 2}),
    "LeNet-5": (lambda: LeNet5(in_channels=3, image_size=32), 32, {"all": 2}),
    "in a module": (Classifier, 32, {"32x32": 3, "16x16": 3, "8x8": 3}),
}
PAIRS = {"ResNet-20": 18, "ResNet-56": 216, "ResNet-18": 8, "ResNet-50": 54}


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_and_grouped(name: str) -> None:
    make, size, expected = MODELS[name]
    with torch.device("meta"):
        net = make().train()
        tap = FeatureTap(feature_layers(net))
        tap.open = True
        net(torch.empty(4, 3, size, size))
    seen = tap.take()
    groups = group_features([layer for layer, _ in seen], [feature.shape for _, feature in seen], "auto")
    assert {group: len(members) for group, members in groups.items()} == expected
    assert all(len(feature) == 4 for _, feature in seen)
    if name in PAIRS:
        assert sum(len(members) * (len(members) - 1) for members in groups.values()) == PAIRS[name]
    assert len(group_features([layer for layer, _ in seen], [f.shape for _, f in seen], "all")["all"]) == len(seen)


def test_units_end_behind_the_activation() -> None:
    shared = nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        shared,
        nn.Conv2d(4, 4, 3),
        shared,
        nn.Flatten(),
    )
    assert [layer.name for layer in feature_layers(net)] == ["2", "3", "5"]
    assert [layer.name for layer in feature_layers(torch.compile(net))] == ["2", "3", "5"]


def test_modules_that_line_up_blocks_are_stages() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

    net = nn.ModuleDict({"stages": nn.ModuleList([Stage(), Stage()]), "head": nn.Sequential(nn.Linear(4, 4))})
    names = [layer.name for layer in feature_layers(net)]
    assert names == ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]


def test_patterns() -> None:
    net = ResNet(depth=14)
    blocks = [f"stages.{stage}.{block}" for stage in range(3) for block in range(2)]
    for patterns in (None, ["stages.*.*"], ["type:_Block"], [r"re:^stages\.\d\.\d$"], "stages.[012].?"):
        assert [layer.name for layer in feature_layers(net, patterns)] == blocks
    assert [layer.name for layer in feature_layers(net, ["!stages.0.*"])] == blocks[2:]
    assert [layer.name for layer in feature_layers(net, ["bn1", "stages.0.*"])] == ["bn1", *blocks[:2]]
    found = feature_layers(net, groups={"ends": ["stages.0.0", "stages.2.1"], "last": ["stages.2.*"]})
    shapes = [torch.Size([4, 2, 8, 8])] * 4
    assert group_features(found, shapes, "auto") == {"ends": [0, 1], "last": [2, 3]}


def test_samples_come_first() -> None:
    for batch_first in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        tap = FeatureTap(feature_layers(net))
        tap.open = True
        net(torch.ones((5, 3, 8) if batch_first else (3, 5, 8)))
        assert [tuple(feature.shape) for _, feature in tap.take()] == [(5, 3, 8), (5, 3, 8)]


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))


def test_only_what_is_trained_is_seen() -> None:
    net = pair()
    tap = FeatureTap(feature_layers(net, ["*"]))
    x = torch.ones(4, 2)
    net(x)
    assert tap.take() == []  # it is closed
    tap.open = True
    copy.deepcopy(net)(x)
    with torch.no_grad():
        net(x)
    net.eval()(x)
    net.train()
    assert tap.take() == []
    tap.open = True
    net(x)
    last = net(2 * x)
    seen = tap.take()
    assert len(seen) == 2
    assert seen[1][1] is last or seen[1][1].equal(last)
    tap.open = True
    tap.remove()
    tap.remove()
    assert not any(module._forward_hooks for module in net.modules())


class Odd(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ({"x": 1}, "dict"),
        (None, "NoneType"),
        (torch.ones(3), "a torch.float32 of shape (3,)"),
        (torch.ones(3, 2).int(), "int32"),
    ],
)
def test_outputs_that_are_no_features(output: object, what: str) -> None:
    module = Odd(output)
    tap = FeatureTap([FeatureLayer("odd", module)])
    tap.open = True
    with pytest.raises(ValueError, match=r"The output of layer 'odd' is .*, but a feature is a tensor") as error:
        module(torch.ones(1))
    assert what in str(error.value)


def test_the_first_of_several_outputs() -> None:
    module = Odd((torch.ones(3, 2), None))
    tap = FeatureTap([FeatureLayer("block", module)])
    tap.open = True
    module(torch.ones(1))
    assert tap.take()[0][1].shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": ["stages.*.9"]}, "layers: 'stages.*.9' matches no layer; did you mean 'stages."),
        ({"layers": ["type:Block"]}, "layers: 'type:Block' matches no layer; did you mean 'type:_Block'?"),
        ({"layers": ["!conv1"]}, "layers: '!conv1' matches no layer"),
        ({"layers": ["conv1"]}, "ResNet has 1 layer ('conv1') to compare, but it takes two"),
        ({"groups": {"a": ["stages.*.*"], "b": ["fc"]}}, "groups['b']=['fc'] has 1 layer, but it takes two"),
        ({"groups": {"a": ["head"]}}, "groups['a']: 'head' matches no layer"),
        ({"layers": [3]}, "layers: 3 is not a pattern"),
    ],
)
def test_refusals(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        feature_layers(ResNet(depth=8, width=0.25), **options)
    assert sentence in str(error.value)


def test_stages_of_one_layer_each() -> None:
    layers = [FeatureLayer(name, nn.Conv2d(1, 1, 1)) for name in "ab"]
    shapes = [torch.Size([4, 1, 8, 8]), torch.Size([4, 1, 4, 4])]
    assert group_features(layers, shapes, "auto") == {"all": [0, 1]}
    with pytest.raises(ValueError, match=r"No group has two layers .* \(seen: a \(4, 1, 8, 8\), b"):
        group_features(layers, shapes, "stage")
    with pytest.raises(ValueError, match=r"\(seen: none\)"):
        group_features([], [], "auto")
