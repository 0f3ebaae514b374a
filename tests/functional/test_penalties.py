"""Gradients against autograd of formulas written as loops; proximal maps against the minimum they are defined by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import PENALTIES

WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda w: sum(abs(x) for x in w.flatten()),  # type: ignore[return-value,arg-type]
    "l2": lambda w: sum(x * x for x in w.flatten()) / 2,  # type: ignore[return-value,arg-type]
    "group_lasso": lambda w: sum(  # type: ignore[return-value]
        len(row.flatten()) ** 0.5 * sum(x * x for x in row.flatten()) ** 0.5 for row in w
    ),
    "hoyer": lambda w: sum(abs(x) for x in w.flatten()) ** 2 / sum(x * x for x in w.flatten()),  # type: ignore[return-value,arg-type]
}
PROXIMAL = [kind for kind, penalty in PENALTIES.items() if penalty.proximal_ is not None]


def weight(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 2, 2)), dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def test_the_table_is_complete() -> None:
    assert set(PENALTIES) == set(WRITTEN)
    assert PROXIMAL == ["l1", "l2", "group_lasso"]


@pytest.mark.parametrize("kind", WRITTEN)
def test_value_and_gradient(kind: str) -> None:
    w = weight().requires_grad_()
    loss = WRITTEN[kind](w)
    (expected,) = torch.autograd.grad(loss, w)
    assert float(PENALTIES[kind].value(w.detach(), 0)) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(PENALTIES[kind].gradient(w.detach(), 0), expected, rtol=1e-12, atol=1e-14)


GRADIENTS = {
    "l1": [[1.0, -1.0], [0.0, 0.0]],
    "l2": [[3.0, -4.0], [0.0, 0.0]],
    "group_lasso": [[3 / 5 * 2**0.5, -4 / 5 * 2**0.5], [0.0, 0.0]],
    "hoyer": [[2 * 7 / 25 * (1 - 7 * 3 / 25), 2 * 7 / 25 * (-1 + 7 * 4 / 25)], [0.0, 0.0]],
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_a_small_table(kind: str) -> None:
    w = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    torch.testing.assert_close(PENALTIES[kind].gradient(w, 0), torch.tensor(GRADIENTS[kind]))
    torch.testing.assert_close(PENALTIES[kind].gradient(w.t(), 1), torch.tensor(GRADIENTS[kind]).t())


@pytest.mark.parametrize("kind", PROXIMAL)
@pytest.mark.parametrize("dim", [0, 1])
def test_no_other_point_is_better_than_the_proximal_one(kind: str, dim: int) -> None:
    """The objective is convex, so a point that no perturbation improves, small ones included, is the minimum."""
    w, t = weight(), 0.45
    best = w.clone()
    PENALTIES[kind].proximal_(best, t, dim)  # type: ignore[misc]

    def objective(u: Tensor) -> float:
        return float((u - w).square().sum() / 2 + t * WRITTEN[kind](u.movedim(dim, 0)))

    generator = torch.Generator().manual_seed(0)
    lowest = objective(best)
    for size in (1.0, 1e-1, 1e-2, 1e-3):
        for _ in range(150):
            other = best + size * torch.randn(best.shape, generator=generator, dtype=torch.float64)
            assert objective(other) > lowest
    assert not best.equal(w)


PROXIMAL_POINTS = {
    "l1": [[2.0, -3.0], [0.0, 0.0]],
    "l2": [[1.5, -2.0], [0.25, -0.5]],
    "group_lasso": [[3 * (1 - 2**0.5 / 5), -4 * (1 - 2**0.5 / 5)], [0.0, 0.0]],
}


@pytest.mark.parametrize("kind", PROXIMAL_POINTS)
def test_proximal_points_of_a_small_table(kind: str) -> None:
    for threshold in (1.0, torch.tensor(1.0)):
        w = torch.tensor([[3.0, -4.0], [0.5, -1.0]])
        PENALTIES[kind].proximal_(w, threshold, 0)  # type: ignore[misc]
        torch.testing.assert_close(w, torch.tensor(PROXIMAL_POINTS[kind]))
    assert not w[1].any() or kind == "l2", "what falls to zero is exactly zero"


@pytest.mark.parametrize("kind", PROXIMAL)
def test_a_threshold_of_zero_changes_nothing(kind: str) -> None:
    w = weight()
    w[0] = 0
    moved = w.clone()
    PENALTIES[kind].proximal_(moved, 0.0, 0)  # type: ignore[misc]
    assert moved.equal(w)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_zero_have_no_gradient_and_the_dtype_stays(kind: str, dtype: torch.dtype) -> None:
    zero = torch.zeros(3, 4, dtype=dtype)
    gradient = PENALTIES[kind].gradient(zero, 0)
    assert gradient.dtype == dtype
    assert not gradient.any()
    assert float(PENALTIES[kind].value(zero, 0)) == 0
    if (move := PENALTIES[kind].proximal_) is not None:
        move(zero, 0.1, 0)
        assert not zero.any()


def test_hoyer_knows_no_scale_and_counts_what_is_left() -> None:
    hoyer = PENALTIES["hoyer"]
    w = weight()
    torch.testing.assert_close(hoyer.value(100 * w, 0), hoyer.value(w, 0))
    assert float((hoyer.gradient(w, 0) * w).sum()) == pytest.approx(0, abs=1e-12)
    for left in (1, 5, 12):
        alike = torch.zeros(12).index_fill(0, torch.arange(left), -0.3)
        assert float(hoyer.value(alike, 0)) == pytest.approx(left)
