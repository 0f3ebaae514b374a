"""Similarity of features, against the pairwise formulas in float64, autograd and golden values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import (
    PAIR_WEIGHTS,
    cka_from_hsic,
    linear_cka,
    linear_cka_matrix,
    linear_hsic,
    linear_hsic_matrix,
    off_diagonal_mean,
    similarity_penalty,
)
from tests.helpers.oracles import related, sample, slow_cka, slow_hsic, slow_hsic_of_grams


def slow_penalty(features: list[Tensor]) -> Tensor:
    """All ordered pairs of a group, the constant self pairs included, each with Gram matrices of its own."""
    return torch.stack([slow_cka(x, y) for x in features for y in features]).sum()


X = torch.arange(1, 13, dtype=torch.float64).sin().view(6, 2)
Y = torch.arange(1, 19, dtype=torch.float64).cos().view(6, 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (linear_hsic(X, X), 0.9586566435752),
        (linear_hsic(X, Y), -0.5439025010286),
        (linear_hsic(Y, Y), 2.7821155505475),
        (linear_cka(X, Y), -0.3330442429758),
        (linear_cka(X, Y, unbiased=False), 0.0178365434877),
        (linear_cka(X, Y, unbiased=False, centered=False), 0.0171976567368),
    ],
)
def test_golden_values(value: Tensor, expected: float) -> None:
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_biased_and_uncentered_forms_from_features() -> None:
    """|| Y'X ||^2 / (|| X'X || || Y'Y ||), the feature form."""
    for x, y, centered in ((X - X.mean(0), Y - Y.mean(0), True), (X, Y, False)):
        feature_form = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
        assert float(linear_cka(X, Y, unbiased=False, centered=centered)) == pytest.approx(float(feature_form), abs=1e-14)


def test_all_pairs_at_once_equal_the_pairwise_formula() -> None:
    features = related()
    matrix = linear_cka_matrix(features)
    for i, x in enumerate(features):
        for j, y in enumerate(features):
            assert float(matrix[i, j]) == pytest.approx(float(slow_cka(x, y)), abs=1e-12)
            assert float(linear_hsic_matrix(features)[i, j]) == pytest.approx(float(slow_hsic(x, y)), rel=1e-10)
    assert float(linear_cka_matrix([f.float() for f in features])[0, 1]) == pytest.approx(float(matrix[0, 1]), abs=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
def test_invariances(unbiased: bool) -> None:
    x, y, _ = related()
    value = linear_cka(x, y, unbiased)
    rotation = torch.linalg.qr(sample(20, 20, seed=4)).Q
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for a, b in ((x, y @ rotation), (x, -7 * y), (1e-30 * x, 1e30 * y), (x + sample(1, 12, seed=5), y), (y, x)):
        assert float(linear_cka(a, b, unbiased)) == pytest.approx(float(value), abs=1e-10)
    assert float(linear_cka(x[order], y[order], unbiased)) == pytest.approx(float(value), abs=1e-12)
    assert abs(float(linear_cka(x[order], y, unbiased) - value)) > 0.05
    assert float(linear_cka(x, x, unbiased)) == pytest.approx(1, abs=1e-12)
    lowest = -1 if unbiased else 0
    values = [float(linear_cka(sample(6, 3, seed=s), sample(6, 3, seed=s + 1), unbiased)) for s in range(50)]
    assert lowest - 1e-9 <= min(values) <= max(values) <= 1 + 1e-9
    assert min(values) < 0 or not unbiased


def test_only_the_unbiased_form_says_something_with_few_samples() -> None:
    draws = [(sample(8, 16384, seed=2 * s, dtype=torch.float32), sample(8, 16384, seed=2 * s + 1)) for s in range(50)]
    assert all(linear_cka(x, y.float(), unbiased=False) > 0.99 for x, y in draws[:3])
    assert abs(torch.stack([linear_cka(x, y.float()) for x, y in draws]).mean()) < 0.15


def test_gradients_are_those_of_the_pairwise_formula() -> None:
    features = [feature.requires_grad_() for feature in related(8)]
    fast = torch.autograd.grad(similarity_penalty([linear_cka_matrix(features)]), features)
    slow = torch.autograd.grad(slow_penalty(features), features)
    for mine, reference in zip(fast, slow, strict=True):
        assert mine.abs().max() > 1e-3
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("unbiased", [True, False])
def test_gradcheck(unbiased: bool) -> None:
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, unbiased), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: linear_hsic(a, b, unbiased), (x, y))


def test_a_layer_with_itself_pulls_nothing() -> None:
    x = sample(8, 30).requires_grad_()
    assert torch.autograd.grad(linear_cka(x, x), x)[0].abs().max() < 1e-10


def test_minimized_freely_similarity_becomes_negative() -> None:
    x, y = sample(8, 100).requires_grad_(), sample(8, 100, seed=1).requires_grad_()
    optimizer = torch.optim.Adam([x, y], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        value = linear_cka(x, y)
        value.backward()
        optimizer.step()
    assert value.item() < -0.9


def dead(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    if kind == "zero":
        return torch.zeros(n, 40, dtype=dtype)
    if kind == "one-hot":  # its U-centered Gram matrix vanishes, though the feature varies
        return torch.eye(n, dtype=dtype)
    row = sample(1, 40, seed=7).to(dtype)
    return (row.repeat(n, 1) * 1000) * (1 + 1e-7 * sample(n, 40, seed=8).to(dtype))  # rounding noise of a large constant


@pytest.mark.parametrize("n", [5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["zero", "constant", "one-hot"])
def test_dead_features_neither_count_nor_harm(kind: str, dtype: torch.dtype, n: int) -> None:
    live = [feature.to(dtype).requires_grad_() for feature in related(n)]
    gone = dead(kind, n, dtype).requires_grad_()
    matrix = linear_cka_matrix([live[0], gone, *live[1:]])
    assert not matrix[1].any()
    assert not matrix[:, 1].any()
    alone = linear_cka_matrix(live)
    torch.testing.assert_close(matrix[[0, 2, 3]][:, [0, 2, 3]], alone, rtol=0, atol=1e-6)  # some units in the last place
    gradients = torch.autograd.grad(matrix.sum(), [*live, gone])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[-1].any()
    reference = torch.autograd.grad(alone.sum(), live)
    for mine, theirs in zip(gradients[:-1], reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("unbiased", [True, False])
def test_too_few_samples(n: int, unbiased: bool) -> None:
    features = [feature.requires_grad_() for feature in related(n)]
    for matrix in (linear_cka_matrix(features, unbiased), linear_hsic_matrix(features, unbiased)):
        assert matrix.isfinite().all()
        assert not matrix.any() or (not unbiased and n > 1)
        assert all(g.isfinite().all() for g in torch.autograd.grad(matrix.sum(), features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_wide_under_autocast(dtype: torch.dtype) -> None:
    hidden = sample(8, 12)  # large features that are not centered: sums in 16 bits overflow, or lose the center
    x = (200 * (hidden @ sample(12, 4096, seed=1) + 60)).relu().to(dtype)
    y = (200 * (hidden @ sample(12, 4096, seed=2) + 9 * sample(8, 4096, seed=3) + 60)).relu().to(dtype)
    exact = float(slow_cka(x, y))
    with torch.autocast("cpu", dtype):
        value, criterion = linear_cka(x, y), linear_hsic(x, y)
    assert value.dtype == criterion.dtype == torch.float32
    assert float(value) == pytest.approx(exact, abs=1e-2)
    k, l = (x @ x.T).double(), (y @ y.T).double()  # noqa: E741
    narrow = slow_hsic_of_grams(k, l) / (slow_hsic_of_grams(k, k) * slow_hsic_of_grams(l, l)).sqrt()
    assert not abs(float(narrow) - exact) < 3e-2


def test_features_far_from_zero_are_centered_before_they_are_multiplied() -> None:
    hidden = sample(8, 4096, seed=1)
    x, y = (sample(8, 4096) + 30).float(), (sample(8, 4096) + hidden + 30).float()
    assert float(linear_cka(x, y)) == pytest.approx(float(slow_cka(x, y)), abs=1e-4)


def test_float32_is_enough_and_float64_can_be_had() -> None:
    x, y = sample(8, 8192).relu(), sample(8, 8192, seed=1).relu() + 3
    exact = float(slow_cka(x.float(), y.float()))
    assert float(linear_cka(x.float(), y.float())) == pytest.approx(exact, abs=1e-5)
    wide = linear_cka(x.float(), y.float(), dtype=torch.float64)
    assert wide.dtype == torch.float64
    assert float(wide) == pytest.approx(exact, abs=1e-8)  # the reference does not center first


def test_penalty_counts_ordered_pairs_without_the_constant() -> None:
    first, second = related(), related()[::-1][:2]
    matrices = [linear_cka_matrix(first), linear_cka_matrix(second)]
    with_self = slow_penalty(first) + slow_penalty(second)
    assert float(similarity_penalty(matrices)) == pytest.approx(float(with_self) - 5, abs=1e-10)
    mean = (slow_penalty(first) + slow_penalty(second) - 5) / 8
    assert float(similarity_penalty(matrices, mean=True)) == pytest.approx(float(mean), abs=1e-10)
    assert float(off_diagonal_mean(matrices)) == pytest.approx(float(mean), abs=1e-10)


@pytest.mark.parametrize(("name", "weights"), [("constant", [1, 1, 1]), ("adjacent", [3, 1, 1]), ("inverse", [3, 1.5, 1])])
def test_pair_weights(name: str, weights: list[float]) -> None:
    for distance, weight in enumerate(weights, 1):
        matrix = torch.zeros(4, 4)
        matrix[0, distance] = matrix[distance, 0] = 0.5
        assert float(similarity_penalty([matrix], PAIR_WEIGHTS[name])) == pytest.approx(weight)


def test_the_ratio_of_means_hardly_depends_on_the_batch_size() -> None:
    x = sample(512, 10)
    features = [x, (x @ sample(10, 30, seed=1)).relu(), sample(512, 30, seed=2)]
    whole = linear_cka_matrix(features)
    parts = [linear_hsic_matrix([f[start : start + 8] for f in features]) for start in range(0, 512, 8)]
    assert (cka_from_hsic(torch.stack(parts).sum(0)) - whole).abs().max() < 0.03
    dead_too = cka_from_hsic(linear_hsic_matrix([*features, torch.ones(512, 3, dtype=torch.float64)]))
    assert not dead_too[3].any()
    torch.testing.assert_close(dead_too[:3, :3], whole)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"features of the same samples, but these have \[6, 5\]"):
        linear_cka(X, Y[:5])
    with pytest.raises(ValueError, match="centered=False has no unbiased form"):
        linear_cka(X, Y, centered=False)
