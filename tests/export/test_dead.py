"""What is dead is found on the graph and proven on the weights, and what is not stays with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.export import coupled_outputs, remove_dead
from lightning_sparse.export.dead import constants_of
from tests.helpers.nets import Grouped, Residual, Written, kill

tp = pytest.importorskip("torch_pruning")


def test_what_is_not_dead_stays_with_the_reason() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    normed = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    kill(normed[0], [1])
    kill(normed[3], [2])
    smaller, removal = remove_dead(normed, x)
    assert removal.removed == {"3": 1}
    assert removal.refused["0"] == "LayerNorm '1' mixes its channels"
    torch.testing.assert_close(smaller(x), normed(x))
    softmax = nn.Sequential(nn.Linear(8, 6), nn.Softmax(1), nn.Linear(6, 2))
    kill(softmax[0], [1])
    with pytest.raises(ValueError, match=r"'0': Softmax may mix its channels. Train with structure"):
        remove_dead(softmax, x)
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    tied[2].weight = tied[0].weight
    kill(tied[0], [1])
    with pytest.raises(ValueError, match="'0' shares its weight with another layer"):
        remove_dead(tied, x)
    outputs = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(outputs[2], [1])
    with pytest.raises(ValueError, match="it is an output of the model"):
        remove_dead(outputs, x)


def test_a_neuron_that_is_silent_on_the_inputs_given_is_heard() -> None:
    """An input beside neurons shifts them, unseen by the graph: the column of a silent neuron is taken for a dead one's."""

    def forward(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.out(torch.relu(net.two(torch.cat([x[:, :1], torch.relu(net.one(x))], 1))))
        return out

    torch.manual_seed(0)
    net = Written(forward, one=nn.Linear(4, 6), two=nn.Linear(7, 5), out=nn.Linear(5, 2))
    kill(net.one, [3])
    net.one.bias.data[2:4] = torch.tensor([-1e4, -1.0])
    x = torch.randn(64, 4)
    assert not net.one(x)[:, 2].relu().any()
    with pytest.raises(ValueError, match="'one': without it outputs change by"):
        remove_dead(net, x)


def test_channels_that_are_not_those_of_a_layer_one_by_one_stay() -> None:
    def gated(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.two(torch.relu(net.one(x)) * torch.sigmoid(net.gate(x)))
        return out

    torch.manual_seed(0)
    net = Written(gated, one=nn.Conv2d(3, 6, 1), gate=nn.Conv2d(3, 1, 1), two=nn.Conv2d(6, 2, 1))
    kill(net.one, [0, 1])
    with pytest.raises(ValueError, match="'one': its channels do not match those of 'gate' one to one"):
        remove_dead(net, torch.randn(3, 3, 4, 4))

    def padded(net: Any, x: Tensor) -> Tensor:  # the shortcut without weights of the first residual networks
        x = torch.relu(net.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        out: Tensor = net.fc(torch.relu(net.two(torch.relu(net.one(x))) + shortcut).mean((2, 3)))
        return out

    layers = {"one": nn.Conv2d(4, 6, 3, 2, 1), "two": nn.Conv2d(6, 8, 3, 1, 1), "fc": nn.Linear(8, 2)}
    net = Written(padded, stem=nn.Conv2d(3, 4, 1), **layers)
    kill(net.one, [0, 1, 5])
    kill(net.two, [0, 1])
    x = torch.randn(3, 3, 8, 8)
    smaller, removal = remove_dead(net, x)
    assert (removal.removed, removal.carriers) == ({"one": 2}, {"one": 1})
    assert removal.refused == {"two": "its channels do not match those of 'stem' one to one"}
    torch.testing.assert_close(smaller(x), net(x))


def test_a_second_input_that_may_be_left_out_is_left_out() -> None:
    def forward(net: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = net.one(x)
        out: Tensor = net.two(torch.relu(x if context is None else x + net.more(context)))
        return out

    torch.manual_seed(0)
    net = Written(forward, one=nn.Linear(4, 6), more=nn.Linear(4, 6), two=nn.Linear(6, 2))
    kill(net.one, [0, 1])
    assert remove_dead(net, torch.randn(2, 4))[1].removed == {"one": 2}


def test_layers_may_be_called_by_keyword_and_sample_by_sample() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return torch.stack([net.two(input=torch.sigmoid(net.one(sample))) for sample in x])

    torch.manual_seed(0)
    net = Written(forward, one=nn.Linear(4, 6), two=nn.Linear(6, 2))
    kill(net.one, [0, 1])
    x = torch.randn(3, 4)
    smaller, removal = remove_dead(net, x)
    assert removal.removed == {"one": 2}
    torch.testing.assert_close(smaller(x), net(x))


def test_a_position_that_is_added_to_a_dead_channel_keeps_it() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("where", torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x) + self.where)
            return out

    torch.manual_seed(0)
    net = Positions()
    kill(net.one, [0, 1])
    with pytest.raises(ValueError, match="nothing in Positions can be removed"):
        remove_dead(net, torch.randn(3, 5, 4))


def test_layers_that_write_to_one_stream_are_coupled() -> None:
    x = torch.randn(2, 2, 8, 8)
    assert coupled_outputs(Residual(), x) == [["blocks.0.one"], ["blocks.0.two", "blocks.1.two", "stem"], ["blocks.1.one"]]
    assert coupled_outputs(Grouped(), x) == [["depthwise", "halves"], ["stem"]]


def test_a_number_is_constant_only_if_every_place_and_every_input_has_it() -> None:
    net = nn.Conv2d(4, 1, 1)
    x = torch.randn(2, 4, 3, 3)
    x[:, 0], x[:, 1], x[0, 2], x[1, 2] = 1.5, 0.0, 1.0, 1.01
    assert constants_of(net, [x]) == {net: {0: 1.5, 1: 0.0}}
    assert constants_of(net, [x, x * (1 + 2e-7)])[net].keys() == {0, 1}
    assert constants_of(net, [x, x + 1]) == {net: {}}
    linear = nn.Linear(3, 1)
    assert constants_of(linear, [torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 4.0]]])]) == {linear: {0: 1.0, 1: 2.0}}
