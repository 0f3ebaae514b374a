import math

import pytest

from lightning_sparse.functional import ALLOCATIONS, allocate, counts, er, erk, erk_plus, uniform, uniform_plus

# ResNet-20 of width 16 for 100 classes with convolutional shortcuts: 276,656 weights.
RESNET20 = [(16, 3, 3, 3)] + [(16, 16, 3, 3)] * 6
RESNET20 += [(32, 16, 3, 3), (32, 32, 3, 3), (32, 16, 1, 1)] + [(32, 32, 3, 3)] * 4
RESNET20 += [(64, 32, 3, 3), (64, 64, 3, 3), (64, 32, 1, 1)] + [(64, 64, 3, 3)] * 4
RESNET20 += [(100, 64)]
SIZES = [math.prod(s) for s in RESNET20]
STEM, BLOCK1, SHORTCUT2, SHORTCUT3, LAST_CONV, FC = 0, 1, 9, 16, 20, 21


def test_golden_densities_at_5_percent() -> None:
    assert sum(SIZES) == 276_656
    d = erk(RESNET20, 0.05)
    golden = {STEM: 0.4598, BLOCK1: 0.1310, SHORTCUT2: 0.7759, LAST_CONV: 0.0289, FC: 0.2036}
    assert {layer: round(d[layer], 4) for layer in golden} == golden
    epsilon = d[BLOCK1] / (sum(RESNET20[BLOCK1]) / SIZES[BLOCK1])
    assert epsilon == pytest.approx(7.94532, abs=1e-5)


def test_golden_densities_at_30_percent() -> None:
    d = erk(RESNET20, 0.3)
    assert [layer for layer, density in enumerate(d) if density == 1.0] == [STEM, SHORTCUT2, SHORTCUT3, FC]
    epsilon = d[BLOCK1] / (sum(RESNET20[BLOCK1]) / SIZES[BLOCK1])
    assert epsilon == pytest.approx(52.42507, abs=1e-5)


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_the_budget_is_spent_and_no_layer_overfull(name: str, density: float) -> None:
    try:
        d = ALLOCATIONS[name](RESNET20, density, {})
    except ValueError:
        assert name == "erk+"  # the classifier alone has 2.3 % of the weights
        assert density == 0.02
        return
    assert sum(share * size for share, size in zip(d, SIZES, strict=True)) == pytest.approx(density * sum(SIZES), rel=1e-12)
    assert all(0 <= share <= 1 for share in d)
    total = round(density * sum(SIZES))
    whole = counts(d, SIZES, total)
    assert sum(whole) == total
    assert all(abs(n - share * size) < 1 for n, share, size in zip(whole, d, SIZES, strict=True))


def test_capped_layers_equal_a_bisection_for_epsilon() -> None:
    """The oracle looks for epsilon by bisection instead of capping one layer after the other."""
    raw = [sum(s) / math.prod(s) for s in RESNET20]
    low, high = 0.0, 1e6
    for _ in range(200):
        epsilon = (low + high) / 2
        spent = sum(min(1, epsilon * r) * n for r, n in zip(raw, SIZES, strict=True))
        low, high = (epsilon, high) if spent < 0.6 * sum(SIZES) else (low, epsilon)
    assert allocate(raw, RESNET20, 0.6) == pytest.approx([min(1, epsilon * r) for r in raw], rel=1e-9)


def test_erdos_renyi_without_kernel() -> None:
    d = er([(10, 20), (30, 40)], 0.1)
    assert d[0] / d[1] == pytest.approx((30 / 200) / (70 / 1200))


def test_uniform_plus_keeps_the_ends() -> None:
    d = uniform_plus(RESNET20, 0.05)
    assert (d[STEM], d[FC]) == (1.0, 0.2)
    assert len(set(d[1:-1])) == 1
    dense_enough = uniform_plus(RESNET20, 0.3)
    assert dense_enough[FC] == dense_enough[1]


def test_uniform_plus_looks_at_the_density_of_the_layer() -> None:
    """The first layer takes so much that the others fall below a fifth, although the whole has more."""
    shapes = [(100,), (1000,), (1000,)]
    assert uniform_plus(shapes, 0.21)[2] == 0.2
    assert uniform_plus(shapes, 0.5)[2] == uniform_plus(shapes, 0.5)[1]


def test_counts_within_bounds() -> None:
    assert counts([0.5, 0.5], [10, 10], 10, high=[2, 10]) == [2, 8]
    assert counts([0.5, 0.5], [10, 10], 10, low=[0, 8]) == [2, 8]
    assert counts([0.1, 0.9], [1000, 1000], 1000, low=[600, 0]) == [600, 400]
    with pytest.raises(ValueError, match="must keep 8 and at most 9"):
        counts([0.5], [10], 10, low=[8], high=[9])


def test_erk_plus_keeps_the_classifier() -> None:
    assert erk_plus(RESNET20, 0.05)[FC] == 1.0


def test_an_erk_plus_budget_that_cannot_be_met() -> None:
    """ResNet-18 on ImageNet: the classifier alone is 4.38 % of the weights."""
    convolutions = 11_678_912 - 512_000
    shapes = [(convolutions,), (1000, 512)]
    with pytest.raises(ValueError, match=r"sparsity=0\.96 keeps 467,156 of 11,678,912 weights.* keep 512,000"):
        allocate([1.0, 1.0], shapes, 0.04, {1: 1.0})
    assert allocate([1.0, 1.0], shapes, 0.05, {1: 1.0})[0] == pytest.approx(0.0064, abs=1e-4)


def test_fixed_layers_can_leave_too_much() -> None:
    with pytest.raises(ValueError, match="the others hold 100"):
        uniform([(100,), (100,)], 0.9, {0: 0.1})


def test_whole_shares_stay_whole() -> None:
    assert counts([0.1] * 3, [1000, 10, 20], 103) == [100, 1, 2]
