"""Masks that are n:m along two dimensions, against a search over all masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import transposable_mask, transposable_patterns


@pytest.mark.parametrize(("n", "m", "count"), [(1, 2, 2), (1, 3, 6), (2, 3, 6), (1, 4, 24), (2, 4, 90), (3, 4, 24)])
def test_there_are_so_many_patterns(n: int, m: int, count: int) -> None:
    patterns = transposable_patterns(n, m).view(-1, m, m)
    assert len(patterns) == count == len({tuple(p.flatten().tolist()) for p in patterns})
    assert (patterns.sum(1) == n).all()
    assert (patterns.sum(2) == n).all()


def best_by_search(block: Tensor) -> float:
    """The highest sum over all ways to keep two in each row and each column of four, row by row."""
    pairs = list(itertools.combinations(range(4), 2))
    sums = []
    for rows in itertools.product(pairs, repeat=4):
        taken = [column for row in rows for column in row]
        if all(taken.count(column) == 2 for column in range(4)):
            sums.append(sum(float(block[i, j]) for i, row in enumerate(rows) for j in row))
    return max(sums)


def test_every_block_keeps_the_highest_sum() -> None:
    score = torch.rand(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = transposable_mask(score, 2, 4)
    for i, j in itertools.product(range(0, 8, 4), range(0, 12, 4)):
        block, kept = score[i : i + 4, j : j + 4], mask[i : i + 4, j : j + 4]
        assert kept.sum(0).tolist() == kept.sum(1).tolist() == [2] * 4
        assert float(block[kept].sum()) == pytest.approx(best_by_search(block))


def test_the_transpose_has_the_transposed_mask() -> None:
    score = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    assert transposable_mask(score.t(), 2, 4).equal(transposable_mask(score, 2, 4).t())


def test_of_a_convolution_every_place_of_the_kernel_is_a_matrix() -> None:
    score = torch.rand(4, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    mask = transposable_mask(score, 2, 4)
    for place in itertools.product(range(3), range(3)):
        assert mask[(..., *place)].equal(transposable_mask(score[(..., *place)], 2, 4))


def test_stacks_and_other_dimensions() -> None:
    score = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([transposable_mask(matrix, 2, 4) for matrix in score])
    assert transposable_mask(score, 2, 4, (1, 2)).equal(expected)
    assert transposable_mask(score.movedim(0, 2), 2, 4, (0, 1)).equal(expected.movedim(0, 2))


def test_infinite_scores_come_first_and_last() -> None:
    """What is pinned is kept, what is gone is not, and among the patterns that do so the sum decides."""
    score = torch.rand(4, 4, generator=torch.Generator().manual_seed(4))
    old = transposable_mask(score, 2, 4)
    pinned = score.masked_fill(old & (score > 0.6), torch.inf)
    assert transposable_mask(pinned, 2, 4)[pinned.isinf()].all()
    gone = score.masked_fill(~old, -torch.inf)
    assert transposable_mask(gone, 2, 4).equal(old)
    ranked = torch.arange(16.0).view(4, 4)
    ranked[0, :2] = torch.inf
    sums = [ranked[mask.view(4, 4)].sum() - 0 for mask in transposable_patterns(2, 4) if mask[0] and mask[1]]
    finite = [float(ranked[m.view(4, 4) & ranked.isfinite()].sum()) for m in transposable_patterns(2, 4) if m[0] and m[1]]
    found = transposable_mask(ranked, 2, 4)
    assert len(sums) == 15
    assert found[0].tolist() == [True, True, False, False]
    assert float(ranked[found & ranked.isfinite()].sum()) == max(finite)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="4 does not divide 6"):
        transposable_mask(torch.rand(4, 6), 2, 4)
