"""Scores of Wanda and RIA, and how outliers share a budget: loops over single entries, and small tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_sparse.core import Budget, find_targets, lay_out
from lightning_sparse.functional import outlier_share, owl, ria_score, row_ranks, wanda_score
from tests.helpers.oracles import sample


def slow_wanda(matrix: Tensor, x: Tensor) -> Tensor:
    """Equation 1 of the paper, entry by entry."""
    score = torch.zeros_like(matrix)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            score[i, j] = abs(float(matrix[i, j])) * math.sqrt(sum(float(v) ** 2 for v in x[:, j]))
    return score


def slow_ria(matrix: Tensor, x: Tensor, power: float) -> Tensor:
    """Equations 2 and 3 of the paper, entry by entry."""
    score = torch.zeros_like(matrix)
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            row, column = sum(abs(float(w)) for w in matrix[i]), sum(abs(float(w)) for w in matrix[:, j])
            norm = math.sqrt(sum(float(v) ** 2 for v in x[:, j]))
            score[i, j] = (abs(float(matrix[i, j])) / row + abs(float(matrix[i, j])) / column) * norm**power
    return score


def test_scores_are_those_of_the_papers() -> None:
    matrix, x = sample(6, 5), sample(20, 5, seed=1)
    norms = x.square().sum(0).sqrt()
    torch.testing.assert_close(wanda_score(matrix, norms), slow_wanda(matrix, x))
    torch.testing.assert_close(ria_score(matrix, norms), slow_ria(matrix, x, 0.5))
    torch.testing.assert_close(ria_score(matrix, norms, 1.0), slow_ria(matrix, x, 1.0))


def test_nothing_to_share_is_no_score() -> None:
    assert ria_score(torch.zeros(2, 3), torch.ones(3)).tolist() == [[0.0] * 3] * 2


def test_ranks_within_rows() -> None:
    score = torch.tensor([[3.0, 1.0, 1.0, -torch.inf], [0.0, 0.0, 0.0, 0.0]])
    assert row_ranks(score).tolist() == [[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]


# ---- outlier-weighed layer-wise sparsity -----------------------------------------------------------------------------


def slow_owl(scores: list[Tensor], sparsity: float, threshold: float, reach: float) -> list[float]:
    """The published code: shares of outliers, stretched to twice the reach, around the density."""
    shares = []
    for score in scores:
        entries = [float(value) for value in score.flatten()]
        mean = sum(entries) / len(entries)
        shares.append(100 * sum(value > mean * threshold for value in entries) / len(entries))
    stretched = [(share - min(shares)) * (1 / (max(shares) - min(shares)) * reach * 2) for share in shares]
    mean = sum(stretched) / len(stretched)
    return [value - mean + (1 - sparsity) for value in stretched]


def heavy(seed: int, power: float) -> Tensor:
    return sample(40, 50, seed=seed).abs() ** power


def test_outliers_share_as_published() -> None:
    scores = [heavy(0, 1.0), heavy(1, 2.0), heavy(2, 3.0), heavy(3, 4.0)]
    shares = [outlier_share(score) for score in scores]
    expected = slow_owl(scores, 0.7, 5.0, 0.08)
    assert owl(shares, 0.3, [2000] * 4) == pytest.approx(expected)
    assert max(expected) - min(expected) == pytest.approx(0.16)


def test_outliers_of_layers_of_other_sizes_meet_the_budget() -> None:
    sizes = [100, 900, 50]
    densities = owl([0.02, 0.0, 0.01], 0.5, sizes)
    assert sum(d * s for d, s in zip(densities, sizes, strict=True)) == pytest.approx(0.5 * sum(sizes))
    assert densities[0] > densities[2] > densities[1]
    assert owl([0.1, 0.1], 0.3, [10, 20]) == pytest.approx([0.3, 0.3])
    assert owl([0.2, 0.1, 0.1], 0.5, [10, 10, 10], {0: 1.0}) == pytest.approx([1.0, 0.25, 0.25])


@pytest.mark.parametrize("density", [0.01, 0.05, 0.95, 1.0])
def test_no_layer_is_emptied_or_overfilled(density: float) -> None:
    densities = owl([0.0, 0.5], density, [1000, 1000])
    assert min(densities) >= density / 2
    assert max(densities) <= (1 + density) / 2 + 1e-12


def test_a_budget_by_outliers_is_exact() -> None:
    """And along a schedule no layer gets anything back."""
    net = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.Linear(40, 50), torch.nn.Linear(50, 40))
    plan = lay_out(Budget(0.77, "owl", layer_sparsity={"2": 0.5}), find_targets(net))
    plan.check()
    assert plan.kept_weights() == (1380, {"2.weight": 1000})
    scores = [heavy(0, 1.0), heavy(1, 4.0).T, heavy(2, 2.0)]
    kept = [2000, 2000, 2000]
    for sparsity in (0.2, 0.5, 0.77):
        masks = plan.masks(scores, sparsity, kept)
        found = [int(mask.count_nonzero()) for mask in masks]
        assert sum(found) == 6000 - round(sparsity * 6000)
        assert all(new <= old for new, old in zip(found, kept, strict=True))
        scores = [score.masked_fill(~mask, -torch.inf) for score, mask in zip(scores, masks, strict=True)]
        kept = found
    assert kept[1] > 2 * kept[0]
    assert kept[2] == 1000
