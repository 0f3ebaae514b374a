"""Cutting off at a threshold: against tables, torch's own functions, and autograd."""

from __future__ import annotations

import pytest
import torch

from lightning_sparse.functional import (
    long_tailed_slope,
    soft_threshold,
    soft_threshold_slope,
    step_threshold_gradients,
)
from tests.helpers.oracles import BinaryStep


def test_the_long_tailed_slope_of_a_small_table() -> None:
    table = {0.0: 2.0, 0.1: 1.6, 0.4: 0.4, 0.5: 0.4, 1.0: 0.4, 1.001: 0.0, 7.0: 0.0}
    x = torch.tensor(list(table), dtype=torch.float64)
    expected = torch.tensor(list(table.values()), dtype=torch.float64)
    torch.testing.assert_close(long_tailed_slope(x), expected)
    torch.testing.assert_close(long_tailed_slope(-x), expected)


@pytest.mark.parametrize("shape", [(5, 1), (1, 7), (1, 1)])
def test_gradients_through_a_step(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    threshold = torch.rand(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    shown = weight * BinaryStep.apply(weight.abs() - threshold)
    shown.retain_grad()
    shown.sin().sum().backward()
    by_weight, by_threshold = step_threshold_gradients(weight.detach(), threshold.detach(), shown.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(by_weight, weight.grad)
    torch.testing.assert_close(by_threshold.sum_to_size(shape), threshold.grad)
    assert (by_weight[shown == 0] != 0).any(), "dropped weights learn"


def test_the_soft_threshold() -> None:
    weight = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    source = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    shown = weight.sign() * torch.relu(weight.abs() - source.sigmoid())
    shown.cos().sum().backward()
    threshold = source.detach().sigmoid()
    torch.testing.assert_close(soft_threshold(weight.detach(), threshold), shown.detach())
    expected = torch.nn.functional.softshrink(weight.detach(), float(threshold))
    torch.testing.assert_close(soft_threshold(weight.detach(), threshold), expected)
    slope = soft_threshold_slope(weight.detach(), threshold)
    gradient = -shown.detach().sin()
    torch.testing.assert_close(gradient * slope.abs(), weight.grad)
    torch.testing.assert_close((gradient * slope).sum() * threshold * (1 - threshold), source.grad)
    assert soft_threshold_slope(torch.tensor([-2.0, -1.0, 0.5, 2.0]), torch.tensor(1.0)).tolist() == [1, 0, 0, -1]
