"""Networks of every shape with dead channels, and how many outputs of which layers can go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def kill(layer: nn.Module, outputs: list[int], dim: int = 0) -> None:
    """What a mask of channels does: weights are zero, biases and normalization stay."""
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight.data.index_fill_(dim, torch.tensor(outputs), 0.0)


def unsettle(net: nn.Module, seed: int = 0) -> nn.Module:
    """Normalizations and biases that emit something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            for tensor in (part.weight.data, part.bias.data, part.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return net.eval()


class Block(nn.Module):
    """Two convolutions with normalization around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.two, self.norm2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))


class Residual(nn.Module):
    """A stream of channels that a stem and two blocks write to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.fc = nn.Conv2d(2, 8, 3, padding=1), nn.Sequential(Block(8), Block(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))
        return out


class Concatenated(nn.Module):
    """Two branches side by side, read by a convolution that pads and by one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.padded, self.bare = nn.Conv2d(10, 5, 3, padding=1), nn.Conv2d(10, 5, 3)
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([torch.sigmoid(self.left(x)), F.gelu(self.right(x))], 1)
        out: Tensor = self.fc(torch.cat([F.relu(self.padded(both)).mean((2, 3)), F.relu(self.bare(both)).mean((2, 3))], 1))
        return out


class Dense(nn.Module):
    """Every layer reads all layers before it, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.layers = nn.ModuleList(nn.Conv2d(4 + 4 * n, 4, 3, padding=1) for n in range(4))
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Written(nn.Module):
    """Layers, and a forward pass written beside them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.written = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.written(self, x, *more)


class Grouped(nn.Module):
    """Convolutions in groups: two, and one per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 1)
        self.halves = nn.Conv2d(8, 12, 3, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.halves(F.relu(self.stem(x))))
        out: Tensor = self.last(F.relu(self.norm(self.depthwise(x)))).mean((2, 3))
        return out


def residual() -> tuple[nn.Module, dict[str, int]]:
    net = Residual()
    for layer in (net.stem, net.blocks[0].two, net.blocks[1].two):
        kill(layer, [1, 4, 6])
    kill(net.blocks[0].one, [0, 2, 4, 5])
    kill(net.blocks[1].one, [3])  # dead alone: it would have to be its own carrier
    return net, {"stem": 2, "blocks.0.two": 2, "blocks.1.two": 2, "blocks.0.one": 3}  # one of each stays as a carrier


def concatenated() -> tuple[nn.Module, dict[str, int]]:
    net = Concatenated()
    kill(net.left, [0, 1, 5])
    kill(net.right, [2, 3])
    return net, {"left": 2, "right": 1}  # a carrier in each branch, for the convolution that pads


def dense() -> tuple[nn.Module, dict[str, int]]:
    net = Dense()
    for number, layer in enumerate(net.layers):
        kill(layer, [number % 4, (number + 2) % 4])
        layer.bias.data[number % 4] = -1.0  # the other emits something
        layer.bias.data[(number + 2) % 4] = 0.5 * number
    return net, {"layers.0": 2, "layers.1": 1, "layers.2": 1, "layers.3": 2}  # the last is read by no convolution


def split() -> tuple[nn.Module, dict[str, int]]:
    """Groups of which one has a constant that none can carry for the others."""
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    kill(net[0], [0, 1, 4, 5, 6])
    net[0].bias.data[:] = -1.0
    net[0].bias.data[0] = 1.0
    return net, {"0": 2}


def grouped() -> tuple[nn.Module, dict[str, int]]:
    net = Grouped()
    net.stem.bias.data.clamp_(max=-0.1)  # dead channels emit nothing
    kill(net.stem, [0, 1, 6])  # two of one half and one of the other: halves must stay equal
    kill(net.depthwise, [1, 2, 7])
    net.last.weight.data[:, [3, 8]] = 0  # nobody reads them: 1, 2, 3 of one half, 7, 8 of the other
    return net, {"stem": 2, "halves": 4, "depthwise": 4}


def transposed() -> tuple[nn.Module, dict[str, int]]:
    net = nn.Sequential(
        nn.ConvTranspose2d(2, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 2, 1)
    )
    kill(net[0], [0, 3, 4], dim=1)
    net[0].bias.data.fill_(0.5)
    return net, {"0": 2}  # places at the border get less of a constant


def flattened() -> tuple[nn.Module, dict[str, int]]:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 9),
        nn.ReLU(),
        nn.Linear(9, 4),
    )
    kill(net[0], [1, 2, 5])
    net[7].weight.data[:, 3] = 0  # a neuron that nobody reads
    return net, {"0": 3, "5": 1}


def halved() -> tuple[nn.Module, dict[str, int]]:
    """Both halves of a layer's outputs are added: a channel goes with its twin, and what they emit is counted once."""

    def forward(net: Any, x: Tensor) -> Tensor:
        first, second = net.both(x).chunk(2, 1)
        out: Tensor = net.last((torch.sigmoid(first) + torch.sigmoid(second)).mean((2, 3)))
        return out

    net = Written(forward, both=nn.Conv2d(2, 8, 1), last=nn.Linear(4, 2))
    kill(net.both, [0, 4, 5, 7])
    return net, {"both": 2}


def leaky() -> tuple[nn.Module, dict[str, int]]:
    """One slope for all channels, and one for each."""
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.PReLU(), nn.Conv2d(6, 5, 3), nn.PReLU(5), nn.Flatten(), nn.Linear(80, 2))
    net[3].weight.data = torch.arange(5) / 5
    kill(net[0], [0, 3])
    kill(net[2], [1, 2, 4])
    return net, {"0": 2, "2": 3}


def sloped() -> tuple[nn.Module, dict[str, int]]:
    """Branches side by side behind one slope each, and one slope behind both."""

    def forward(net: Any, x: Tensor) -> Tensor:
        both = net.joint(torch.cat([net.first(net.left(x)), net.second(net.right(x))], 1))
        out: Tensor = net.last(both.mean((2, 3)))
        return out

    slopes = {name: nn.PReLU() for name in ("first", "second", "joint")}
    net = Written(forward, left=nn.Conv2d(2, 6, 3), right=nn.Conv2d(2, 4, 3), **slopes, last=nn.Linear(10, 2))
    kill(net.left, [0, 5])
    kill(net.right, [1])
    return net, {"left": 2, "right": 1}


def tokens() -> tuple[nn.Module, dict[str, int]]:
    """One slope where channels come last."""

    def forward(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.last(net.slope(net.first(x.flatten(2).transpose(1, 2))).mean(1))
        return out

    net = Written(forward, first=nn.Linear(2, 5), slope=nn.PReLU(), last=nn.Linear(5, 3))
    kill(net.first, [1, 3])
    return net, {"first": 2}


def windows() -> tuple[nn.Module, dict[str, int]]:
    """A Swin transformer: channels behind, windows cut and put together, halves taken along rows."""
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=3)
    for name, layer in net.named_modules():
        if name.endswith("mlp.0"):
            kill(layer, list(range(0, layer.out_features, 2)))
    return net, {"features.1.1.mlp.0": 16, "features.3.0.mlp.0": 32}


NETS = [residual, concatenated, dense, grouped, split, transposed, flattened, halved, leaky, sloped, tokens, windows]


def sample(make: Callable[[], tuple[nn.Module, dict[str, int]]], count: int) -> Tensor:
    """Inputs for one of these."""
    return torch.randn(count, 3 if make is windows else 2, 8, 8)
