"""Constant fan-in: every output of a layer keeps the same number of inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_sparse.functional.order import top_k_masks

__all__ = ["fan_in_mask", "regrow_fan_in"]


def fan_in_mask(score: Tensor, fan_in: int, dim: int = 0) -> Tensor:
    """Keep the `fan_in` highest entries of every output; outputs that are removed (-inf throughout) stay empty.

    Among equal scores the earlier entry survives.

    Args:
        score: higher survives.
        fan_in: number of entries that an output keeps.
        dim: the output dimension.

    Example:
        >>> fan_in_mask(torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]), 2)
        tensor([[False,  True,  True],
                [ True, False,  True]])
    """
    moved = score.movedim(dim, 0)
    rows = moved.flatten(1)
    if not fan_in or not rows.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    last = rows.topk(fan_in, dim=1, sorted=False).values.amin(1, keepdim=True)  # a sixth of the time of sorting on a CPU
    mask, level = rows > last, rows == last
    room = fan_in - mask.sum(1, keepdim=True)
    if bool((level.sum(1, keepdim=True) != room).any()):
        level &= level.cumsum(1) <= room
    mask |= level
    mask &= (rows > -torch.inf).any(1, keepdim=True)
    return mask.view(moved.shape).movedim(0, dim).contiguous()


def regrow_fan_in(mask: Tensor, keep: Tensor, grow: Tensor, count: int, min_salient: float = 0.0, dim: int = 0) -> Tensor:
    r"""The mask after dropping `count` connections of a layer and refilling every output to the same number.

    The lowest of the whole layer are dropped, so outputs lose different numbers, and each grows what it lacks. The salience
    of an output counts its surviving connections and those of its entries that are among the `count` highest to grow. An
    output with fewer than `min_salient` of its fan-in k is ablated, and its connections are distributed over the others:

    $$ k' = \lfloor k n / n' \rfloor $$

    for n outputs of which n' remain. Removed outputs stay removed.

    Source: Lasby et al. 2024, "Dynamic Sparse Training with Structured Sparsity", https://arxiv.org/abs/2305.02299, section
    3, and its official code for which entries are salient.

    Args:
        mask: with the same number of connections in every output that has any.
        keep: how much each connection matters.
        grow: how much each entry would gain by becoming one, finite.
        count: number of connections to drop, from 0 to their number.
        min_salient: fraction of its fan-in below which an output is ablated, in [0, 1]; 0 ablates none.
        dim: the output dimension.

    Raises:
        ValueError: if the count is out of range, a score is NaN, or `grow` is infinite.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, True, False]])
        >>> keep = torch.tensor([[5.0, 4.0, 0.0], [1.0, 3.0, 0.0]])
        >>> regrow_fan_in(mask, keep, torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 8.0]]), 1)
        tensor([[ True,  True, False],
                [False,  True,  True]])
    """
    shape = mask.movedim(dim, 0).shape
    mask, keep, grow = (tensor.movedim(dim, 0).flatten(1) for tensor in (mask, keep, grow))
    kept, alive = int(mask.count_nonzero()), mask.any(1)
    if not 0 <= count <= kept:
        raise ValueError(f"count={count} connections cannot be dropped where there are {kept}; give 0 <= count <= {kept}.")
    if not bool(grow.isfinite().all()):
        raise ValueError("A growth score is NaN or infinite, so nothing can be ranked; look for a diverged loss.")
    survivors = torch.zeros_like(mask).masked_scatter_(mask, top_k_masks([keep[mask]], kept - count)[0])
    wanted = top_k_masks([grow.masked_fill(survivors, -torch.inf)], count)[0]
    salient = (survivors | wanted).sum(1)
    fan_in = kept // max(int(alive.sum()), 1)
    fewest = math.ceil(kept / mask.shape[1]) if kept else 0  # outputs that hold all the connections
    if int((alive & (salient >= min_salient * fan_in)).sum()) >= fewest:
        alive &= salient >= min_salient * fan_in
    order = grow.masked_fill(survivors, torch.inf).masked_fill(~alive.unsqueeze(1), -torch.inf)
    return fan_in_mask(order, min(kept // max(int(alive.sum()), 1), mask.shape[1])).view(shape).movedim(0, dim).contiguous()
