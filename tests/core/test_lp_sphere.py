"""Which weights go onto spheres, and with which p."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_sparse.core import check_exponents, find_spheres
from lightning_sparse.models import ResNet, WideResNet


def names(module: nn.Module, **options: Any) -> list[str]:
    return [sphere.target.name for sphere in find_spheres(module, 1.2, **options)]


def test_the_published_network_has_seventeen_spheres() -> None:
    """WRN-18-1: the stem and two convolutions in each of eight blocks; not the shortcuts, not the classifier."""
    module = WideResNet(10, 1, 28)
    assert sum(parameter.numel() for parameter in module.parameters()) == 267_514
    found = names(module)
    assert len(found) == 17
    assert found[0] == "conv1.weight"
    assert not any("shortcut" in name or "fc" in name or "bn" in name or "bias" in name for name in found)


def test_downsampling_by_its_name_in_torchvision() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.downsample = nn.Conv2d(3, 3, 3), nn.Sequential(nn.Conv2d(3, 3, 1))
            self.fc = nn.Linear(3, 2)

    assert names(Block()) == ["conv.weight"]
    assert names(Block(), free=[":first"]) == ["downsample.0.weight", "fc.weight"]
    assert names(Block(), free="downsample") == ["conv.weight", "fc.weight"]
    assert names(Block(), targets=["!conv"], free=[":last"]) == ["downsample.0.weight"]


def test_grouped_and_transposed_convolutions() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(8, 6, 3), nn.ConvTranspose1d(6, 6, 3, groups=2), nn.Linear(6, 2)
    )
    with pytest.raises(ValueError, match=r"'2.weight' is a grouped transposed convolution.*free=\[..., '2.weight'\]"):
        find_spheres(net, 1.2)
    grouped, transposed = find_spheres(net, 1.2, free=["2", ":last"])
    assert (grouped.dim, transposed.dim) == (0, 1)
    assert grouped.target.weight.shape[grouped.dim] == 8
    assert transposed.target.weight.shape[transposed.dim] == 6


def test_p_for_all_by_list_and_by_name() -> None:
    net = ResNet(depth=8)
    count = len(find_spheres(net, 1.2))
    listed = [1.1 + 0.1 * i for i in range(count)]
    assert [sphere.p for sphere in find_spheres(net, listed)] == listed
    named = {sphere.target.name: sphere.p for sphere in find_spheres(net, {"conv1": 1.4, "stages.1": 2, "*": 1.1})}
    assert named["conv1.weight"] == 1.4
    assert named["stages.1.0.conv2.weight"] == 2.0
    assert named["stages.2.0.conv2.weight"] == 1.1


@pytest.mark.parametrize(
    ("p", "sentence"),
    [
        ([1.2, 1.3], "p lists 2 values for 1 constrained weights (0.weight)"),
        ({"head": 1.2}, "p: the glob 'head' matches none of the constrained weights (0.weight)"),
    ],
)
def test_p_that_does_not_fit(p: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        find_spheres(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), p)
    assert sentence in str(error.value)


def test_p_that_leaves_a_layer_out() -> None:
    with pytest.raises(ValueError, match=r"has no entry for '1.weight'; add '\*' for all others"):
        find_spheres(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)), {"0": 1.2})


def test_weights_without_vectors() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' has outputs of a single entry, which a sphere would hold at 1 or -1"):
        find_spheres(nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2)), 1.2)


def test_shards_are_refused() -> None:
    """A stand-in, for a DTensor needs a process group."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].weight.placements = ("Shard(dim=1)",)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'0.weight' is sharded.*use 'ddp', or keep it free"):
        find_spheres(net, 1.2)


@pytest.mark.parametrize("p", [1.0, 0.5, "1.2", [1.2, 1.0], {"*": 0.9}, None, float("nan"), True])
def test_exponents_out_of_range(p: Any) -> None:
    with pytest.raises(ValueError, match=r"p.*=.* must be a finite number above 1"):
        check_exponents(p)
    check_exponents([torch.tensor(1.2).item(), 2])
