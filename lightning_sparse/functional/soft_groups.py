"""S-STE: weights of a group made smaller by the largest of those that the group drops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["group_soft_threshold", "least_squares_scale"]


def group_soft_threshold(weight: Tensor, kept: Tensor, m: int, dim: int = 1) -> Tensor:
    r"""What is kept of every m consecutive entries, made smaller by the largest magnitude t that is dropped there.

    $$ S(w) = sign(w) \, (|w| - t) $$

    for kept entries, and zero for the others. Where two entries change places in the order of their group, S does not jump,
    as the hard mask does: both are zero there.

    Source: Hu, Zhu and Chen 2024, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training",
    https://arxiv.org/abs/2409.09099.

    Args:
        weight: dense.
        kept: the mask of the largest of every group.
        m: the size of a group.
        dim: along which to group.

    Example:
        >>> weight = torch.tensor([[-4.0, 1.0, 2.0, 3.0]])
        >>> group_soft_threshold(weight, torch.tensor([[True, False, False, True]]), 4)
        tensor([[-2.,  0.,  0.,  1.]])
    """
    size = weight.abs()
    dropped = size.masked_fill(kept, 0).movedim(dim, -1)
    groups = dropped.reshape(*dropped.shape[:-1], -1, m)
    threshold = groups.amax(-1, keepdim=True).expand(groups.shape).reshape(dropped.shape).movedim(-1, dim)
    return size.sub_(threshold).masked_fill_(~kept, 0).copysign_(weight).add_(0.0)


def least_squares_scale(weight: Tensor, shown: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    r"""The factor by which something comes nearest to a weight: $\beta = w^\top s / s^\top s$; 1 if that is zero.

    Args:
        weight: w.
        shown: s.
        total: the sum over all ranks of what this one has, where it holds a part of the weight.

    Example:
        >>> least_squares_scale(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
        tensor(1.5000)
    """
    norm = total(shown.square().sum())
    return torch.where(norm > 0, total((weight * shown).sum()) / norm, torch.ones_like(norm))
