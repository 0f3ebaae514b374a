"""Scores of channels that compete with those of other layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["input_score", "normalized"]


def normalized(score: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part, count: int | None = None) -> Tensor:
    r"""Scores divided by their mean magnitude, so that layers of any width and scale are comparable.

    $$ s_i \leftarrow s_i \, / \, \frac{1}{n} \sum_j |s_j| $$

    Removed entries (-inf) count as zero in the mean, so the remaining scores of a layer rise as it shrinks.

    Source: the normalizer `mean` of Torch-Pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900).

    Args:
        score: scores of one layer.
        total: sums this rank's share over all ranks, if it holds a shard of the layer.
        count: number of scores on all ranks together; by default the number given.

    Example:
        >>> normalized(torch.tensor([3.0, 1.0, -torch.inf, 0.0]))
        tensor([3., 1., -inf, 0.])
    """
    mean = total(score.abs().masked_fill(score.isinf(), 0).sum()) / (score.numel() if count is None else count)
    return score / torch.where(mean > 0, mean, torch.ones_like(mean))


def input_score(score: Tensor, dim: int = 1) -> Tensor:
    """One score per input: the mean over the entries that read it, without removed ones (-inf).

    Example:
        >>> input_score(torch.tensor([[3.0, 1.0], [-torch.inf, 3.0]]))
        tensor([3., 2.])
    """
    entries = score.movedim(dim, 0).flatten(1)
    gone = entries == -torch.inf
    return entries.masked_fill(gone, 0).sum(1) / (~gone).sum(1).clamp(min=1)
