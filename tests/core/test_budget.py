import pytest
import torch
from torch import nn

from lightning_sparse.core import Budget, find_targets, lay_out
from lightning_sparse.functional import magnitude

NET = nn.Sequential(nn.Conv2d(4, 10, 3), nn.ConvTranspose2d(20, 10, 2), nn.Linear(100, 50), nn.Linear(40, 25))
TARGETS = find_targets(NET)
SIZES = [t.weight.numel() for t in TARGETS]
TOTAL = sum(SIZES)


def masks(budget: Budget, sparsity: float | None = None) -> list[torch.Tensor]:
    return lay_out(budget, TARGETS).masks([magnitude(t.weight) for t in TARGETS], sparsity)


@pytest.mark.parametrize("allocation", ["global", "uniform", "uniform+", "er", "erk", "erk+"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.8])
def test_totals_are_exact(allocation: str, sparsity: float) -> None:
    made = masks(Budget(sparsity, allocation))
    assert sum(int(m.count_nonzero()) for m in made) == TOTAL - int(sparsity * TOTAL + 0.5)


def test_uniform_is_exact_in_every_layer() -> None:
    assert [int(m.count_nonzero()) for m in masks(Budget(0.9, "uniform"))] == [n // 10 for n in SIZES]


def test_global_keeps_the_largest() -> None:
    made = masks(Budget(0.7))
    flat = torch.cat([t.weight.detach().abs().flatten() for t in TARGETS])
    kept = torch.cat([m.flatten() for m in made])
    assert flat[kept].min() >= flat[~kept].max()


def test_layer_sparsity_counts_in_the_total() -> None:
    for allocation in ("global", "erk"):
        made = masks(Budget(0.8, allocation, layer_sparsity={"3": 0.5, "0.weight": 0.5}))
        assert int(made[3].count_nonzero()) == SIZES[3] // 2
        assert int(made[0].count_nonzero()) == SIZES[0] // 2
        assert sum(int(m.count_nonzero()) for m in made) == TOTAL - int(0.8 * TOTAL + 0.5)


def test_layers_of_their_own_go_along_with_the_schedule() -> None:
    made = masks(Budget(0.8, "uniform", layer_sparsity={"0": 0.4}), sparsity=0.4)
    assert int(made[0].count_nonzero()) == round(0.8 * SIZES[0])


@pytest.mark.parametrize(
    ("allocation", "layer_sparsity"),
    [(name, own) for name in ("global", "uniform", "er", "erk") for own in ({}, {"2": 0.75, "0": 0.75})]
    + [("uniform+", {}), ("erk+", {})],
)
@pytest.mark.parametrize("structure", ["unstructured", "channel"])
def test_along_any_schedule_nothing_returns_and_the_end_is_exact(
    allocation: str, layer_sparsity: dict[str, float], structure: str
) -> None:
    budget = Budget(0.7, allocation, structure, layer_sparsity)
    plan = lay_out(budget, TARGETS)
    kept, goal = list(SIZES), plan.kept_weights()
    alive = [torch.ones_like(t.weight, dtype=torch.bool) for t in TARGETS]
    generator = torch.Generator().manual_seed(0)
    for step in range(2, 71, 4):
        scores = [
            torch.rand(t.weight.shape, generator=generator).masked_fill(~m, -torch.inf)
            for t, m in zip(TARGETS, alive, strict=True)
        ]
        made = plan.masks(scores, 0.01 * step, kept)
        assert not any((new & ~old).any() for new, old in zip(made, alive, strict=True))
        alive, kept = made, [int(m.count_nonzero()) for m in made]
        units = [budget.structure.units(t) for t in TARGETS]
        left = sum(k * u // n for k, u, n in zip(kept, units, SIZES, strict=True))
        assert left == sum(units) - int(0.01 * step * sum(units) + 0.5)
    assert {t.name: k for t, k in zip(TARGETS, kept, strict=True) if t.name in goal[1]} == goal[1]


def test_nearly_full_budgets_of_their_own_do_not_fail_on_the_way() -> None:
    budget = Budget(0.9, "global", layer_sparsity={"*": 0.9})
    lay_out(budget, TARGETS).check()
    for step in range(0, 1000, 7):
        made = masks(budget, 0.9 * step / 1000)
        assert sum(int(m.count_nonzero()) for m in made) == TOTAL - int(0.9 * step / 1000 * TOTAL + 0.5)


def test_a_score_without_a_value() -> None:
    scores = [magnitude(t.weight) for t in TARGETS]
    scores[2][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"The score of '2.weight' contains NaN"):
        lay_out(Budget(0.5), TARGETS).masks(scores)


def test_two_of_four() -> None:
    budget = Budget(None, structure="2:4")
    groups = [masks(budget)[0].view(10, 1, 4, 3, 3).sum(2), masks(budget)[2].view(50, 25, 4).sum(2)]
    assert all((g == 2).all() for g in groups)
    half_way = masks(budget, 0.2)
    assert sum(int(m.count_nonzero()) for m in half_way) == TOTAL - round(0.2 * TOTAL)
    assert (half_way[2].view(50, 25, 4).sum(2) >= 2).all()


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
def test_channels_are_whole(allocation: str) -> None:
    budget = Budget(0.4, allocation, "channel")
    made = masks(budget)
    outputs = [m.movedim(t.output_dim, 0).flatten(1) for m, t in zip(made, TARGETS, strict=True)]
    assert all((o.all(1) == o.any(1)).all() for o in outputs)
    kept = [int(o.any(1).count_nonzero()) for o in outputs]
    if allocation == "uniform":
        assert kept == [6, 6, 30, 15]
    assert sum(kept) == round(0.6 * (10 + 10 + 50 + 25))
    total, layers = lay_out(budget, TARGETS).kept_weights()
    counted = {t.name: int(m.count_nonzero()) for t, m in zip(TARGETS, made, strict=True)}
    assert layers == ({} if allocation == "global" else counted)
    assert total == (None if allocation == "global" else sum(counted.values()))
