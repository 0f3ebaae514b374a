"""Properties of the adaptive penalty, against autograd of the double sum as the paper writes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import (
    HYPERSPARSE_ALIGNMENT,
    hypersparse_gradient,
    hypersparse_loss,
    hypersparse_scale,
    quantile_rank,
)


def literal_loss(weights: Tensor, sparsity: float) -> Tensor:
    """(1/A) sum_ij |w_i| tanh(s |w_j|) - sum_i |w_i| with A and s constant, by sorting and a full double sum."""
    size = weights.abs()
    quantile = size.detach().sort().values[int(sparsity * len(size))]
    slope = math.atanh(3**-0.5) / quantile
    saturation = (slope * size).tanh()
    return (size[:, None] * saturation[None, :]).sum() / saturation.sum().detach() - size.sum()


def sample(n: int = 40) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.975])
def test_closed_form_equals_autograd(sparsity: float) -> None:
    weights = sample().requires_grad_()
    [closed] = hypersparse_gradient([weights], sparsity)
    literal = torch.autograd.grad(literal_loss(weights, sparsity), weights)[0]
    surrogate = torch.autograd.grad(hypersparse_loss([weights], sparsity), weights)[0]
    assert (closed - literal).abs().max() < 1e-12
    assert (closed - surrogate).abs().max() < 1e-12
    assert literal.abs().max() > 0.5  # nothing cancels


def test_values() -> None:
    weights = sample()
    assert abs(float(literal_loss(weights, 0.9))) < 1e-9 * float(weights.abs().sum())
    assert float(hypersparse_loss([weights], 0.9)) == pytest.approx(float(weights.abs().sum()), rel=1e-12)


def test_differentiating_the_normalization_too_would_cancel_everything() -> None:
    weights = sample().requires_grad_()
    size = weights.abs()
    slope = hypersparse_scale([weights], 0.9).slope
    saturation = (slope * size).tanh()
    loss = (size[:, None] * saturation[None, :]).sum() / saturation.sum() - size.sum()
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-12


def test_the_pull_is_anchored_at_the_quantile() -> None:
    quantile = 0.37
    weights = torch.tensor([0.1, 0.2, quantile, 2 * quantile, 3 * quantile, 4 * quantile], dtype=torch.float64)
    scale = hypersparse_scale([weights], 0.4)
    [gradient] = hypersparse_gradient([weights], 0.4)
    assert float(scale.quantile) == quantile
    expected = [2 / 3, 1 / 4, 2 / 27, 1 / 49]
    assert (gradient[2:] / scale.pull).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_slope_is_steepest_at_the_quantile() -> None:
    size = torch.linspace(0.01, 3, 3001, dtype=torch.float64)
    scale = hypersparse_scale([size], 0.4)
    [gradient] = hypersparse_gradient([size], 0.4, scale)
    steepest = size[1:][gradient.diff().argmin()]
    assert float(steepest) == pytest.approx(float(scale.quantile), abs=2e-3)


def test_shape() -> None:
    weights = torch.cat([sample(1000), torch.tensor([0.0, 1e-12, -1e-12], dtype=torch.float64)])
    scale = hypersparse_scale([weights], 0.8)
    far = torch.tensor([10 * float(scale.quantile)], dtype=torch.float64)
    [gradient], [distant] = hypersparse_gradient([weights], 0.8, scale), hypersparse_gradient([far], 0.8, scale)
    order = weights.abs().argsort()
    assert (gradient.abs()[order][1:].diff() <= 1e-15).all()
    assert gradient.sign().equal(weights.sign())
    assert gradient[-3] == 0
    assert gradient[-2:].tolist() == pytest.approx([float(scale.pull), -float(scale.pull)], rel=1e-6)
    assert float(distant) < 1e-5 * float(scale.pull)
    assert float(scale.pull) >= 1


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 10.0, 1e6])
def test_scale_free_and_odd(factor: float) -> None:
    weights = sample(200)
    [reference] = hypersparse_gradient([weights], 0.9)
    torch.testing.assert_close(hypersparse_gradient([factor * weights], 0.9)[0], reference, rtol=1e-11, atol=1e-13)
    assert hypersparse_gradient([-weights], 0.9)[0].equal(-reference)


def test_layers_do_not_matter() -> None:
    weights = sample(240)
    [whole] = hypersparse_gradient([weights], 0.9)
    parts = hypersparse_gradient([weights[:100].view(10, 10), weights[100:101], weights[101:]], 0.9)
    torch.testing.assert_close(torch.cat([part.flatten() for part in parts]), whole, rtol=1e-12, atol=0)
    shuffled = torch.randperm(240)
    torch.testing.assert_close(hypersparse_gradient([weights[shuffled]], 0.9)[0], whole[shuffled], rtol=1e-12, atol=0)


def test_conservation() -> None:
    """sum |g| sinh(2 s |w|) / 2 = s sum |w|."""
    weights = sample(500)
    scale = hypersparse_scale([weights], 0.7)
    [gradient] = hypersparse_gradient([weights], 0.7)
    left = (gradient.abs() * (2 * scale.slope * weights.abs()).sinh() / 2).sum()
    assert float(left) == pytest.approx(float(scale.slope * weights.abs().sum()), rel=1e-10)


@pytest.mark.parametrize(
    ("sparsity", "pull"), [(0.9, 1.095), (0.95, 1.069), (0.98, 1.050), (0.99, 1.041), (0.995, 1.035), (0.998, 1.029)]
)
def test_the_pull_on_gaussian_weights(sparsity: float, pull: float) -> None:
    weights = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert float(hypersparse_scale([weights], sparsity).pull) == pytest.approx(pull, abs=2e-3)


@pytest.mark.parametrize(
    ("total", "kept"),
    [
        (1_855_584, [185_558, 92_779, 37_111, 18_555, 9_277, 3_711]),  # ResNet-32 of double width, 10 classes
        (20_024_000, [2_002_399, 1_001_199, 400_479, 200_239, 100_119, 40_047]),  # VGG-19, 10 classes
    ],
)
def test_golden_counts(total: int, kept: list[int]) -> None:
    sparsities = [0.9, 0.95, 0.98, 0.99, 0.995, 0.998]
    assert [total - quantile_rank(sparsity, total) - 1 for sparsity in sparsities] == kept


def test_at_the_edge_of_the_numbers() -> None:
    assert float(hypersparse_loss([torch.tensor([0.0, 0.0, 0.0, 1.0])], 0.5)) == 0
    [gradient] = hypersparse_gradient([torch.tensor([0.0, 1e-40, 1.0, 2.0])], 0.25)
    assert gradient.isfinite().all()
    assert gradient[0] == 0


@pytest.mark.parametrize("zeros", [900, 950, 1000])
def test_more_zeros_than_the_quantile(zeros: int) -> None:
    weights = sample(1000)
    weights[:zeros] = 0
    scale = hypersparse_scale([weights], 0.9)
    [gradient] = hypersparse_gradient([weights], 0.9)
    assert gradient.isfinite().all()
    if zeros > 900:
        assert float(scale.pull) == 0
        assert not gradient.any()


def test_the_pull_can_be_capped() -> None:
    weights = torch.cat([sample(50), 1e-7 * sample(950)])
    assert float(hypersparse_scale([weights], 0.9).pull) > 1e4
    scale = hypersparse_scale([weights], 0.9, max_pull=10.0)
    assert float(hypersparse_gradient([weights], 0.9, scale)[0].abs().max()) == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_weights_are_summed_wide(dtype: torch.dtype) -> None:
    weights = [torch.randn(300_000, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    narrow, wide = hypersparse_scale(weights, 0.9), hypersparse_scale([w.double() for w in weights], 0.9)
    assert narrow.pull.dtype == torch.float32
    assert float(narrow.pull) == pytest.approx(float(wide.pull), rel=1e-5)
    assert hypersparse_gradient(weights, 0.9)[0].isfinite().all()


@pytest.mark.parametrize("sparsity", [0, 1, -0.5, 1.5])
def test_sparsities_that_mean_nothing_here(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\): the fraction"):
        hypersparse_scale([sample()], sparsity)


def test_the_alignment() -> None:
    assert pytest.approx(0.6584789484624084, rel=1e-12) == HYPERSPARSE_ALIGNMENT
    assert math.tanh(HYPERSPARSE_ALIGNMENT) ** 2 == pytest.approx(1 / 3)
