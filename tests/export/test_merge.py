"""Testable properties 1 to 3, 8, 9 and 12 of the note on layer sparsity, on networks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import merge_layers
from lightning_sparse.core import convolution_of, effective_pair, find_chains
from lightning_sparse.export import fresh_start, pad_in_front
from lightning_sparse.functional import layer_penalty
from lightning_sparse.testing import Toy


def mlp(*widths: int, seed: int = 0, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


def non_negative(net: nn.Module, names: Collection[str]) -> None:
    for name in names:
        for parameter in net.get_submodule(name).parameters():
            parameter.data.abs_()


def signed(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def worst(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """The largest difference, relative to the largest output."""
    a, b = copy.deepcopy(a).eval(), b.eval()
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max() / a(x).abs().max())


# ---- linear layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inactive", [["2"], ["8"], ["2", "4"], ["4", "6", "8"], ["2", "4", "6", "8"]])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merges_are_exact_and_depth_falls(inactive: list[str], dtype: torch.dtype, bound: float) -> None:
    net = mlp(7, 20, 20, 20, 20, 20, 3)
    non_negative(net, inactive)
    net = net.to(dtype)
    x = 3 * signed(200, 7).to(dtype)
    smaller, report = merge_layers(net, x, rounds=0)
    assert worst(net, smaller, x) <= bound
    assert report.depth == (6, 6 - len(inactive))
    assert {v.layer for v in report.layers if v.merged} == set(inactive)
    assert all(v.level == "certified" for v in report.layers if v.merged)
    assert isinstance(smaller, nn.Sequential)
    assert all(p.dtype == dtype for p in smaller.parameters())
    widths = [layer.out_features for layer in smaller if isinstance(layer, nn.Linear)]
    assert widths == [20] * (5 - len(inactive)) + [3]
    assert report.parameters[1] == sum(a * b + b for a, b in pairwise([7, *widths]))


def test_with_everything_inactive_two_layers_are_left() -> None:
    net = mlp(7, 20, 20, 20, 3)
    non_negative(net, ["0", "2", "4", "6"])
    smaller, report = merge_layers(net, tolerance=0)
    assert report.depth == (4, 2)
    x = signed(200, 7)
    assert worst(net, smaller, x) <= 1e-12
    whole, report = merge_layers(net, tolerance=0, input_range=(0, float("inf")))
    assert report.depth == (4, 1)
    assert worst(net, whole, x.abs()) <= 1e-12
    assert worst(net, whole, x) > 1e-3, "the first layer is linear for non-negative inputs only"


def test_a_box_of_inputs_can_certify_the_first_layer() -> None:
    net = mlp(7, 20, 3)
    net[0].bias.data.add_(10)
    assert not merge_layers(net)[1].merged
    smaller, report = merge_layers(net, input_range=(-1, 1))
    assert report.merged == ["0"]
    x = signed(500, 7).clamp(-1, 1)
    assert worst(net, smaller, x) <= 1e-12
    assert worst(net, smaller, 100 * x) > 1e-3


def test_one_negative_bias_is_enough_to_be_active() -> None:
    net = mlp(7, 20, 20, 3)
    non_negative(net, ["2"])
    net[2].bias.data[4] = -5
    _, report = merge_layers(net, tolerance=1e-3)
    assert not report.merged
    assert report.layers[0].level == "active"


def test_merging_into_the_predecessor_would_be_wrong() -> None:
    net = mlp(7, 20, 20, 3)
    non_negative(net, ["2"])
    wrong = nn.Sequential(nn.Linear(7, 20), nn.ReLU(), net[4]).double()
    wrong[0].weight.data, wrong[0].bias.data = net[2].weight @ net[0].weight, net[2].weight @ net[0].bias + net[2].bias
    assert worst(net, wrong, signed(200, 7)) > 1e-2
    smaller = merge_layers(net)[0]
    torch.testing.assert_close(smaller[2].weight, net[4].weight @ net[2].weight)  # type: ignore[index]


def test_near_layers_lose_their_activation_and_keep_their_weights() -> None:
    net = mlp(7, 20, 20, 3)
    non_negative(net, ["2"])
    net[2].weight.data[0, 0] = -1e-4
    assert not merge_layers(net, tolerance=0)[1].merged
    x = signed(200, 7)
    smaller, report = merge_layers(net, x, rounds=0)
    assert report.layers[0].level == "near"
    assert 0 < (report.layers[0].ratio or 0) < 1e-3
    torch.testing.assert_close(smaller[2].weight, net[4].weight @ net[2].weight)  # type: ignore[index]
    hidden = net[:2](x)
    bound = layer_penalty([net[2].weight, net[2].bias]) * torch.cat([hidden, torch.ones(200, 1)], 1).norm(dim=1)
    change = (net[:4](x) - net[2](hidden)).norm(dim=1)
    assert bool((change <= bound).all())


def test_products_are_judged_again() -> None:
    """[1, -1] [[2, 2], [1, 1]] = [1, 1]: the factor has a negative part, the product has none."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1))
    for layer, rows in ((net[2], [[2.0, 2.0], [1.0, 1.0]]), (net[4], [[1.0, -1.0]])):
        layer.weight.data = torch.tensor(rows)  # type: ignore[union-attr]
        layer.bias.data.zero_()  # type: ignore[union-attr]
    _, report = merge_layers(net, allow_growth=True)
    assert report.merged == ["2", "4"]
    assert report.depth == (4, 2)


@pytest.mark.parametrize("factor", [0.01, 7.0])
def test_rescaling_hides_nothing(factor: float) -> None:
    net = mlp(7, 20, 20, 20, 3)
    non_negative(net, ["2"])
    other = copy.deepcopy(net)
    for parameter in other[4].parameters():
        parameter.data.mul_(factor)
    other[6].weight.data.div_(factor)
    assert worst(net, other, signed(100, 7)) < 1e-12
    before, after = merge_layers(net)[1], merge_layers(other)[1]
    assert before.merged == after.merged == ["2"]
    ratios = [[v.ratio for v in report.layers if v.layer == "4"] for report in (before, after)]
    assert ratios[0] == pytest.approx(ratios[1])
    penalties = [float(layer_penalty(effective_pair(find_chains(n).links[1])).detach()) for n in (net, other)]
    assert penalties[1] / penalties[0] == pytest.approx(factor)


def test_collapsed_layers_are_no_success() -> None:
    net = mlp(7, 20, 20, 20, 3)
    non_negative(net, ["2"])
    net[4].weight.data.mul_(1e-6).abs_()
    net[4].bias.data.abs_()
    _, report = merge_layers(net)
    assert report.merged == ["2"]
    assert report.collapsed == ["4"]
    assert "cut off the signal" in str(report)


def test_products_that_would_grow_are_kept_apart_unless_asked_for() -> None:
    net = mlp(7, 100, 10, 100, 3)
    non_negative(net, ["2"])
    smaller, report = merge_layers(net)
    assert smaller is not net
    assert not report.merged
    assert "2,110 -> 10,100 parameters); allow_growth=True" in str(report)
    larger, report = merge_layers(net, allow_growth=True)
    assert report.merged == ["2"]
    assert report.parameters[1] > report.parameters[0]
    assert worst(net, larger, signed(50, 7)) < 1e-12


def test_shared_weights_are_not_removed() -> None:
    net = mlp(7, 20, 20, 20, 20, 3)
    non_negative(net, ["4", "6"])
    net[6].weight = net[4].weight
    smaller, report = merge_layers(net)
    assert not report.merged
    assert [v.note for v in report.layers if v.layer == "4"] == ["its weights are shared with another layer"]
    assert worst(net, smaller, signed(50, 7)) < 1e-12
    repeated = nn.Sequential(net[0], net[1], *[net[2], net[3]] * 3, net[8]).double()
    smaller, report = merge_layers(repeated)
    assert not report.merged
    assert worst(repeated, smaller, signed(50, 7)) == 0


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.ReLU6, nn.Hardswish]
)
def test_other_activations_are_never_certified(activation: Callable[[], nn.Module]) -> None:
    net = mlp(7, 20, 20, 20, 3, activation=activation)
    non_negative(net, ["2", "4"])
    _, report = merge_layers(net, tolerance=0.9)
    assert not report.merged
    assert all(v.level == "active" for v in report.layers)
    assert all(v.note for v in report.layers)


def test_elu_needs_a_bias_that_makes_up_for_its_lower_bound() -> None:
    net = mlp(7, 20, 20, 20, 3, activation=nn.ELU)
    non_negative(net, ["2", "4"])
    assert not merge_layers(net)[1].merged
    net[2].bias.data = net[2].weight.data.sum(1) + 0.01
    smaller, report = merge_layers(net)
    assert report.merged[0] == "2"
    assert report.layers[0].level == "certified"
    assert worst(net, smaller, signed(500, 7)) < 1e-12


def test_what_lies_between_must_be_linear() -> None:
    net = mlp(7, 20, 20, 20, 3)
    non_negative(net, ["2", "4"])
    for between, merges in (
        (nn.Dropout(0.5), True),
        (nn.Identity(), True),
        (nn.LayerNorm(20), False),
        (nn.MaxPool1d(1), False),
    ):
        layers = [*net[:4], between.double(), *net[4:]]
        smaller, report = merge_layers(nn.Sequential(*layers))
        assert ("2" in report.merged) == merges, between
        assert worst(nn.Sequential(*layers), smaller, signed(50, 7)) < 1e-12
        if not merges:
            assert f"{type(between).__name__} between it and the next layer is not linear" in str(report)
        assert ("5" in report.merged) == (not isinstance(between, nn.LayerNorm)), "a LayerNorm makes inputs signed"


# ---- convolutions -------------------------------------------------------------------------------------------------------


def conv_net(stride: int = 1, norm: bool = False, last: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    make = [nn.BatchNorm2d(4)] if norm else []
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, stride, padding=1), *make, nn.ReLU()),
        *(nn.Conv2d(4, 4, last, stride, padding=last // 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ).double()
    if norm:
        for tensor in [*net[3].parameters(), net[3].running_mean, net[3].running_var]:
            nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
    return net


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_between_is_refused_and_padding_in_front_merges(stride: int) -> None:
    net = conv_net(stride)
    non_negative(net, ["2"])
    x = signed(3, 2, 14, 14)
    _, report = merge_layers(net, allow_growth=True)
    assert not report.merged
    assert "pads between the two" in str(report)
    front = pad_in_front(net)
    assert [front[i].padding for i in (0, 2, 4)] == [(2 + stride,) * 2, (0, 0), (0, 0)]  # type: ignore[union-attr]
    assert front(x).shape == net(x).shape
    assert (net[0].padding, front[2].stride) == ((1, 1), (stride, stride)), "the original is left alone"
    smaller, report = merge_layers(front, x, allow_growth=True, rounds=1)
    assert report.merged == ["2"]
    assert smaller[2].kernel_size == (3 + 2 * stride,) * 2  # type: ignore[index]
    assert worst(front, smaller, x) < 1e-12
    assert report.macs is not None
    assert report.milliseconds is not None


def test_batch_normalization_is_folded_and_judged_folded() -> None:
    net = pad_in_front(conv_net(norm=True, last=1))
    x = signed(3, 2, 10, 10)
    non_negative(net, ["2"])
    net[3].bias.data.fill_(50)  # beta >= gamma mu / sigma
    smaller, report = merge_layers(net, allow_growth=True)
    assert report.merged == ["2"]
    assert worst(net, smaller, x) < 1e-12
    assert not any(isinstance(m, nn.BatchNorm2d) for m in smaller.modules())
    net[3].bias.data.fill_(-50)  # the raw layer is as non-negative as before
    assert not merge_layers(net, allow_growth=True)[1].merged
    net[3].bias.data.fill_(50)
    net[3].weight.data[0] = -1
    assert not merge_layers(net, allow_growth=True)[1].merged


def test_circular_padding_merges() -> None:
    net = conv_net()
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"
            layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
    non_negative(net, ["2"])
    smaller, report = merge_layers(net, allow_growth=True)
    assert report.merged == ["2"]
    assert worst(net, smaller, signed(3, 2, 10, 10)) < 1e-12


class Block(nn.Module):
    """A residual block with its activation behind the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.norm(self.conv1(x))))
        return F.relu(out + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class Residual(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(2, 4, 3, 1, 1)
        self.blocks = nn.Sequential(Block(4, 4, 1, norm), Block(4, 6, 2, norm), Block(6, 6, 1, norm))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("which", [[0], [1], [0, 1, 2]])
def test_a_residual_block_becomes_one_convolution(which: list[int]) -> None:
    net = pad_in_front(Residual().double())
    non_negative(net, [f"blocks.{i}.conv1" for i in which])
    x = signed(3, 2, 12, 12)
    smaller, report = merge_layers(net, x, allow_growth=True, rounds=0)
    assert report.merged == [f"blocks.{i}.conv1" for i in which]
    assert report.depth == (9, 9 - len(which) - (1 in which))  # a projection is folded too
    assert worst(net, smaller, x) < 1e-12
    again = pickle.loads(pickle.dumps(smaller))
    assert worst(smaller, again, x) == 0


def test_blocks_merge_with_each_other_once_their_sums_are_linear() -> None:
    net = pad_in_front(Residual().double())
    non_negative(net, [f"blocks.{i}.{name}" for i in range(3) for name in ("conv1", "conv2")])
    non_negative(net, ["blocks.1.shortcut.0"])
    for block in net.blocks:  # type: ignore[union-attr]
        block.conv1.padding, block.conv2.padding = (0, 0), (0, 0)
        for conv in (block.conv1, block.conv2):  # 1x1, so that the next block does not pad
            conv.weight = nn.Parameter(conv.weight[:, :, 1:2, 1:2].clone())
            conv.kernel_size = (1, 1)
    x = signed(3, 2, 12, 12)
    smaller, report = merge_layers(net, allow_growth=True)
    assert report.depth == (9, 3), "stem, all blocks in one, head"
    assert worst(net, smaller, x) < 1e-12


def test_a_merge_never_crosses_a_point_that_a_skip_needs() -> None:
    net = Residual().double()
    chains = find_chains(pad_in_front(net))
    assert [link.name for link in chains.links] == [f"blocks.{i}.conv1" for i in range(3)]
    assert "used more than once" in chains.obstacles["stem"]
    assert "skip connection" in chains.obstacles["blocks.0.conv2"]


# ---- what is given and what comes back ----------------------------------------------------------------------------------


def test_a_lightning_module_keeps_its_class() -> None:
    module = Toy(net=mlp(7, 20, 20, 3))
    module.net[2].weight.data.abs_()
    module.net[2].bias.data.abs_()
    smaller, report = merge_layers(module, signed(5, 7), rounds=0)
    assert type(smaller) is Toy
    assert report.merged == ["net.2"]
    assert report.change is not None
    assert report.change[0] < 1e-12
    assert len(module.net) == 5, "the original is left alone"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = mlp(7, 20, 20, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x)) if x.sum() > 0 else self.inner(x)


def test_parts_of_what_cannot_be_traced_are_merged() -> None:
    net = Branching()
    non_negative(net, ["inner.2"])
    smaller, report = merge_layers(net)
    assert report.merged == ["inner.2"]
    assert type(smaller) is Branching
    assert "stands alone" in str(report) or "cannot be traced" in str(report)


def test_what_cannot_be_traced_at_all_is_refused() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"Nothing in ModuleDict can be merged: 'a': .*such as nn.Sequential"):
        merge_layers(net)
    with pytest.raises(ValueError, match="it has no linear layer or convolution"):
        merge_layers(nn.ReLU())
    with pytest.raises(ValueError, match=r"tolerance=1.5 must be in \[0, 1\)"):
        merge_layers(net, tolerance=1.5)


def test_functions_and_modules_are_the_same_to_it() -> None:
    class Functional(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.a, self.b, self.c = net[0], net[2], net[4]

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.b(self.a(x).relu()))
            return self.c(F.dropout(h, 0.5, self.training))  # type: ignore[no-any-return]

    net = mlp(7, 20, 20, 3)
    non_negative(net, ["2"])
    model = Functional(net).eval()
    smaller, report = merge_layers(model)
    assert report.merged == ["b"]
    assert worst(model, smaller, signed(50, 7)) < 1e-12
    names = [name for name, _ in smaller.named_parameters()]
    assert names == ["a.weight", "a.bias", "c.weight", "c.bias"]


def test_a_fresh_start_has_the_structure_but_not_the_weights() -> None:
    net = mlp(7, 20, 20, 3)
    non_negative(net, ["2"])
    warm = merge_layers(net)[0]
    fresh = fresh_start(copy.deepcopy(warm))
    assert [p.shape for p in warm.parameters()] == [p.shape for p in fresh.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(warm.parameters(), fresh.parameters(), strict=True))


def test_signals_keep_their_size_through_a_deep_fresh_start() -> None:
    torch.manual_seed(0)
    net = fresh_start(nn.Sequential(*[layer for _ in range(30) for layer in (nn.Linear(128, 128), nn.ReLU())]))
    assert (
        0.1 < float(net(torch.randn(64, 128)).detach().square().mean()) < 10
    )  # of nn.Linear's own values nothing would arrive
    assert not any(layer.bias.any() for layer in net if isinstance(layer, nn.Linear))


def test_gradients_flow_in_the_merged_network() -> None:
    net = mlp(7, 20, 20, 3)
    non_negative(net, ["2"])
    smaller = merge_layers(net)[0]
    smaller(signed(5, 7)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in smaller.parameters())
    assert convolution_of(smaller[2]).weight.dtype == torch.float64  # type: ignore[index]


def test_padded_zeros_belong_to_the_range_of_inputs() -> None:
    """For inputs from -2 to -1, nine weights of -1 give at least 9, but four of them, in a corner, only 4."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 1))
    net[0].weight.data.fill_(-1)  # type: ignore[operator, union-attr]
    net[0].bias.data.fill_(-5)  # type: ignore[operator, union-attr]
    assert not merge_layers(net, input_range=(-2, -1), tolerance=0)[1].merged
    net[0].padding = (0, 0)  # type: ignore[assignment]
    assert merge_layers(net, input_range=(-2, -1), tolerance=0)[1].merged == ["0"]
