"""Scores from weights and their inputs: Wanda, and relative importance with activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_sparse.functional.penalties import alone

__all__ = ["ria_score", "row_ranks", "wanda_score"]


def wanda_score(matrix: Tensor, norms: Tensor) -> Tensor:
    r"""The size of a weight times the norm of the input that it multiplies: $|w_{ij}| \, \|x_j\|_2$.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    https://arxiv.org/abs/2306.11695, eq. 1.

    Args:
        matrix: weights, (..., outputs, inputs).
        norms: of the inputs, (..., inputs), up to a factor.

    Example:
        >>> wanda_score(torch.tensor([[4.0, 0.0, 1.0], [3.0, -2.0, 1.0]]), torch.tensor([1.0, 2.0, 8.0]))
        tensor([[4., 0., 8.],
                [3., 4., 8.]])
    """
    return matrix.detach().abs().to(norms.dtype) * norms.unsqueeze(-2)


def ria_score(matrix: Tensor, norms: Tensor, power: float = 0.5, total: Callable[[Tensor], Tensor] = alone) -> Tensor:
    r"""The share of a weight in the weights of its output and of its input, times a power of the norm of the input.

    $$ \left(\frac{|w_{ij}|}{\sum_k |w_{kj}|} + \frac{|w_{ij}|}{\sum_k |w_{ik}|}\right) \|x_j\|_2^a $$

    Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    https://openreview.net/forum?id=Tr0lPx9woF, eqs. 2 and 3.

    Args:
        matrix: weights, (..., outputs, inputs).
        norms: of the inputs, (..., inputs), up to a factor.
        power: a.
        total: turns sums over the outputs of this rank into sums over all outputs.

    Example:
        >>> ria_score(torch.tensor([[1.0, 1.0], [3.0, 0.0]]), torch.tensor([4.0, 1.0]))
        tensor([[1.5000, 1.5000],
                [3.5000, 0.0000]])
    """
    size = matrix.detach().abs().to(norms.dtype)
    of_input, of_output = total(size.sum(-2, keepdim=True)), size.sum(-1, keepdim=True)
    share = size / of_input.clamp(min=1e-30) + size / of_output.clamp(min=1e-30)  # 0 where there is nothing to share
    return share * norms.pow(power).unsqueeze(-2)


def row_ranks(score: Tensor) -> Tensor:
    """The rank of each entry in its row, 1 for the lowest; among equal scores the earlier entry ranks higher.

    Ranks can be compared across rows where scores cannot: keeping the highest ranks keeps the same number in each row.

    Example:
        >>> row_ranks(torch.tensor([[0.1, 0.3, 0.2], [7.0, 7.0, 9.0]]))
        tensor([[1., 3., 2.],
                [2., 1., 3.]])
    """
    order = score.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(score.shape[-1], 0, -1, device=score.device, dtype=score.dtype)
    return torch.empty_like(score).scatter_(-1, order, places.expand_as(score))
