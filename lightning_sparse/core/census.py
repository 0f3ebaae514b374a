"""What there is to count in masks and weights, over all ranks where each holds a part.

Where weights are sharded, all ranks must call these functions, and each gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sparse.core.layout import Layout, spread_over, total_over_ranks
from lightning_sparse.core.target import Target
from lightning_sparse.functional import dead_outputs, mask_churn, nonzero_counts

__all__ = ["changed_share", "count_dead", "count_nonzero"]


def count_nonzero(tensors: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, int]:
    """How many entries of each tensor are kept by its mask, or not zero in its weight.

    Args:
        tensors: masks or weights, as far as this rank holds them.
        targets: the weights of the same names.
    """
    spread = spread_over(targets[name].layout for name in tensors)
    if spread is None:
        return nonzero_counts(tensors)
    counts = [tensor.detach().count_nonzero() for tensor in tensors.values()]
    return dict(zip(tensors, spread.sums(counts), strict=True))


def count_dead(tensors: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, int]:
    """How many outputs of each layer have lost all their incoming weights.

    Args:
        tensors: masks or weights, as far as this rank holds them.
        targets: the weights of the same names.
    """
    dead = {name: dead_outputs(tensor, targets[name].output_dims) for name, tensor in tensors.items()}
    for name, layout in [(name, targets[name].layout) for name in dead]:
        if layout is not None:
            dead[name] = ~_alive_anywhere(~dead[name], layout, targets[name])
    return nonzero_counts(dead)


def changed_share(before: Mapping[str, Tensor], after: Mapping[str, Tensor], targets: Mapping[str, Target]) -> float:
    """The fraction of connections that came or went; see `functional.mask_churn`.

    Args:
        before: masks, as far as this rank holds them.
        after: the same masks later.
        targets: the weights of the same names.
    """
    spread = spread_over(targets[name].layout for name in after)
    if spread is None:
        return mask_churn(before.values(), after.values())
    changed = spread.sums([(before[name] ^ after[name]).count_nonzero() for name in after])
    either = spread.sums([(before[name] | after[name]).count_nonzero() for name in after])
    return sum(changed) / sum(either) if sum(either) else 0.0


def _alive_anywhere(alive: Tensor, layout: Layout, target: Target) -> Tensor:
    """Which outputs of the whole layer have a weight on any rank."""
    dims = sorted(target.output_dims)
    whole = torch.zeros([layout.shape[dim] for dim in dims], dtype=torch.int32, device=alive.device)
    mine = whole
    for position, dim in enumerate(dims):
        mine = mine.narrow(position, layout.start[dim], layout.size[dim])
    mine.copy_(alive)
    return total_over_ranks(whole) > 0
