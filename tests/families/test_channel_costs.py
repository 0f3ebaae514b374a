"""Channels by what they cost: budgets of multiplications and parameters, scores that compare, limits."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sparse import ACDC, SNIP, LotteryTicket, MagnitudePruning, RandomSparsity, SynFlow
from lightning_sparse.core import Budget, ChannelCosts, Coupling, count_macs, find_targets, lay_out
from lightning_sparse.functional import normalized
from lightning_sparse.models import ResNet
from lightning_sparse.observe import SparsityTable
from lightning_sparse.testing import Toy, fit, toy

pytest.importorskip("torch_pruning")
from lightning_sparse.export import remove_dead

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def resnet() -> Toy:
    torch.manual_seed(3)
    return toy(net=ResNet(4, 1, 8, depth=14, width=0.5))


def cost_of(network: nn.Module, budget: str) -> int:
    """Counted on the network itself."""
    if budget == "parameters":
        return sum(parameter.numel() for parameter in network.parameters())
    return sum(count_macs(network, lambda: network(IMAGES), len(IMAGES)).values())


@pytest.mark.parametrize("budget", ["macs", "parameters"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_half_is_half_of_the_network_that_is_left(budget: str, allocation: str) -> None:
    """Counted on the smaller network itself, and one unit of channels more would be too many."""
    module = resnet()
    dense = cost_of(module.net, budget)
    method = MagnitudePruning(0.5, structure="coupled", budget=budget, allocation=allocation)
    fit(module, method)
    smaller, removal = remove_dead(module.net, IMAGES)
    assert not removal.refused
    assert not removal.carriers
    left = cost_of(smaller, budget)
    table = {row.layer: row for row in method.summary()}
    assert (table[budget].kept, table[budget].total, table[budget].target) == (left, dense, dense // 2)
    other = "macs" if budget == "parameters" else "parameters"
    assert (table[other].kept, table[other].target) == (cost_of(smaller, other), None)
    channels = table["coupled channels"]
    assert left <= dense / 2
    dearest = max(gain(method, budget))
    assert left + dearest > dense / 2 if allocation == "global" else left > 0.4 * dense
    assert 0 < channels.kept < channels.total


def gain(method: MagnitudePruning, budget: str) -> list[int]:
    """What each unit would add if it came back."""
    coupling = Coupling.restore(
        method.traced, {n: len(u) for n, u in method.traced["units"].items() if is_weight(method, n)}
    )
    assert coupling is not None
    sizes = {name: parameter.numel() for name, parameter in resnet().named_parameters()}
    costs = ChannelCosts(coupling, sizes if budget == "parameters" else method.traced["macs"])
    kept = coupling.gather({name: method.masks[name].flatten(1).any(1) for name in method.masks})
    now, found = costs(kept), []
    for unit in (~kept).nonzero().flatten().tolist():
        more = kept.clone()
        more[unit] = True
        found.append(costs(more) - now)
    return found


def is_weight(method: MagnitudePruning, name: str) -> bool:
    return name not in method.traced["vectors"]


def test_costs_follow_a_schedule() -> None:
    """Linear in multiplications, not in channels."""
    method, seen = MagnitudePruning(0.6, structure="coupled", budget="macs", start=0.0, end=1.0, schedule="linear"), []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            kept, dense = method.left["macs"]
            seen.append((trainer.global_step / 12, kept / dense))

    fit(resnet(), method, Note())
    for progress, left in seen:
        assert 1 - 0.6 * progress - 0.07 < left <= 1 - 0.6 * progress + 1e-9, (progress, left)


@pytest.mark.parametrize("structure", ["channel", "coupled"])
def test_the_scale_of_a_layer_does_not_matter(structure: str) -> None:
    masks = []
    for factor in (1.0, 100.0):
        module = resnet()
        with torch.no_grad():
            module.get_submodule("net.stages.1.0.conv1").weight.mul_(factor)
            module.get_submodule("net.stages.2.1.conv1").weight.div_(factor)
        method = MagnitudePruning(
            0.5, structure=structure, start=0, end=0, targets=["*", "!net.fc"][: 2 - (structure == "coupled")]
        )
        fit(module, method, max_steps=1)
        masks.append({name: method.masks[name] for name in method.masks})
    assert all(masks[0][name].equal(mask) for name, mask in masks[1].items())


def test_no_layer_loses_all_that_goes() -> None:
    """Of a wide layer with small weights beside a narrow one with large weights, as in networks of torchvision."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4))
    method = MagnitudePruning(0.5, structure="coupled", start=0, end=0)
    fit(Toy(net=net), method, max_steps=1)
    kept = [float(method.masks[name].flatten(1).any(1).float().mean()) for name in method.masks]
    assert kept[2] == 1
    assert 0.3 < kept[0] < 0.7
    assert 0.3 < kept[1] < 0.7


def test_normalized_scores_count_what_is_gone_as_nothing() -> None:
    score = torch.tensor([-2.0, 4.0, -torch.inf, 6.0, torch.inf])
    assert normalized(score).tolist() == pytest.approx([-2 / 2.4, 4 / 2.4, -torch.inf, 6 / 2.4, torch.inf])
    assert normalized(torch.zeros(2)).tolist() == [0, 0]


def test_who_reads_a_channel_has_a_say() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        net[1].weight.fill_(1.0)
        net[3].weight.copy_(torch.tensor([1.0, 3.0, 0.5, 2.0]).expand(4, 4))
    method = MagnitudePruning(0.5, structure="coupled", start=0, end=0)
    fit(Toy(net=net), method, max_steps=1, limit_train_batches=1)
    assert method.masks["net.1.weight"][:, 0].tolist() == [False, True, False, True]


@pytest.mark.parametrize("structure", ["unstructured", "channel", "coupled"])
def test_no_layer_exceeds_the_limit(structure: str) -> None:
    module = resnet()
    with torch.no_grad():
        module.get_submodule("net.stages.1.0.conv1").weight[1:].mul_(1e-3)
    lost = {}
    for limit in (1.0, 0.625):
        method = MagnitudePruning(0.6, structure=structure, max_layer_sparsity=limit, start=0, end=0)
        fit(module, method, max_steps=1)
        lost[limit] = {name: 1 - float(method.masks[name].float().mean()) for name in method.masks}
    assert max(lost[1.0].values()) > 0.7
    assert max(lost[0.625].values()) <= 0.625
    if structure == "unstructured":
        assert sum(method.masks.counts.values()) == method.goal["total"]


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: RandomSparsity(0.5, seed=1, **{"allocation": "uniform", **o}),
        lambda **o: SNIP(0.5, **o),
        lambda **o: SynFlow(0.5, iterations=5, **o),
        lambda **o: LotteryTicket(0.5, rounds=2, **o),
        lambda **o: ACDC(0.5, every="2 steps", last_dense="2 steps", **o),
    ],
)
def test_every_method_that_takes_channels_takes_budgets(make: Any) -> None:
    method = make(structure="coupled", budget="macs")
    fit(resnet(), method)
    kept, dense = method.left["macs"]
    assert 0.35 < kept / dense <= 0.5


def test_the_table_shows_channels_parameters_and_macs(capsys: pytest.CaptureFixture[str]) -> None:
    fit(resnet(), MagnitudePruning(0.5, structure="coupled", budget="macs"), SparsityTable())
    said = capsys.readouterr().out
    assert all(f"│ {name}" in said for name in ("coupled channels", "parameters", "macs"))


def test_the_costs_of_grouped_units() -> None:
    """A residual stream of two layers that a third reads; numbers worked out by hand."""
    places = [[("a", i), ("b", i), ("norm", i)] for i in range(4)]
    coupling = Coupling(places, {"a": 4, "b": 4}, {"norm": 4}, {}, {"head": [("a", i) for i in range(4)], "b": [None] * 2})
    costs = ChannelCosts(coupling, {"a": 40, "b": 80, "norm": 4, "head": 20, "other": 7}, fixed=1)
    assert costs.dense == 152
    assert costs(torch.tensor([True, False, True, True])) == 30 + 60 + 3 + 15 + 7 + 1
    assert Coupling.restore(coupling.state(), {"a": 4, "b": 4}).inputs["head"].tolist() == [0, 1, 2, 3]


def test_a_limit_that_rounds_up_is_noticed() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="keeps 2 units, but max_layer_sparsity=0.6 keeps 4, rounded up in every layer"):
        lay_out(Budget(0.6, structure="channel", max_layer_sparsity=0.6), find_targets(net)).check()
