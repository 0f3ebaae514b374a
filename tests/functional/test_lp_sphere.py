"""The unit Lp sphere: beside definitions in float64, loops, autograd, scipy and the golden table of the paper note."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.special import gammaln
from torch import Tensor

from lightning_sparse.functional import (
    expected_hoyer,
    from_dual,
    growth_factor,
    hoyer_sparsity,
    lp_norm,
    lp_normalize,
    lp_sgd_,
    lp_sgd_step,
    relative_magnitude,
    to_dual,
)

POWERS = [1.05, 1.07, 1.2, 1.4, 2.0, 3.0, 6.0]


def naive_norm(x: Tensor, p: float) -> Tensor:
    """The definition, in float64 and with a magnitude that does no harm there."""
    return x.double().flatten(1).abs().pow(p).sum(1).pow(1 / p)


def sphere(p: float, shape: tuple[int, ...] = (8, 5, 3, 3), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight = lp_normalize(torch.randn(shape, dtype=dtype), p)
    return weight, to_dual(weight, p)


# ---- norms and coordinates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [*POWERS, 15.3, 21.0])
def test_the_norm_is_the_norm(p: float) -> None:
    x = torch.randn(6, 4, 3)
    torch.testing.assert_close(lp_norm(x, p).flatten().double(), naive_norm(x, p), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-35, 1e-8, 1e8, 1e30])
@pytest.mark.parametrize("p", [15.3, 21.0])
def test_the_norm_neither_under_nor_overflows(p: float, scale: float) -> None:
    """At p = 1.07 and 1.05, q is 15.3 and 21: and already 1e-8 to the 6th is zero in float32."""
    x = torch.rand(4, 7) + 0.5
    assert (naive_norm(x, p) > 0).all()
    torch.testing.assert_close(lp_norm(scale * x, p) / scale, lp_norm(x, p), rtol=1e-5, atol=0)
    naive = (scale * x).pow(p).sum(1).pow(1 / p)
    assert not torch.allclose(naive, lp_norm(scale * x, p).flatten(), atol=0), "the naive norm would have done"


def test_the_norm_along_another_dimension() -> None:
    x = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(lp_norm(x, 1.3, dim=1).flatten(), lp_norm(x.movedim(1, 0), 1.3).flatten())
    assert lp_norm(x, 1.3, dim=1).shape == (1, 4, 1, 1)
    torch.testing.assert_close(lp_normalize(x, 1.3, dim=1).movedim(1, 0), lp_normalize(x.movedim(1, 0), 1.3))
    g, v = torch.randn(x.shape), lp_normalize(x, 1.3 / 0.3, dim=1)
    moved = lp_sgd_step(v.movedim(1, 0), g.movedim(1, 0), 0.2, 1.3)
    torch.testing.assert_close(lp_sgd_step(v, g, 0.2, 1.3, dim=1).movedim(1, 0), moved)


def test_one_dimension_holds_no_vectors() -> None:
    with pytest.raises(ValueError, match=r"shape \(5,\) holds no vectors"):
        lp_norm(torch.ones(5), 2.0)


@pytest.mark.parametrize("p", POWERS)
def test_dual_coordinates(p: float) -> None:
    weight, dual = sphere(p, dtype=torch.float64)
    q = p / (p - 1)
    torch.testing.assert_close(naive_norm(dual, q), torch.ones(8, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(from_dual(dual, p), weight, rtol=1e-9, atol=0)
    assert dual.sign().equal(weight.sign())


# ---- the step -------------------------------------------------------------------------------------------------------


def by_hand(v: list[float], g: list[float], rate: float, p: float) -> tuple[list[float], list[float]]:
    """The published update of one vector, with plain numbers."""
    q = p / (p - 1)
    length = sum(abs(x) ** q for x in g) ** (1 / q)
    u = [(1 - rate) * a - rate * b / length for a, b in zip(v, g, strict=True)]
    length = sum(abs(x) ** q for x in u) ** (1 / q)
    v = [x / length for x in u]
    return v, [math.copysign(abs(x) ** (1 / (p - 1)), x) for x in v]


@pytest.mark.parametrize("p", POWERS)
def test_a_step_by_hand(p: float) -> None:
    _, dual = sphere(p, (3, 6), torch.float64)
    gradient = torch.randn(3, 6, dtype=torch.float64)
    made = lp_sgd_step(dual, gradient, 0.3, p)
    for row in range(3):
        v, w = by_hand(dual[row].tolist(), gradient[row].tolist(), 0.3, p)
        assert made[row].tolist() == pytest.approx(v, rel=1e-9)
        assert from_dual(made, p)[row].tolist() == pytest.approx(w, rel=1e-8)


def test_a_step_with_numbers_on_paper() -> None:
    """p = 1.5, q = 3: v = (1, 0), g = (0, -2), eta = 1/2: u = (1/2, 1/2), |u|_3 = 2^(1/3) / 2, w = v^2 = 2^(-2/3)."""
    made = lp_sgd_step(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -2.0]]), 0.5, 1.5)
    torch.testing.assert_close(made, torch.tensor([[1.0, 1.0]]) * 2 ** (-1 / 3))
    torch.testing.assert_close(from_dual(made, 1.5), torch.tensor([[1.0, 1.0]]) * 2 ** (-2 / 3))


def test_at_p_2_it_is_normalized_gradient_descent() -> None:
    weight, dual = sphere(2.0, (5, 7), torch.float64)
    gradient = torch.randn(5, 7, dtype=torch.float64)
    plain = 0.9 * weight - 0.1 * gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        from_dual(lp_sgd_step(dual, gradient, 0.1, 2.0), 2.0), plain / plain.norm(dim=1, keepdim=True)
    )


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("size", [1.0, 1e-8, 0.0])
def test_the_norm_is_one_after_every_step(p: float, size: float) -> None:
    weight, dual = sphere(p)
    buffer = torch.zeros_like(dual)
    for _ in range(30):
        lp_sgd_(weight, dual, buffer, size * torch.randn(weight.shape), 0.05, p, momentum=0.9, nesterov=True)
        assert (naive_norm(weight, p) - 1).abs().max() < 1e-5
        assert (naive_norm(dual, p / (p - 1)) - 1).abs().max() < 1e-5
        assert weight.equal(from_dual(dual, p)), "a weight is a function of its dual, bit for bit"
        assert (weight.sign() == dual.sign())[weight != 0].all()


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-4, 1e4, 1e8, 1e30])
def test_the_length_of_the_gradient_does_not_matter(p: float, scale: float) -> None:
    _, dual = sphere(p)
    gradient = torch.randn(dual.shape)
    one, other = lp_sgd_step(dual, gradient, 0.1, p), lp_sgd_step(dual, scale * gradient, 0.1, p)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(from_dual(other, p), from_dual(one, p), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_a_vector_without_gradient_stays(p: float, rate: float) -> None:
    weight, dual = sphere(p)
    gradient = torch.randn(dual.shape)
    gradient[2] = 0
    made = lp_sgd_step(dual, gradient, rate, p)
    torch.testing.assert_close(from_dual(made, p)[2], weight[2], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(from_dual(made, p)[3], weight[3], rtol=1e-2)
    assert made.isfinite().all()


@pytest.mark.parametrize("p", POWERS)
def test_a_vanishing_step_stays(p: float) -> None:
    """eta = 1/2 and a gradient along v: nothing is left but rounding, which is no direction to go."""
    weight, dual = sphere(p)
    made = lp_sgd_step(dual, 1e-3 * dual, 0.5, p)
    torch.testing.assert_close(from_dual(made, p), weight, rtol=1e-4, atol=1e-7)


def test_a_vector_of_zeros_joins_with_its_first_gradient() -> None:
    dual, gradient = torch.zeros(2, 4), torch.tensor([[0.0] * 4, [0.0, 2.0, 0.0, 0.0]])
    assert lp_sgd_step(dual, gradient, 0.1, 1.5).tolist() == [[0, 0, 0, 0], [0, -1, 0, 0]]


@pytest.mark.parametrize("p", [1.07, 1.4, 2.0, 4.0])
def test_a_constant_gradient_is_followed_to_the_end(p: float) -> None:
    _, v = sphere(p, (4, 6), torch.float64)
    g = torch.randn(4, 6, dtype=torch.float64)
    q = p / (p - 1)
    goal = -lp_normalize(g, q)
    distance = [float(naive_norm(v - goal, q).max())]
    for _ in range(300):
        v = lp_sgd_step(v, g, 0.05, p)
        distance.append(float(naive_norm(v - goal, q).max()))
    assert all(now <= 40 * distance[0] * 0.95**t + 1e-12 for t, now in enumerate(distance))
    assert distance[200] > 0.95**260, "it cannot be faster than its damping"
    torch.testing.assert_close((g * from_dual(v, p)).sum(1), -naive_norm(g, q), rtol=1e-5, atol=0)
    at_once = lp_sgd_step(sphere(p, (4, 6), torch.float64)[1], g, 1.0, p)
    torch.testing.assert_close(at_once, goal, rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", [1.05, 1.2, 2.0, 3.0, 6.0])
def test_small_steps_descend(p: float) -> None:
    """Against autograd: a quadratic loss in float64, eta = 1e-6, no momentum."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        center = torch.randn(1, 6, generator=generator, dtype=torch.float64)
        w = lp_normalize(torch.randn(1, 6, generator=generator, dtype=torch.float64), p).requires_grad_()
        loss = ((w - center) @ root).square().sum()
        loss.backward()
        assert w.grad is not None
        moved = from_dual(lp_sgd_step(to_dual(w.detach(), p), w.grad, 1e-6, p), p)
        after = ((moved - center) @ root).square().sum()
        assert float(after - loss.detach()) <= 1e-12
        assert float(after) < float(loss.detach()) or float(w.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_torch(nesterov: bool) -> None:
    """The direction is what SGD would subtract; seen through a step of eta = 1 at p = 2, which goes all the way."""
    gradients = [torch.randn(3, 4, dtype=torch.float64) for _ in range(5)]
    peer = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    sgd = torch.optim.SGD([peer], lr=1.0, momentum=0.8, nesterov=nesterov)
    weight, dual = sphere(2.0, (3, 4), torch.float64)
    buffer = torch.zeros_like(dual)
    for gradient in gradients:
        before = peer.detach().clone()
        peer.grad = gradient.clone()
        sgd.step()
        lp_sgd_(weight, dual, buffer, gradient, 1.0, 2.0, momentum=0.8, nesterov=nesterov)
        torch.testing.assert_close(weight, lp_normalize(peer.detach() - before, 2.0))


def test_duals_are_wider_than_weights() -> None:
    assert lp_normalize(torch.ones(2, 3).bfloat16(), 1.2).dtype == torch.float32
    weight, dual = sphere(1.2)
    low = weight.bfloat16()
    lp_sgd_(low, dual, None, torch.randn(weight.shape).bfloat16(), 0.1, 1.2)
    assert low.dtype == torch.bfloat16
    assert dual.dtype == torch.float32
    assert (naive_norm(dual, 6.0) - 1).abs().max() < 1e-5


# ---- Hoyer's sparsity -----------------------------------------------------------------------------------------------


def test_hoyer_sparsity_of_known_vectors() -> None:
    one_hot, flat = torch.zeros(1, 9), torch.ones(1, 9)
    one_hot[0, 4] = -2
    assert hoyer_sparsity(one_hot) == 1
    assert hoyer_sparsity(flat) == 0
    assert hoyer_sparsity(torch.zeros(2, 9)).tolist() == [1, 1]
    assert hoyer_sparsity(torch.ones(2, 1)).tolist() == [0, 0]
    half = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert float(hoyer_sparsity(half)) == pytest.approx((2 - 2**0.5) / (2 - 1))


def test_hoyer_sparsity_is_a_matter_of_shape() -> None:
    weight = torch.randn(6, 4, 3, 3)
    value = hoyer_sparsity(weight)
    assert ((value > 0) & (value < 1)).all()
    for scale in (1e-25, -3.0, 1e25):
        torch.testing.assert_close(hoyer_sparsity(scale * weight), value)
    flat = weight.flatten(1).double()
    exact = (6 - flat.abs().sum(1) / flat.square().sum(1).sqrt()) / 5
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hoyer_sparsity(weight.movedim(0, 1), dim=1), value)


P = [1.05, 1.07, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 6]
TABLE = {
    9: [0.9013, 0.8676, 0.8217, 0.7557, 0.6997, 0.6097, 0.5400, 0.4387, 0.3686, 0.3172, 0.2340, 0.1846, 0.1291, 0.0802],
    25: [0.8678, 0.8277, 0.7758, 0.7050, 0.6477, 0.5588, 0.4921, 0.3973, 0.3328, 0.2859, 0.2105, 0.1659, 0.1160, 0.0721],
    64: [0.8361, 0.7931, 0.7395, 0.6686, 0.6124, 0.5266, 0.4629, 0.3731, 0.3122, 0.2680, 0.1972, 0.1555, 0.1087, 0.0675],
    144: [0.8130, 0.7695, 0.7161, 0.6463, 0.5914, 0.5080, 0.4463, 0.3595, 0.3007, 0.2581, 0.1899, 0.1497, 0.1047, 0.0650],
    288: [0.7977, 0.7543, 0.7015, 0.6327, 0.5787, 0.4969, 0.4364, 0.3514, 0.2939, 0.2523, 0.1856, 0.1463, 0.1023, 0.0636],
    576: [0.7861, 0.7431, 0.6907, 0.6228, 0.5695, 0.4889, 0.4294, 0.3457, 0.2892, 0.2482, 0.1826, 0.1439, 0.1006, 0.0625],
    3136: [0.7693, 0.7269, 0.6755, 0.6089, 0.5568, 0.4779, 0.4196, 0.3378, 0.2826, 0.2425, 0.1784, 0.1406, 0.0983, 0.0611],
}


@pytest.mark.parametrize("d", TABLE)
def test_expected_hoyer_is_the_golden_table(d: int) -> None:
    assert [expected_hoyer(p, d) for p in P] == pytest.approx(TABLE[d], abs=1e-4)


def test_expected_hoyer_falls_in_p_and_in_d_and_stays_finite() -> None:
    for d in (2, 9, 576, 10**6):
        values = [expected_hoyer(p, d) for p in P]
        assert all(a > b for a, b in itertools.pairwise(values))
        assert all(0 < value < 1 for value in values)
    for p in P:
        assert expected_hoyer(p, 25) > expected_hoyer(p, 1000) > expected_hoyer(p, 10**6)
        a = 0.4 * (p - 1)
        limit = 1 - math.exp(gammaln(a + 0.5) - gammaln(a)) / math.sqrt(a)
        assert expected_hoyer(p, 10**7) == pytest.approx(limit, abs=2e-3)


@pytest.mark.parametrize(("p", "d"), [(1.1, 25), (1.2, 144), (2.0, 25), (3.0, 64)])
def test_expected_hoyer_is_the_mean_of_gamma_squares(p: float, d: int) -> None:
    torch.manual_seed(1)
    squares = torch.distributions.Gamma(torch.tensor(0.4 * (p - 1), dtype=torch.float64), 1.0).sample((20_000, d))
    assert float(hoyer_sparsity(squares.sqrt()).mean()) == pytest.approx(expected_hoyer(p, d), abs=2e-3)


# ---- topology -------------------------------------------------------------------------------------------------------


def test_relative_magnitude_is_that_of_a_loop() -> None:
    weight, mask = torch.randn(4, 3, 2), torch.rand(4, 3, 2) > 0.4
    mask[1] = False
    weight[2] = 0
    value = relative_magnitude(weight, mask)
    for unit in (0, 3):
        kept = [float(w) for w, m in zip(weight[unit].flatten().abs(), mask[unit].flatten(), strict=True) if m]
        torch.testing.assert_close(value[unit], weight[unit].abs() / (sum(kept) / len(kept)))
    assert value[2].eq(1).all()
    assert value[1].eq(1).all()
    scaled = weight * torch.tensor([1.0, 2.0, 3.0, 1e-12]).view(4, 1, 1)
    torch.testing.assert_close(relative_magnitude(scaled, mask), value)
    torch.testing.assert_close(relative_magnitude(weight.movedim(0, 2), mask.movedim(0, 2), dim=2).movedim(2, 0), value)


def test_the_controller_has_two_branches() -> None:
    # The switching line is s* (1 - h/2): 0.72 for s* = 0.8 and h = 0.2, and s* itself once h is 0.
    assert growth_factor(0.71, 0.8, 0.2, 0.1) == pytest.approx(0.9 * 0.71 / 0.8)
    assert growth_factor(0.73, 0.8, 0.2, 0.1) == pytest.approx(1.1 * 0.73 / 0.8)
    assert growth_factor(0.79, 0.8, 0.0, 0.1) == pytest.approx(0.9 * 0.79 / 0.8)
    assert growth_factor(0.8, 0.8, 0.0, 0.1) == pytest.approx(1.1)


@pytest.mark.parametrize("p", [1.0, 0.5, -2, float("nan"), float("inf"), "2", None])
def test_exponents_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match=r"p=.* must be a finite number above 1"):
        expected_hoyer(p, 9)


def test_dimensions_out_of_range() -> None:
    with pytest.raises(ValueError, match="d=1 must be at least 2"):
        expected_hoyer(2.0, 1)
    with pytest.raises(ValueError, match="shape=0 must be above 0"):
        expected_hoyer(2.0, 9, 0)
