"""SparseGPT of one layer: the same as an elimination of one column after the other, without any Cholesky factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import compensate, inverse_factor
from tests.helpers.oracles import sample


def slow_sparsegpt(
    weight: Tensor, rows: Tensor, keep: int, n_m: tuple[int, int] | None = None, block: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper. What its Cholesky factor stands for is inverted anew for every column: the products of all
    inputs from that column on. Blocks keep their share, by single entries."""
    w, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    h = rows.T @ rows
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    size = columns if n_m is None else n_m[1]
    for j in range(columns):
        if n_m is None and j % block == 0:
            end = min(j + block, columns)
            number = round(keep * end / columns) - round(keep * j / columns)
            entries = [(float(w[r, c] ** 2 / inverses[c][0, 0]), r, c) for r in range(len(w)) for c in range(j, end)]
            for _, r, c in sorted(entries)[: len(entries) - number]:
                mask[r, c] = False
        if n_m is not None and j % size == 0:
            for r in range(len(w)):
                group = [(float(w[r, c] ** 2 / inverses[c][0, 0]), c) for c in range(j, j + size)]
                for _, c in sorted(group)[: size - n_m[0]]:
                    mask[r, c] = False
        # Decided at the start of a block by weights as they are then, so changes inside it reach its scores only later.
        for r in range(len(w)):
            if not mask[r, j]:
                w[r, j:] -= w[r, j] / inverses[j][0, 0] * inverses[j][:, 0]
                w[r, j] = 0
    return w, mask


def correlated(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    mix = torch.eye(columns, dtype=dtype) + 0.3 * sample(columns, columns, seed=seed + 1, dtype=dtype)
    return sample(rows, columns, seed=seed, dtype=dtype) @ mix


@pytest.mark.parametrize("n_m", [None, (2, 4), (1, 4), (3, 8)])
@pytest.mark.parametrize("block", [128, 16])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_equals_the_algorithm_of_the_paper(
    n_m: tuple[int, int] | None, block: int, dtype: torch.dtype, close: float
) -> None:
    weight, rows = sample(12, 40, seed=3, dtype=dtype), correlated(200, 40, dtype)
    keep = 12 * 40 * 2 // 5
    expected, mask = slow_sparsegpt(weight.double(), rows.double(), keep, n_m, block)
    found = weight[None].clone()
    got = compensate(found, inverse_factor((rows.T @ rows)[None]), keep, n_m=n_m, block_size=block)
    assert got[0].equal(mask)
    assert int(got.count_nonzero()) == (keep if n_m is None else 480 * n_m[0] // n_m[1])
    torch.testing.assert_close(found[0].double(), expected, rtol=close, atol=close)
    assert (found[0] == 0).equal(~mask)


def test_outputs_change_less_than_without_compensation() -> None:
    weight, rows = sample(16, 64, seed=3), correlated(500, 64, torch.float64)
    found = weight[None].clone()
    mask = compensate(found, inverse_factor((rows.T @ rows)[None]), 512)[0]
    error = (rows @ (found[0] - weight).T).square().sum()
    assert error < 0.9 * (rows @ (weight * mask - weight).T).square().sum()


def test_groups_are_layers_of_their_own() -> None:
    weights, rows = sample(3, 4, 8, seed=5), [correlated(50, 8, torch.float64, seed) for seed in range(3)]
    together = weights.clone()
    compensate(together, inverse_factor(torch.stack([x.T @ x for x in rows])), 0, n_m=(2, 4))
    for weight, x, found in zip(weights, rows, together, strict=True):
        expected, _ = slow_sparsegpt(weight, x, 0, (2, 4))
        torch.testing.assert_close(found, expected)


def test_inputs_that_are_always_zero() -> None:
    """Their weights go first; those that must stay are as they were, and nobody else notices them."""
    weight, rows = sample(4, 8, seed=1), correlated(50, 8, torch.float64)
    rows[:, [1, 6]] = 0
    weight[:, [1, 6]] *= 100
    products = (rows.T @ rows)[None]
    dead = products.diagonal(dim1=1, dim2=2) == 0
    factor = inverse_factor(products.clone())
    found = weight[None].clone()
    mask = compensate(found, factor, 16, dead=dead)[0]
    assert not mask[:, [1, 6]].any()
    found = weight[None].clone()
    mask = compensate(found, factor, 28, dead=dead)[0]
    assert int(mask[:, [1, 6]].count_nonzero()) == 4
    assert found[0][:, [1, 6]].equal(weight[:, [1, 6]] * mask[:, [1, 6]])
    live = [0, 2, 3, 4, 5, 7]
    assert mask[:, live].all()
    assert found[0][:, live].equal(weight[:, live])


def test_singular_products_are_damped() -> None:
    """Fewer rows than columns, and columns that repeat."""
    rows = sample(3, 12).float()
    rows = torch.cat([rows, rows[:, :6]], 1) * 1e4
    factor = inverse_factor((rows.T @ rows)[None], damping=1e-12)
    assert factor.isfinite().all()
    found = sample(5, 18, seed=2)[None].float()
    assert int(compensate(found, factor, 45).count_nonzero()) == 45
    assert found.isfinite().all()


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_products_that_say_nothing(value: float) -> None:
    with pytest.raises(ValueError, match="zero throughout or not finite"):
        inverse_factor(torch.full((1, 3, 3), value))
