"""Scores of channels that compete with those of other layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["input_score", "normalized"]


def normalized(score: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part, count: int | None = None) -> Tensor:
    r"""Scores divided by the mean of their sizes, so that layers of any width and scale compare.

    $$ s_i \leftarrow s_i \, / \, \frac{1}{n} \sum_j |s_j| $$

    What is gone already (-inf) counts as zero in the mean, so what is left of a layer gains as the layer loses.

    Source: the normalizer `mean` of Torch-Pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900).

    Args:
        score: of one layer.
        total: the sum over all ranks of what this one has, where it holds a part of the layer.
        count: how many there are on all ranks together; by default those given.

    Example:
        >>> normalized(torch.tensor([3.0, 1.0, -torch.inf, 0.0]))
        tensor([3., 1., -inf, 0.])
    """
    mean = total(score.abs().masked_fill(score.isinf(), 0).sum()) / (score.numel() if count is None else count)
    return score / torch.where(mean > 0, mean, torch.ones_like(mean))


def input_score(score: Tensor, dim: int = 1) -> Tensor:
    """One score per input: the mean over the entries that read it; without those that are gone already (-inf).

    Example:
        >>> input_score(torch.tensor([[3.0, 1.0], [-torch.inf, 3.0]]))
        tensor([3., 2.])
    """
    entries = score.movedim(dim, 0).flatten(1)
    gone = entries == -torch.inf
    return entries.masked_fill(gone, 0).sum(1) / (~gone).sum(1).clamp(min=1)
