"""Statistics of sparse tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_sparse.functional.dims import Dims, others

__all__ = [
    "dead_outputs",
    "layer_density",
    "mask_churn",
    "mask_overlap",
    "mask_sparsity",
    "nonzero_counts",
    "over_parameterization_rate",
    "zero_fraction",
]


def mask_sparsity(masks: Iterable[Tensor]) -> float:
    """Return the fraction of entries that the masks remove (True = kept).

    Example:
        >>> import torch
        >>> mask_sparsity([torch.tensor([True, False, False, False])])
        0.75
    """
    kept = total = 0
    for mask in masks:
        kept += int(mask.count_nonzero())
        total += mask.numel()
    return 1 - kept / total if total else 0.0


def zero_fraction(tensors: Iterable[Tensor]) -> float:
    """Return the fraction of entries that are exactly zero, for whatever reason.

    Example:
        >>> import torch
        >>> zero_fraction([torch.tensor([0.0, -0.0, 3.0, 1e-30])])
        0.5
    """
    return mask_sparsity(tensor.detach() != 0 for tensor in tensors)


def layer_density(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of entries of each layer that are in effect: kept by its mask, or not zero in its weight.

    Example:
        >>> import torch
        >>> layer_density({"fc": torch.tensor([True, False]), "head": torch.tensor([0.0, 0.5, 0.0, 0.0])})
        {'fc': 0.5, 'head': 0.25}
    """
    return {name: count / tensors[name].numel() for name, count in nonzero_counts(tensors).items()}


def nonzero_counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many entries of each tensor are kept (masks) or not zero (weights); synchronizes each device once.

    Example:
        >>> import torch
        >>> nonzero_counts({"fc": torch.tensor([True, False]), "head": torch.tensor([0.0, 0.5, 3.0])})
        {'fc': 1, 'head': 2}
    """
    counts: dict[str, int] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        here = [name for name, tensor in tensors.items() if tensor.device == device]
        numbers = torch.stack([tensors[name].detach().count_nonzero() for name in here]).tolist()
        counts.update(zip(here, numbers, strict=True))
    return {name: counts[name] for name in tensors}


def dead_outputs(tensor: Tensor, dim: Dims = 0) -> Tensor:
    """Return which neurons or filters have lost all their incoming weights; one boolean per output.

    Args:
        tensor: mask or weight of a layer.
        dim: the dimension of the outputs; several if matrices are stacked.

    Example:
        >>> import torch
        >>> dead_outputs(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
        tensor([ True, False])
    """
    return ~(tensor.detach() != 0).any(others(tensor, dim))


def mask_overlap(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    r"""Return the fraction of connections that remain: $|A \cap B| / |A|$ for A before and B after.

    If both have equal counts, as between updates of dynamic sparse training, the order does not matter.

    Example:
        >>> import torch
        >>> mask_overlap([torch.tensor([True, True, False])], [torch.tensor([False, True, True])])
        0.5
    """
    shared = kept = 0
    for old, new in zip(before, after, strict=True):
        shared += int((old & new).count_nonzero())
        kept += int(old.count_nonzero())
    return shared / kept if kept else 1.0


def mask_churn(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    r"""Return the fraction of connections that came or went: $1 - |A \cap B| / |A \cup B|$, the masks' Jaccard distance.

    Example:
        >>> import torch
        >>> mask_churn([torch.tensor([True, True, False, False])], [torch.tensor([True, True, True, True])])
        0.5
    """
    changed = either = 0
    for old, new in zip(before, after, strict=True):
        changed += int((old ^ new).count_nonzero())
        either += int((old | new).count_nonzero())
    return changed / either if either else 0.0


def over_parameterization_rate(ever: Iterable[Tensor]) -> float:
    """Return the in-time over-parameterization: the fraction of all weights that have been active at any time.

    Source: Liu et al. 2021, "Do We Actually Need Dense Over-Parameterization?", https://arxiv.org/abs/2102.02887.

    Args:
        ever: per layer, the union of its masks so far.

    Example:
        >>> import torch
        >>> over_parameterization_rate([torch.tensor([True, True, False, False])])
        0.5
    """
    return 1 - mask_sparsity(ever)
