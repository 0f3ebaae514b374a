"""Constant fan-in: every output of a layer keeps the same number of inputs, whatever the method."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import ACDC, SET, SNIP, GraNet, LotteryTicket, MagnitudePruning, RandomSparsity, RigL
from lightning_sparse.core import Target
from lightning_sparse.core.fan_in import FanIn
from lightning_sparse.functional import fan_in_mask, regrow_fan_in
from lightning_sparse.testing import Toy, Watcher, fit, toy


def fan_ins(mask: Tensor, dim: int = 0) -> set[int]:
    return set(mask.movedim(dim, 0).flatten(1).sum(1).tolist())


def slow_regrow(mask: Tensor, keep: Tensor, grow: Tensor, count: int, share: float) -> list[list[int]]:
    """The seven steps of SRigL for one layer, output by output, with Python's own sorting."""
    outputs, inputs = mask.shape
    ones = [(o, i) for o in range(outputs) for i in range(inputs) if mask[o, i]]
    survivors = sorted(ones, key=lambda e: (-float(keep[e]), e))[: len(ones) - count]
    others = [(o, i) for o in range(outputs) for i in range(inputs) if (o, i) not in survivors]
    wanted = sorted(others, key=lambda e: (-float(grow[e]), e))[:count]
    alive = [o for o in range(outputs) if bool(mask[o].any())]
    fan_in = len(ones) // len(alive)
    salient = {o: sum(e[0] == o for e in survivors + wanted) for o in alive}
    left = [o for o in alive if salient[o] >= share * fan_in]
    if len(left) * inputs < len(ones):
        left = alive
    new = min(len(ones) // len(left), inputs)
    rows: list[list[int]] = [[] for _ in range(outputs)]
    for o in left:
        mine = [i for i in range(inputs) if (o, i) in survivors]
        free = sorted((i for i in range(inputs) if i not in mine), key=lambda i: (-float(grow[o, i]), i))
        rows[o] = sorted(mine + free[: new - len(mine)])
    return rows


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_rewiring_is_that_of_the_paper(share: float) -> None:
    generator = torch.Generator().manual_seed(int(100 * share))
    ablated = 0
    for _ in range(20):
        mask = fan_in_mask(torch.rand(8, 12, generator=generator), 4)
        mask[2] = False  # ablated before
        scale = torch.rand(8, 1, generator=generator) ** 3
        keep, grow = (torch.rand(8, 12, generator=generator) * scale for _ in range(2))
        count = int(torch.randint(1, 28, (), generator=generator))
        found = regrow_fan_in(mask, keep, grow, count, share)
        assert [row.nonzero().flatten().tolist() for row in found] == slow_regrow(mask, keep, grow, count, share)
        ablated += int((found.sum(1) == 0).sum()) - 1
    assert (ablated > 0) == (share > 0)


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("make", [RandomSparsity, partial(RigL, min_salient=0.0), partial(MagnitudePruning, end=0.5)])
def test_an_output_keeps_one_connection_where_less_is_due(make: Any, allocation: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))
    method = make(0.9, structure="fan_in", allocation=allocation, layer_sparsity={"net.3": 0.9})
    fit(Toy(net=net), method)
    assert fan_ins(method.masks["net.3.weight"]) == {1}
    assert method.at_target


def test_the_layout_of_the_layer_is_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = fan_in_mask(torch.rand(6, 5, 3, 3, generator=generator), 7)
    keep, grow = (torch.rand(6, 5, 3, 3, generator=generator) for _ in range(2))
    turned = regrow_fan_in(mask.transpose(0, 1), keep.transpose(0, 1), grow.transpose(0, 1), 9, 0.5, dim=1)
    assert turned.equal(regrow_fan_in(mask, keep, grow, 9, 0.5).transpose(0, 1))
    target = Target.of("weight", nn.ConvTranspose2d(5, 6, 3).weight, nn.ConvTranspose2d(5, 6, 3))
    score = torch.rand(5, 6, 3, 3, generator=generator)
    (spread,) = FanIn().spread([torch.ones(5, 6, 3, 3, dtype=torch.bool) & (score > 0.8)], [target], [score])
    assert fan_ins(spread, dim=1) == {round(int((score > 0.8).sum()) / 6)}


def test_ties_go_to_the_earlier_entry_and_what_is_gone_stays_gone() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0], [-torch.inf, -torch.inf, -torch.inf], [0.0, -torch.inf, 0.0]])
    assert fan_in_mask(score, 2).tolist() == [[True, True, False], [False] * 3, [True, False, True]]


@pytest.mark.parametrize("fan_in", [1, 3, 9])
def test_ties_of_an_output_go_to_the_earlier(fan_in: int) -> None:
    """As a stable sort decides them."""
    score = torch.randint(0, 4, (40, 9), generator=torch.Generator().manual_seed(0)).float()
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :fan_in]
    assert fan_in_mask(score, fan_in).equal(torch.zeros(40, 9, dtype=torch.bool).scatter_(1, best, True))


METHODS: dict[str, Any] = {
    "RigL": lambda **o: RigL(0.9, every="2 steps", **o),
    "SET": lambda **o: SET(0.9, every="2 steps", **o),
    "GraNet": lambda **o: GraNet(0.9, every="2 steps", **o),
    "GraNet, dense": lambda **o: GraNet(0.9, every="2 steps", initial_sparsity=0.0, allocation="erk", **o),
    "gradual": lambda **o: MagnitudePruning(0.9, start=0.0, end=0.8, **o),
    "gradual, erk": lambda **o: MagnitudePruning(0.9, start=0.0, end=0.8, allocation="erk", **o),
    "random": lambda **o: RandomSparsity(0.9, **o),
    "SNIP": lambda **o: SNIP(0.9, **o),
    "lottery ticket": lambda **o: LotteryTicket(0.9, rounds=2, **o),
    "AC/DC": lambda **o: ACDC(0.9, every="2 steps", last_dense="2 steps", **o),
}


@pytest.mark.parametrize("name", METHODS)
def test_at_every_moment_all_outputs_have_as_many(name: str) -> None:
    method, before = METHODS[name](structure="fan_in"), {}

    def look(moment: str, module: L.LightningModule) -> None:
        for key in method.masks:
            mask = method.masks[key]
            assert len(fan_ins(mask) - {0}) == 1, (moment, key)
            assert not module.get_parameter(key)[~mask].any()
            if name.startswith("gradual"):
                assert not (mask & ~before.get(key, mask)).any(), "nothing returns"
            before[key] = mask

    fit(toy("adam"), Watcher(look), method)
    outputs = {"net.0.weight": 8, "net.2.weight": 8, "net.6.weight": 16, "net.8.weight": 4}
    assert abs(method.masks.kept - 276) <= sum(outputs.values())
    assert method.masks.counts["net.0.weight"] >= 8, "one input each is left"


def test_outputs_that_do_not_matter_are_ablated_but_never_classes() -> None:
    class Uneven(Toy):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.net[6].weight[8:] *= 1e-4
                self.net[6].bias[8:] = -10  # no gradient comes through a dead ReLU
                self.net[8].weight[2:] *= 1e-4

    kept = {}
    for share in (0.0, 0.9):
        method = RigL(0.8, structure="fan_in", min_salient=share, every="2 steps", end=1.0, seed=0)
        fit(Uneven(), method)
        kept[share] = {name: method.masks[name].flatten(1).any(1) for name in method.masks}
        assert method.at_target
        assert method.goal["total"] == method.masks.kept
    assert kept[0.0]["net.6.weight"].all()
    assert int((~kept[0.9]["net.6.weight"][8:]).sum()) > int((~kept[0.9]["net.6.weight"][:8]).sum())
    assert kept[0.9]["net.8.weight"].all()
