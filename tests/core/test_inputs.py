"""Inputs as rows and weights as matrices: their product is what the layer puts out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import InputTap, Target, as_matrix, from_matrix, input_rows, shows_inputs


class Turned(nn.Module):
    """Holds its inputs first, as `Conv1D` of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.nx, self.nf = 5, 3
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 3, bias=False), (5,)),
    (nn.Linear(5, 3, bias=False), (2, 4, 5)),
    (Turned(), (2, 4, 5)),
    (nn.Conv1d(4, 6, 3, bias=False, stride=2), (2, 4, 9)),
    (nn.Conv1d(4, 6, 4, bias=False, padding="same", dilation=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), bias=False, stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, bias=False, groups=2, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    (nn.Conv2d(4, 4, 3, bias=False, groups=4, padding="valid"), (4, 6, 6)),
    (nn.Conv3d(2, 4, 2, bias=False, padding=1, padding_mode="replicate"), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, bias=False, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, (3, 2), bias=False, stride=(2, 1), groups=2, dilation=(1, 2)), (2, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 2, bias=False, padding=2), (2, 4, 5, 5)),
]
IDS = [f"{index} {type(layer).__name__}" for index, (layer, _) in enumerate(LAYERS)]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=IDS)
def test_rows_times_the_matrix_are_the_outputs(layer: Any, shape: tuple[int, ...]) -> None:
    assert shows_inputs(layer)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    target = Target.of("weight", layer.weight, layer)
    matrix = as_matrix(target, layer.weight)
    outputs = input_rows(layer, x) @ matrix.transpose(1, 2)
    expected = layer(x)
    if hasattr(layer, "kernel_size"):
        places = expected if expected.ndim == x.ndim == len(layer.kernel_size) + 2 else expected.unsqueeze(0)
        expected = places.flatten(2).permute(0, 2, 1).flatten(0, 1)
    found = outputs.permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(found, expected.reshape(found.shape))
    assert from_matrix(target, matrix).equal(layer.weight)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=IDS)
def test_consecutive_columns_are_consecutive_inputs(layer: Any, shape: tuple[int, ...]) -> None:
    target = Target.of("weight", layer.weight, layer)
    sizes = [1] * layer.weight.ndim
    sizes[target.input_dim] = -1
    numbers = torch.arange(layer.weight.shape[target.input_dim]).view(sizes).expand(layer.weight.shape)
    columns = as_matrix(target, numbers)
    steps = columns.diff(dim=-1)
    inputs = layer.weight.shape[target.input_dim] // (layer.groups if target.shares_rows else 1)
    assert ((steps == 1) | (columns[..., 1:] == columns[..., :1])).all()
    assert (columns.unflatten(-1, (-1, inputs)).diff(dim=-1) == 1).all()


def test_what_shows_its_inputs() -> None:
    attention, recurrent = nn.MultiheadAttention(4, 2), nn.LSTM(3, 4)
    assert not shows_inputs(attention, "in_proj_weight")
    assert not shows_inputs(attention.out_proj)
    assert not shows_inputs(recurrent, "weight_ih_l0")
    assert not shows_inputs(nn.LayerNorm(4))


def test_a_shared_weight_is_seen_in_each_layer_and_copies_are_not() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    seen: list[tuple[str, int]] = []
    tap = InputTap(net, ["0.weight"], lambda name, layer, x: seen.append((name, len(x))), training=True)
    net(torch.ones(2, 3))
    assert seen == [("0.weight", 2)] * 2
    import copy

    copy.deepcopy(net)(torch.ones(2, 3))
    with torch.no_grad():
        net(torch.ones(2, 3))
    net.eval()(torch.ones(2, 3))
    assert len(seen) == 2
    tap.remove()
    net.train()(torch.ones(2, 3))
    assert len(seen) == 2
