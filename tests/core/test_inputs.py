"""Inputs as rows and weights as matrices: their product is what the layer puts out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import InputTap, Reading, Target, as_matrix, from_matrix, input_rows, shows_inputs


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
    [(part, sums, count)] = Reading(layer, (x,)).squares()
    assert part == slice(None)
    assert count == outputs.shape[1]
    torch.testing.assert_close(sums, input_rows(layer, x).square().sum(1))


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
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x

    recurrent = nn.LSTM(3, 4, 2, bidirectional=True)
    attention = nn.MultiheadAttention(4, 2)
    shown = [*(name for name, weight in recurrent.named_parameters() if weight.ndim > 1 and shows_inputs(recurrent, name))]
    assert shown == ["weight_ih_l0", "weight_ih_l0_reverse"]
    assert shows_inputs(attention, "in_proj_weight")
    assert shows_inputs(attention.out_proj)
    assert shows_inputs(nn.GRUCell(3, 4), "weight_hh")
    assert not shows_inputs(Own(4, 2), "in_proj_weight")
    assert not shows_inputs(attention, "in_proj_bias")
    assert not shows_inputs(nn.LayerNorm(4))


def read(module: nn.Module, run: Callable[[], Any], **options: Any) -> dict[str, Tensor]:
    """What each weight puts out for what it is seen to read, without biases, side by side."""
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name, _ in module.named_parameters()}
    names = [name for name, _ in module.named_parameters() if shows_inputs(owners[name], name.rpartition(".")[2])]
    products: dict[str, list[Tensor]] = {}

    def see(name: str, reading: Reading) -> None:
        layer = owners[name]
        target = Target.of(name, module.get_parameter(name), layer)
        matrix = as_matrix(target, target.weight)
        assert from_matrix(target, matrix).equal(target.weight)
        for part, rows in reading.rows():
            products.setdefault(name, []).extend((rows @ matrix[part].transpose(1, 2)).detach().unbind(0))

    tap = InputTap(module, names, see, **options)
    try:
        run()
    finally:
        tap.remove()
    return {
        name: torch.cat([*found], -1 if len({len(part) for part in found}) == 1 else 0) for name, found in products.items()
    }


ATTENTION = {
    "sequence first": {},
    "batch first": {"batch_first": True},
    "without biases": {"bias": False},
    "sizes of their own": {"kdim": 6, "vdim": 10},
}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("train", [True, False])
def test_attention(options: dict[str, Any], train: bool) -> None:
    """What is seen gives queries, keys and values, and what comes out."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, **options).train(train)
    if attention.out_proj.bias is not None:
        nn.init.normal_(attention.out_proj.bias)  # zero at first
    query, key = torch.randn(5, 3, 8), torch.randn(5, 3, options.get("kdim", 8))
    value = torch.randn(5, 3, options.get("vdim", 8))
    torch.manual_seed(1)
    expected, shares = attention(query, key, value)
    drawn = torch.rand(1)
    outputs: list[Any] = []

    def run() -> None:
        torch.manual_seed(1)
        outputs.extend((*attention(query, key, value=value), torch.rand(1)))

    found = read(attention, run)
    assert outputs[0].equal(expected)
    assert outputs[1].equal(shares)
    assert outputs[2].equal(drawn)
    split = {f"{part}_proj_weight": getattr(attention, f"{part}_proj_weight") for part in "qkv"}
    if "kdim" not in options:
        split = dict(zip(split, attention.in_proj_weight.chunk(3), strict=True))
        found |= dict(zip(split, found.pop("in_proj_weight").chunk(3, -1), strict=True))
    for name, x in zip(split, (query, key, value), strict=True):
        torch.testing.assert_close(found[name], (x @ split[name].T).detach().flatten(0, 1))
    bias = 0 if attention.out_proj.bias is None else attention.out_proj.bias
    expected = expected.transpose(0, 1) if "batch_first" in options else expected
    torch.testing.assert_close(found["out_proj.weight"] + bias, expected.flatten(0, 1))


def test_attention_of_one_sequence_to_itself_is_read_once() -> None:
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    seen: list[Reading] = []
    tap = InputTap(attention, ["in_proj_weight"], lambda name, reading: seen.append(reading))
    attention(x, x, x)
    assert [len(reading.tensors) for reading in seen] == [1]
    assert seen[0].single is not None
    assert seen[0].single.equal(x)
    attention(x, x, x + 0)
    assert seen[1].single is None
    assert [part for part, _ in seen[1].rows()] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    tap.remove()


def test_an_exception_from_inside_leaves_nothing_on() -> None:
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)

    def stop(name: str, reading: Reading) -> None:
        raise KeyError(name)

    tap = InputTap(attention, ["out_proj.weight"], stop)
    with pytest.raises(KeyError, match=r"out_proj\.weight"):
        attention(x, x, x)
    tap.remove()
    attention(x, x, x)
    assert not attention._forward_hooks
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("cell", [nn.RNNCell(3, 4, bias=False), nn.GRUCell(3, 4, bias=False), nn.LSTMCell(3, 4, bias=False)])
def test_cells(cell: Any) -> None:
    x, hidden = torch.randn(2, 3), torch.randn(2, 4)
    state = (hidden, torch.randn(2, 4)) if isinstance(cell, nn.LSTMCell) else hidden
    found = read(cell, lambda: cell(x, state))
    torch.testing.assert_close(found["weight_ih"], (x @ cell.weight_ih.T).detach())
    torch.testing.assert_close(found["weight_hh"], (hidden @ cell.weight_hh.T).detach())
    assert read(cell, lambda: cell(x)).keys() == {"weight_ih"}, "nothing reaches a state that begins with zeros"


def test_recurrent_layers_show_what_they_read_first() -> None:
    recurrent, x = nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    for given in (x, nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 5]))):
        found = read(recurrent, lambda given=given: recurrent(given))
        assert found.keys() == {"weight_ih_l0", "weight_ih_l0_reverse"}
        torch.testing.assert_close(found["weight_ih_l0"], (x.flatten(0, 1) @ recurrent.weight_ih_l0.T).detach())


def test_a_shared_weight_is_seen_in_each_layer_and_copies_are_not() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    seen: list[tuple[str, int]] = []
    tap = InputTap(net, ["0.weight"], lambda name, reading: seen.append((name, len(reading.tensors[0]))), training=True)
    net(torch.ones(2, 3))
    assert seen == [("0.weight", 2)] * 2
    copy.deepcopy(net)(torch.ones(2, 3))
    with torch.no_grad():
        net(torch.ones(2, 3))
    net.eval()(torch.ones(2, 3))
    assert len(seen) == 2
    tap.remove()
    net.train()(torch.ones(2, 3))
    assert len(seen) == 2
