"""Channels that go together: masks that agree along residual streams, and networks that can be cut by them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import SNIP, CKARegularization, LotteryTicket, MagnitudePruning, RandomSparsity, RigL, WeightPenalty
from lightning_sparse.core import Budget, Call, Coupling, find_coupling, find_targets, is_layer, lay_out, out_count
from lightning_sparse.loop import Sparsifier
from lightning_sparse.models import ResNet
from lightning_sparse.testing import Toy, fit, loader, toy, trainer

tp = pytest.importorskip("torch_pruning")
from lightning_sparse.export import remove_dead  # noqa: E402

STREAM = ["net.conv1", "net.stages.0.0.conv2", "net.stages.0.1.conv2"]
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def resnet(optimizer: str = "sgd") -> Toy:
    torch.manual_seed(3)
    return toy(optimizer, net=ResNet(4, 1, 8, depth=14, width=0.5))


class Side(nn.Module):
    """Two branches side by side behind one norm, then a sum over which both are coupled with a third layer."""

    def __init__(self, add: bool = False) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(10)
        self.sum = nn.Conv2d(1, 10, 3) if add else None
        self.slope = nn.PReLU(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1)
        both = both if self.sum is None else both + self.sum(x)
        out: Tensor = self.head(self.slope(self.norm(both)).mean((2, 3)))
        return out


def alive(module: nn.Module, name: str) -> Tensor:
    return module.get_submodule(name).weight.flatten(1).any(1)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_masks_agree_along_streams_and_the_network_can_be_cut(allocation: str) -> None:
    module, method = resnet(), MagnitudePruning(0.5, structure="coupled", allocation=allocation)
    fit(module, method)
    assert alive(module, STREAM[0]).equal(alive(module, STREAM[1]))
    assert alive(module, STREAM[0]).equal(alive(module, STREAM[2]))
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    assert alive(module, "net.fc").all(), "its outputs are the classes"
    for name in layers:
        norm = module.get_submodule(name.replace("conv", "bn").replace("shortcut.0", "shortcut.1"))
        gone = ~alive(module, name)
        assert gone.any() or allocation == "global"
        assert not norm.weight[gone].any()
        assert not norm.bias[gone].any()
        assert norm.weight[~gone].all()
    smaller, removal = remove_dead(module.net, IMAGES)
    assert not removal.carriers
    assert not removal.refused
    for name, layer in smaller.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.out_channels == int(alive(module, f"net.{name}").sum())
    module.eval()
    torch.testing.assert_close(smaller(IMAGES), module.net(IMAGES))


def test_half_of_the_units_go_and_a_stream_counts_once() -> None:
    for allocation in ("uniform", "global"):
        module, method = resnet(), MagnitudePruning(0.5, structure="coupled", allocation=allocation)
        fit(module, method)
        units = [torch.ones(0)]
        for name in (
            "conv1",
            "stages.1.0.conv2",
            "stages.2.0.conv2",
            *(f"stages.{i}.{j}.conv1" for i in (0, 1, 2) for j in (0, 1)),
        ):
            units.append(alive(module, f"net.{name}").float())
        kept = torch.cat(units)
        assert int(kept.sum()) == len(kept) // 2
        if allocation == "uniform":
            assert all(one.mean() == 0.5 for one in units[1:])
            assert method.goal["total"] == method.masks.kept


def test_the_score_of_a_unit_is_the_mean_over_its_layers() -> None:
    module, method = resnet(), MagnitudePruning(0.5, structure="coupled", allocation="uniform", start=0, end=0)
    with torch.no_grad():
        for name, sizes in zip(
            STREAM, ([9, 1, 1, 1, 1, 2, 1, 1], [1, 5, 1, 1, 1, 2, 1, 1], [1, 1, 4, 1, 1, 2, 3.5, 1]), strict=True
        ):
            weight = module.get_submodule(name).weight
            weight.copy_(torch.tensor(sizes)[:, None, None, None].expand_as(weight))
    fit(module, method, max_epochs=1, limit_train_batches=1)
    assert alive(module, STREAM[1]).tolist() == [True, True, True, False, False, True, False, False]


def test_a_layer_that_is_no_target_keeps_its_whole_stream(caplog: pytest.LogCaptureFixture) -> None:
    module, method = resnet(), MagnitudePruning(0.5, structure="coupled", allocation="uniform", targets=["*", "!:first"])
    with caplog.at_level("INFO"):
        fit(module, method)
    assert alive(module, STREAM[1]).all()
    assert not alive(module, "net.stages.0.0.conv1").all()
    assert "MagnitudePruning: channels stay in 'net.fc.weight' (it is an output of the model)." in caplog.text


class Written(nn.Module):
    """Layers, and a forward pass written beside them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.written = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def viewed(net: Any, x: Tensor) -> Any:
    return net.out(torch.relu(net.two(torch.relu(net.one(x)))).view(-1, 6 * 16))


def returned(net: Any, x: Tensor) -> Any:
    features = torch.relu(net.two(torch.relu(net.one(x))).mean((2, 3)))
    return net.out(features), features


def sliced(net: Any, x: Tensor) -> Any:
    x = torch.relu(net.two(torch.relu(net.one(x)))).mean((2, 3))
    return net.out(torch.cat([x[:, :2], x[:, 2:]], 1)) + net.more(x[:, :2])


def shuffled(net: Any, x: Tensor) -> Any:
    x = torch.relu(net.two(torch.relu(net.one(x))))
    return net.out(x.view(len(x), 2, -1, 16).transpose(1, 2).reshape(len(x), -1, 16).mean(2))


def scaled(net: Any, x: Tensor) -> Any:
    return net.out((torch.relu(net.two(torch.relu(net.one(x)))) * net.factors.get_buffer("value")).mean((2, 3)))


@pytest.mark.parametrize(
    ("forward", "wide", "reason"),
    [
        (viewed, 96, "with fewer channels the model does not run"),
        (returned, 6, "with fewer channels an output of the model has another size"),
        (sliced, 6, "with fewer channels the model"),
        (shuffled, 6, "with fewer channels the model does not run"),
        (scaled, 6, "with fewer channels the model does not run"),
    ],
)
def test_channels_that_a_trial_cannot_remove_stay_and_the_others_leave(
    forward: Callable[..., Any], wide: int, reason: str
) -> None:
    torch.manual_seed(0)
    factors = nn.Module()
    factors.register_buffer("value", torch.rand(6, 1, 1) + 0.5)
    layers = {"one": nn.Conv2d(1, 8, 3, 2, 1), "two": nn.Conv2d(8, 6, 1), "out": nn.Linear(wide, 4), "more": nn.Linear(2, 4)}
    net = Written(forward, **layers, factors=factors)
    weights = {f"{name}.weight": out_count(layer) for name, layer in layers.items()}
    coupling = find_coupling(net, [Call.of(IMAGES)], weights)
    assert coupling.staying["two.weight"].startswith(reason)
    assert (coupling.units["one.weight"] >= 0).all()
    assert (coupling.units["two.weight"] < 0).all()


def test_a_trial_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    net = ResNet(4, 1, 8, depth=8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weights = {f"{name}.weight": out_count(layer) for name, layer in net.named_modules() if is_layer(layer)}
    state = torch.get_rng_state()
    find_coupling(net.train(), [Call.of(IMAGES)], weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training


def test_channels_of_recurrent_layers_stay() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return net.out(torch.relu(net.head(net.cell(torch.relu(net.embed(x[:, 0])))[0][:, -1])))

    for layers, both in ((2, False), (1, True)):
        cell = nn.GRU(8, 6, layers, batch_first=True, bidirectional=both)
        linear = {"embed": nn.Linear(8, 8), "head": nn.Linear(12 if both else 6, 10), "out": nn.Linear(10, 4)}
        net = Written(forward, cell=cell, **linear)
        weights = {"cell.weight_ih_l0": 18, **{f"{name}.weight": out_count(layer) for name, layer in linear.items()}}
        coupling = find_coupling(net, [Call.of(IMAGES)], weights)
        assert set(coupling.staying) == {"cell.weight_ih_l0", "embed.weight", "out.weight"}
        assert coupling.staying["cell.weight_ih_l0"] == "channels of GRU stay"
        assert coupling.count == 10


def test_a_sparsity_of_its_own_is_one_of_the_whole_stream() -> None:
    module = resnet()
    fit(module, MagnitudePruning(0.5, structure="coupled", layer_sparsity={"*stages.0.1.conv2": 0.25}))
    assert int(alive(module, STREAM[0]).sum()) == 6
    assert int(alive(module, STREAM[2]).sum()) == 6


def test_concatenated_channels_and_their_norm_move_by_an_offset() -> None:
    torch.manual_seed(0)
    module, method = toy(net=Side()), MagnitudePruning(0.5, structure="coupled")
    fit(module, method)
    gone = ~torch.cat([alive(module, "net.left"), alive(module, "net.right")])
    assert int(gone.sum()) == 5
    norm = module.net.get_submodule("norm")
    assert norm.bias.eq(0).equal(gone)
    assert norm.weight.eq(0).equal(gone)
    biases = torch.cat([module.net.get_submodule(name).bias for name in ("left", "right")])
    assert biases.eq(0).equal(gone), "the bias goes with its channel"
    smaller, removal = remove_dead(module.net, IMAGES)
    assert sum(removal.removed.values()) == 5
    assert not removal.carriers
    torch.testing.assert_close(smaller(IMAGES), module.net.eval()(IMAGES))


def test_a_sum_over_concatenated_channels_couples_all_three() -> None:
    torch.manual_seed(0)
    module = toy(net=Side(add=True))
    fit(module, MagnitudePruning(0.5, structure="coupled"))
    both = torch.cat([alive(module, "net.left"), alive(module, "net.right")])
    assert both.equal(alive(module, "net.sum"))
    assert int(both.sum()) == 5
    assert remove_dead(module.net, IMAGES)[1].removed["sum"] == 5


@pytest.mark.parametrize(
    "method",
    [
        RandomSparsity(0.5, structure="coupled", allocation="uniform", seed=1),
        SNIP(0.5, structure="coupled", allocation="uniform"),
        LotteryTicket(0.5, rounds=2, structure="coupled", allocation="uniform"),
        WeightPenalty(0.5, structure="coupled", allocation="uniform"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_method_that_prunes_channels_can_couple_them(method: Sparsifier) -> None:
    module = resnet("adamw")
    runner = fit(module, method, CKARegularization(strength=1e-3, every_n_batches=1))
    gone = ~alive(module, STREAM[0])
    assert gone.any()
    assert all(gone.equal(~alive(module, name)) for name in STREAM)
    norm = module.net.get_submodule("stages.0.1.bn2")
    assert not norm.bias[gone].any()
    assert not norm.weight[gone].any()
    assert norm.weight[~gone].all()
    state = runner.optimizers[0].state[norm.bias]
    assert not state["exp_avg"][gone].any()
    assert not state["exp_avg_sq"][gone].any()
    assert state["exp_avg_sq"][~gone].all()
    assert not remove_dead(module.net, IMAGES)[1].carriers


def test_norms_are_zero_in_averages_and_whenever_somebody_looks() -> None:
    module, method = resnet("adam"), MagnitudePruning(0.5, structure="coupled", allocation="uniform", start=0.1, end=0.6)
    if not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    average = L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            gone = ~alive(pl_module, STREAM[1])
            norm = pl_module.net.stages[0][0].bn2
            seen.append((int(gone.sum()), bool(norm.bias[gone].any() or norm.weight[gone].any())))

    fit(module, method, average, Look())
    assert max(seen)[0] > 0
    assert not any(wrong for _, wrong in seen)
    copied = average._average_model.module.net.stages[0][0].bn2  # type: ignore[union-attr, operator, index]
    assert not copied.bias[~alive(module, STREAM[1])].any()


def test_what_is_gone_does_not_return_on_the_way() -> None:
    module, method = (
        resnet(),
        MagnitudePruning(0.45, structure="coupled", allocation="erk", start=0, end=0.9, schedule="linear"),
    )
    before: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            for name in method.masks:
                assert not (method.masks[name] & ~before.get(name, method.masks[name])).any(), name
                before[name] = method.masks[name]

    fit(module, method, Look(), max_epochs=6)


def test_biases_that_would_move_have_no_gradient_and_no_moments() -> None:
    torch.manual_seed(0)
    module = toy("adam", net=Side())  # a PReLU passes gradients at zero, where a ReLU stops them
    runner = fit(module, MagnitudePruning(0.5, structure="coupled", start=0, end=0))
    gone = ~torch.cat([alive(module, "net.left"), alive(module, "net.right")])
    state = runner.optimizers[0].state[module.net.norm.bias]
    assert not state["exp_avg"][gone].any()
    assert state["exp_avg"][~gone].all()


class Grouped(nn.Module):
    """A convolution in two groups of four, behind a normalization that ends in an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.grouped = nn.Conv2d(1, 8, 3), Activated(8), nn.Conv2d(8, 12, 3, groups=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.grouped(self.norm(self.wide(x)))).mean((2, 3)))
        return out


class Mixed(Grouped):
    """One of the two groups reads the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.wide(x), x[..., 1:-1, 1:-1].expand(-1, 4, -1, -1)], 1)
        out: Tensor = self.head(torch.relu(self.grouped(both)).mean((2, 3)))
        return out


class Activated(nn.BatchNorm2d):
    """A normalization that ends in an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Parted(nn.Module):
    """Channels are parted after a fixed number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right = nn.Conv2d(1, 8, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x).split([3, 5], 1)
        out: Tensor = self.head((self.left(left) + self.right(right)).mean((2, 3)))
        return out


def test_groups_of_a_convolution_remain_equal() -> None:
    torch.manual_seed(3)
    module, method = toy(net=Grouped()), MagnitudePruning(0.5, structure="coupled", allocation="uniform")
    fit(module, method)
    wide, grouped = alive(module, "net.wide").view(2, 4), alive(module, "net.grouped").view(2, 6)
    assert wide[0].equal(wide[1])
    assert grouped[0].equal(grouped[1])
    assert int(wide.sum()), int(grouped.sum()) == (4, 6)
    module.eval()
    smaller, removal = remove_dead(module.net, IMAGES)
    assert not removal.refused
    assert smaller.get_submodule("wide").out_channels == 4
    assert smaller.get_submodule("grouped").weight.shape == (6, 2, 3, 3)
    torch.testing.assert_close(smaller(IMAGES), module.net(IMAGES))


def test_a_group_that_cannot_shrink_keeps_the_others() -> None:
    torch.manual_seed(3)
    module, method = toy(net=Mixed()), MagnitudePruning(0.5, structure="coupled", allocation="uniform")
    fit(module, method)
    assert alive(module, "net.wide").all()
    assert int(alive(module, "net.grouped").sum()) == 6
    module.eval()
    smaller, _ = remove_dead(module.net, IMAGES)
    torch.testing.assert_close(smaller(IMAGES), module.net(IMAGES))


def test_channels_that_are_parted_by_number_stay(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    module, method = toy(net=Parted()), MagnitudePruning(0.5, structure="coupled", allocation="uniform")
    fit(module, method)
    assert alive(module, "net.both").all()
    assert "'net.both.weight' (SplitWithSizes may mix its channels)" in caplog.text
    assert int(alive(module, "net.left").sum()) == 2
    module.eval()
    smaller, _ = remove_dead(module.net, IMAGES)
    torch.testing.assert_close(smaller(IMAGES), module.net(IMAGES))


def test_units() -> None:
    channels = [[("a", 0), ("b", 0)], [("a", 1), ("b", 1)], [("b", 2)], [("c", 0), ("b", 1)]]
    coupling = Coupling(channels, {"a": 2, "b": 4, "c": 1}, {}, {"d": "it is fixed"})
    assert [units.tolist() for units in coupling.units.values()] == [[0, 1], [0, 1, 2, -1], [1]]
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0, 5.0, 6.0]), "c": torch.tensor([6.0])}
    assert coupling.mean(scores).tolist() == [2, 4, 5]
    kept = torch.tensor([True, False, True])
    assert coupling.spread(kept, "b").tolist() == [True, False, True, True]
    assert coupling.gather({name: coupling.spread(kept, name) for name in "abc"}).equal(kept)
    again = Coupling.restore(coupling.state(), {"a": 2, "b": 4, "c": 1})
    assert again is not None
    assert [units.tolist() for units in again.units.values()] == [[0, 1], [0, 1, 2, -1], [1]]
    assert [names for names, _ in again.pools] == [names for names, _ in coupling.pools]
    assert Coupling.restore(coupling.state(), {"a": 2, "b": 4}) is None
    fixed = Coupling(channels, {"a": 2, "b": 4}, {}, {"c": "no target"})
    assert fixed.units["a"].tolist() == [0, -1]
    assert fixed.units["b"].tolist() == [0, -1, 1, -1]


def test_a_group_that_holds_less_than_planned_gets_nothing_back() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4))
    chosen, budget = find_targets(net), Budget(0.5, "uniform", "coupled")
    coupling = Coupling(
        [[(target.name, channel)] for target in chosen for channel in range(4)],
        {target.name: 4 for target in chosen},
        {},
        {},
    )
    scores = [torch.rand(4, 2), torch.rand(4, 4)]
    scores[0][1:] = -torch.inf
    masks = lay_out(budget, chosen, coupling).masks(scores, kept=[2, 16])
    assert int(masks[0].sum()) == 2
    assert masks[0][0].all()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
def test_what_cannot_be_coupled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    method = MagnitudePruning(0.5, structure="coupled")
    with pytest.raises(
        ValueError, match="structure='coupled' finds no channel of Toy that can be removed .*it is an output of the model"
    ):
        fit(toy(net=nn.Sequential(nn.Flatten(), nn.Linear(64, 4))), method)
    with pytest.raises(ValueError, match="keeps 1 units, fewer than there are groups of coupled layers"):
        fit(resnet(), MagnitudePruning(0.995, structure="coupled"))
    with pytest.raises(ValueError, match="structure='coupled' is not rewired"):
        RigL(0.5, structure="coupled")

    short: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0}
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ValueError, match="this needs torch-pruning; install it with"):
        trainer(method, **short).fit(resnet(), loader())
