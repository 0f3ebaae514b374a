"""Properties of the unit step, its proxies and per-feature normalization, against autograd, loops and counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.functional import (
    FEATURE_NORMS,
    STEP_PROXIES,
    connection_count,
    connection_price,
    cubic,
    dead_features,
    density_error,
    normalize_features_,
    steer_price,
    unit_step,
)
from tests.helpers.oracles import by_loop


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relu_proxy(variables: Tensor) -> Tensor:
    """A negative control: the derivative of ReLU, zero where pruned."""
    return (variables > 0).to(variables.dtype)


def clipped_proxy(variables: Tensor) -> Tensor:
    """A negative control: the derivative of hard tanh, zero outside [-1, 1]."""
    return (variables.abs() <= 1).to(variables.dtype)


# ---- the step -------------------------------------------------------------------------------------------------------


def test_the_step_is_zero_or_one_and_strict() -> None:
    variables = torch.tensor([-1.0, -1e-30, 0.0, 1e-30, 1.0])
    assert unit_step(variables).tolist() == [0, 0, 0, 1, 1]
    weight = sample(4, 3)
    assert (weight * unit_step(torch.full_like(weight, 0.1))).equal(weight)


@pytest.mark.parametrize("proxy", STEP_PROXIES)
def test_gradients_of_weights_and_variables(proxy: str) -> None:
    weight, variables, x = sample(5, 4).requires_grad_(), sample(5, 4, seed=1).requires_grad_(), sample(7, 4, seed=2)
    loss = (x @ (weight * unit_step(variables, proxy)).T).tanh().add(1).square().sum()
    loss.backward()
    effective = (weight * (variables > 0)).detach().requires_grad_()
    (x @ effective.T).tanh().add(1).square().sum().backward()
    dropped = variables <= 0
    assert 0.2 < float(dropped.double().mean()) < 0.8
    assert weight.grad is not None
    assert variables.grad is not None
    assert effective.grad is not None
    assert not weight.grad[dropped].any()
    assert weight.grad[~dropped].equal(effective.grad[~dropped])
    slope = {  # by autograd of the functions that the proxies are named after
        "identity": lambda s: s,
        "leaky_relu": lambda s: F.leaky_relu(s, 0.1),
        "softplus": F.softplus,
    }[proxy]
    detached = variables.detach().requires_grad_()
    slope(detached).sum().backward()
    assert detached.grad is not None
    torch.testing.assert_close(variables.grad, effective.grad * weight * detached.grad, rtol=1e-14, atol=0)
    assert variables.grad[dropped].all()


def test_proxies_are_positive_and_the_controls_are_not() -> None:
    variables = torch.linspace(-20, 20, 401, dtype=torch.float64)
    for proxy in STEP_PROXIES.values():
        assert (proxy(variables) > 0).all()
        assert proxy(variables).dtype == torch.float64
    assert not relu_proxy(variables)[variables < 0].any()
    assert not clipped_proxy(variables)[variables < -1].any()


@pytest.mark.parametrize(("proxy", "returns"), [(relu_proxy, False), (clipped_proxy, False), ("identity", True)])
@pytest.mark.parametrize("pull", [-1.0, 1.0])
def test_a_pruned_connection_returns_if_the_proxy_is_positive(proxy: object, returns: bool, pull: float) -> None:
    variable = torch.tensor([-1.5], requires_grad=True)
    optimizer = torch.optim.SGD([variable], lr=0.1, momentum=0.9)
    kept = False
    for _ in range(100):
        optimizer.zero_grad()
        (pull * unit_step(variable, proxy)).sum().backward()  # type: ignore[arg-type]
        optimizer.step()
        kept |= bool(variable > 0)
    assert kept == (returns and pull < 0)


# ---- normalization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", FEATURE_NORMS)
@pytest.mark.parametrize("feature", [0, 1, None])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2)])
def test_normalization_feature_by_feature(norm: str, feature: int | None, shape: tuple[int, ...]) -> None:
    gradient = sample(*shape) * torch.logspace(-6, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    expected = by_loop(gradient, norm, feature)
    torch.testing.assert_close(normalize_features_(gradient.clone(), norm, feature), expected, rtol=1e-5, atol=0)


def test_every_feature_ends_with_an_rms_of_one_but_one_without_gradient() -> None:
    gradient = sample(6, 3, 3, 3).float() * torch.logspace(-5, 5, 6).reshape(-1, 1, 1, 1)
    gradient[2] = 0
    normalized = normalize_features_(gradient)
    rms = normalized.double().square().mean((1, 2, 3)).sqrt()
    assert ((rms - 1).abs() < 1e-6).tolist() == [True, True, False, True, True, True]
    assert not normalized[2].any()
    assert normalized.isfinite().all()


def test_features_are_independent() -> None:
    gradient = sample(5, 8).float()
    scaled = gradient.clone()
    scaled[3] *= 1000
    plain, other = normalize_features_(gradient.clone()), normalize_features_(scaled)
    others = [0, 1, 2, 4]
    assert plain[others].equal(other[others])
    torch.testing.assert_close(plain[3], other[3])
    permuted = torch.tensor([4, 2, 0, 1, 3])
    assert normalize_features_(gradient[permuted]).equal(plain[permuted])


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_the_scale_of_the_loss_does_not_matter(norm: str) -> None:
    gradient = sample(5, 8).float()
    assert normalize_features_(gradient * 1024, norm).equal(normalize_features_(gradient.clone(), norm))
    assert not normalize_features_(gradient * 1024, "none").equal(gradient)


def test_before_batch_normalization_the_task_has_no_direction_within_a_filter() -> None:
    """The loss does not change when all kept weights of a filter grow alike."""
    convolution, norm = nn.Conv2d(3, 4, 3, bias=False).double(), nn.BatchNorm2d(4, eps=1e-12).double()
    variables = sample(4, 3, 3, 3, seed=1).requires_grad_()
    x = sample(5, 3, 6, 6, seed=2)
    norm(F.conv2d(x, convolution.weight * unit_step(variables))).tanh().square().sum().backward()
    assert variables.grad is not None
    active = (variables.grad * (variables > 0)).sum((1, 2, 3))
    everything = variables.grad.sum((1, 2, 3))
    size = variables.grad.square().sum((1, 2, 3)).sqrt()
    assert (active.abs() / size).max() < 1e-9
    assert (everything.abs() / size).min() > 1e-3


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    first = torch.tensor([[1.0, -1.0, 0.0], [-1.0, -2.0, -3.0]])  # 1 of 6 kept, one neuron dead
    second = torch.tensor([[0.5, 0.5]])
    assert connection_count([first, second]) == 3
    assert [int(dead_features(first)), int(dead_features(first, 1)), int(dead_features(second))] == [1, 2, 0]
    assert int(dead_features(torch.zeros(3, 2, 2, 2))) == 3


# ---- steering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "wanted", "expected"),
    [(0.4, 0.2, math.log(2)), (0.2, 0.2, 0.0), (0.15, 0.2, 0.0), (0.1, 0.2, 0.0), (0.05, 0.2, -math.log(2))],
)
def test_density_error(density: float, wanted: float, expected: float) -> None:
    assert density_error(density, wanted, target=0.1) == pytest.approx(expected)


def test_prices_are_odd_and_grow_with_the_drive() -> None:
    prices = [connection_price(drive / 10, 0.01) for drive in range(-60, 61)]
    assert prices == sorted(prices)
    assert all(a == pytest.approx(-b) for a, b in zip(prices, reversed(prices), strict=True))


def test_steering_is_bounded() -> None:
    assert steer_price(5.0, 1.0, 0.1) == (6.0, 6.0)
    assert steer_price(-5.0, -1.0, 0.1) == (-6.0, -6.0)
    assert steer_price(6.0, -1.0, 0.0) == (6.0, -2.0)


@pytest.mark.parametrize("slope", [0.7, 1.2])
@pytest.mark.parametrize("target", [0.1, 0.01])
@pytest.mark.parametrize("updates", [150, 300])
def test_a_density_that_lags_behind_its_price_is_brought_to_the_target(slope: float, target: float, updates: int) -> None:
    """A plant that is easy to write down: the logarithm of the density falls with that of the price, with a lag."""
    memory, density, price = 1.0, 1.0, 0.01
    for update in range(updates):
        settled = 0.3 * (max(price, 1e-4) / 0.01) ** -slope
        density *= (settled / density) ** (12 / updates)
        wanted = 1 - cubic(min(1.0, 1.5 * update / updates), 0.0, 1 - target)
        memory, drive = steer_price(memory, density_error(density, wanted, target), 1 / updates)
        price = connection_price(drive, 0.01)
    assert density == pytest.approx(target, rel=0.15)
