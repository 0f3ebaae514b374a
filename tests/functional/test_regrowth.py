import math

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import (
    DROP_SCHEDULES,
    drop_count,
    growth_score,
    hashed_score,
    n_m_mask,
    random_generator,
    regrow,
)
from tests.helpers.oracles import slow_regrow


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text])


# Weights are scores to keep, gradients scores to grow; every row can be checked by eye.
TABLE = {
    "one moves to the largest gradient": ("11100", [3, 1, 2, 0, 0], [0, 0, 0, 2, 3], 1, "10101"),
    "the gradients of survivors do not matter": ("11100", [3, 1, 2, 0, 0], [9, 0, 9, 2, 3], 1, "10101"),
    "what was dropped may come back": ("11100", [3, 1, 2, 0, 0], [0, 5, 0, 2, 3], 1, "11100"),
    "two move": ("111000", [1, 3, 2, 0, 0, 0], [0, 0, 0, 1, 3, 2], 2, "010011"),
    "all move": ("1100", [1, 2, 0, 0], [0, 0, 1, 1], 2, "0011"),
    "scores outside of the mask do not keep": ("11000", [1, 2, 9, 9, 9], [0, 0, 1, 2, 3], 1, "01001"),
    "none moves": ("11000", [1, 2, 0, 0, 0], [0, 0, 3, 2, 1], 0, "11000"),
    "equal weights: the later one goes": ("11100", [1, 1, 1, 0, 0], [0, 0, 0, 0, 1], 1, "11001"),
    "equal gradients: the earlier one comes": ("10010", [2, 0, 0, 1, 0], [0, 1, 1, 0, 1], 1, "11000"),
    "no gradient at all: the first that are free": ("00110", [0, 0, 2, 1, 0], [0, 0, 0, 0, 0], 1, "10100"),
    "zeros inside the mask go first": ("11110", [0, 2, 0, 1, 0], [0, 0, 0, 0, 1], 1, "11011"),
    "a full layer stays full": ("111", [1, 2, 3], [0, 0, 0], 2, "111"),
}


@pytest.mark.parametrize("row", TABLE)
def test_literal_tables(row: str) -> None:
    mask, keep, grow, count, expected = TABLE[row]
    found = regrow(bits(mask), torch.tensor(keep).float(), torch.tensor(grow).float(), count)
    assert "".join(str(int(bit)) for bit in found) == expected


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_equals_the_slow_version(levels: int, count: int) -> None:
    torch.manual_seed(levels + count)
    mask = torch.zeros(200, dtype=torch.bool)
    mask[torch.randperm(200)[:30]] = True
    mask = mask.view(10, 20)
    keep, grow = (torch.randint(levels, (10, 20)).float() for _ in range(2))
    new = regrow(mask, keep, grow, count, kept=30)
    assert new.equal(slow_regrow(mask, keep, grow, count))
    assert int(new.count_nonzero()) == 30


def two_of_four(score: Tensor) -> Tensor:
    return score.masked_fill(n_m_mask(score, 2, 4), torch.inf)


def test_groups_keep_their_number() -> None:
    torch.manual_seed(0)
    mask = n_m_mask(torch.rand(6, 12), 2, 4)
    keep, grow = torch.rand(6, 12), torch.rand(6, 12)
    new = regrow(mask, keep, grow, 10, protect=two_of_four)
    assert (new.view(6, 3, 4).sum(2) == 2).all()
    # The survivors are those of the whole layer; each group then fills up with its own largest gradients.
    survivors = mask & (keep >= keep[mask].sort().values[10])
    for group in range(18):
        s, g, n = (x.view(18, 4)[group].tolist() for x in (survivors, grow, new))
        free = sorted((i for i in range(4) if not s[i]), key=lambda i: -g[i])[: 2 - sum(s)]
        assert n == [s[i] or i in free for i in range(4)]


def test_groups_with_more_than_their_number_never_fall_below_it() -> None:
    """As on the way of gradual pruning: at least two of four, and the rest where the gradient is."""
    torch.manual_seed(1)
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[:, ::4] = False
    new = regrow(mask, torch.rand(8, 16), torch.rand(8, 16), 60, protect=two_of_four)
    assert int(new.count_nonzero()) == int(mask.count_nonzero())
    assert (new.view(8, 4, 4).sum(2) >= 2).all()
    assert (new.view(8, 4, 4).sum(2) > 2).any()


@pytest.mark.parametrize(
    ("kept", "fraction", "expected"),
    [(10, 0.3, 3), (100, 0.29, 29), (3, 0.3, 0), (7, 0.5, 3), (1000, 0.005, 5), (5, 0.0, 0)],
)
def test_counts_are_rounded_down(kept: int, fraction: float, expected: int) -> None:
    assert drop_count(kept, fraction) == expected


def test_golden_cosine() -> None:
    """RigL: 0.3 falls to 0 at 25,000 steps; GraNet: 0.5 falls to 0.005."""
    cosine = DROP_SCHEDULES["cosine"]
    assert [cosine(t / 25_000, 0.3, 0.0) for t in (0, 12_500, 25_000)] == pytest.approx([0.3, 0.15, 0.0], abs=1e-12)
    assert cosine(0.2, 0.3, 0.0) == pytest.approx(0.15 * (1 + math.cos(math.pi / 5)))
    assert [cosine(t, 0.5, 0.005) for t in (0, 0.5, 1)] == pytest.approx([0.5, 0.2525, 0.005], abs=1e-12)
    assert [DROP_SCHEDULES["constant"](t, 0.3, 0.0) for t in (0, 0.5, 1)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize("count", [-1, 4])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count} connections cannot be dropped where there are 3"):
        regrow(bits("11100"), torch.ones(5), torch.ones(5), count)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    grow = torch.tensor([0.0, 0.0, 0.0, bad, 0.0])
    with pytest.raises(ValueError, match="A growth score is NaN or infinite"):
        regrow(bits("11100"), torch.ones(5), grow, 1)


# ---- random growth --------------------------------------------------------------------------------------------------


def test_the_growth_score_takes_magnitudes_and_makes_outputs_comparable() -> None:
    gradient = torch.tensor([[3.0, -4.0], [3e-20, 4e-20], [0.0, 0.0]])
    torch.testing.assert_close(growth_score(gradient), torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(growth_score(gradient.T, dim=1), growth_score(gradient).T)


def slow_hash(index: int, first: int, second: int) -> int:
    """The same hash on Python's whole numbers, as an unsigned 32-bit number."""
    low = 0xFFFFFFFF
    x = (index + first) & low
    x ^= x >> 16
    x = (x * 0x7FEB352D) & low
    x ^= second & low
    x ^= x >> 15
    x = (x * 0x846CA68B) & low
    return x ^ (x >> 16)


def test_the_hash_equals_that_of_whole_numbers() -> None:
    first, second = torch.randint(-(1 << 31), 1 << 31, (2,), generator=random_generator(3, 7, "fc")).tolist()
    score = hashed_score(torch.empty(4, 50), random_generator(3, 7, "fc"))
    expected = [slow_hash(i, first, second) for i in range(200)]
    assert score.shape == (4, 50)
    assert score.flatten().tolist() == [(x - (x >> 31 << 32)) >> 8 for x in expected]


def test_the_hash_depends_on_seed_step_and_name_and_nothing_else() -> None:
    weight = torch.empty(1000)
    torch.rand(17)
    scores = [hashed_score(weight, random_generator(*key)) for key in ((0, 1, "a"), (0, 1, "a"), (1, 1, "a"), (0, 2, "a"))]
    scores.append(hashed_score(weight, random_generator(0, 1, "b")))
    assert scores[0].equal(scores[1])
    for i in (2, 3, 4):
        correlation = torch.corrcoef(torch.stack([scores[0], scores[i]]))[0, 1]
        assert abs(float(correlation)) < 4 / 1000**0.5


def test_every_entry_has_the_same_chance_to_grow() -> None:
    mask, keep = bits("1" * 40 + "0" * 360), torch.ones(400)
    grown = torch.zeros(400)
    for step in range(300):
        grown += regrow(mask, keep, hashed_score(keep, random_generator(0, step, "x")), 20)
    free = grown[20:]  # the first twenty survive by index; the others are free, those that are dropped included
    assert (grown[:20] == 300).all()
    assert float(free.sum()) == 300 * 20
    expected = 300 * 20 / 380
    assert abs(float(free.var()) / expected - 1) < 0.25  # near Poisson
    assert abs(float(free[:190].sum()) / 3000 - 1) < 0.1
