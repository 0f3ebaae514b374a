"""Scores before training: against finite differences of what they stand for, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_sparse.functional import connection_sensitivity, gradient_flow, hessian_times

X = torch.sin(torch.arange(1.0, 13, dtype=torch.float64)).view(4, 3)
Y = torch.tensor([0, 1, 1, 0])
W = [
    torch.cos(torch.arange(1.0, 16, dtype=torch.float64)).view(5, 3),
    torch.sin(torch.arange(3.0, 13, dtype=torch.float64)).view(2, 5),
]


def loss(weights: list[Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy((X @ weights[0].T).tanh() @ weights[1].T, Y)


def gradients(weights: list[Tensor]) -> list[Tensor]:
    leaves = [w.clone().requires_grad_() for w in weights]
    return list(torch.autograd.grad(loss(leaves), leaves))


def along(f: Callable[[list[Tensor]], Tensor], layer: int, index: int, step: float = 1e-5) -> float:
    """How fast f moves when one weight is multiplied by a number near one, by central differences."""
    values = []
    for factor in (1 + step, 1 - step):
        weights = [w.clone() for w in W]
        weights[layer].view(-1)[index] *= factor
        values.append(float(f(weights)))
    return (values[0] - values[1]) / (2 * step)


def test_snip_is_the_derivative_by_a_mask() -> None:
    for layer, gradient in enumerate(gradients(W)):
        expected = [abs(along(loss, layer, i)) for i in range(W[layer].numel())]
        found = connection_sensitivity(W[layer], gradient).flatten()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_grasp_is_half_the_derivative_of_the_squared_gradient_norm() -> None:
    def norm(weights: list[Tensor]) -> Tensor:
        return torch.stack([g.square().sum() for g in gradients(weights)]).sum()

    leaves = [w.clone().requires_grad_() for w in W]
    products = hessian_times(loss(leaves), leaves, gradients(W))
    signs = set()
    for layer, product in enumerate(products):
        expected = [along(norm, layer, i) / 2 for i in range(W[layer].numel())]
        found = gradient_flow(W[layer], product).flatten()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9)
        signs |= set(found.sign().tolist())
    assert signs == {-1.0, 1.0}


def test_hessian_times_equals_the_hessian_written_out() -> None:
    vectors = [torch.randn_like(w) for w in W]
    full = torch.autograd.functional.hessian(lambda a, b: loss([a, b]), tuple(W))
    leaves = [w.clone().requires_grad_() for w in W]
    for i, product in enumerate(hessian_times(loss(leaves), leaves, vectors)):
        expected = sum(full[i][j].flatten(W[i].ndim).flatten(0, W[i].ndim - 1) @ vectors[j].flatten() for j in range(2))
        torch.testing.assert_close(product.flatten(), expected)


def test_small_tables() -> None:
    w, v = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[-4.0, 0.5], [9.0, -1.0]])
    assert connection_sensitivity(w, v).tolist() == [[4.0, 1.0], [0.0, 3.0]]
    assert gradient_flow(w, v).tolist() == [[-4.0, -1.0], [0.0, -3.0]]
    for score in (connection_sensitivity, gradient_flow):
        assert score(w.bfloat16(), v.bfloat16()).dtype == torch.float32
