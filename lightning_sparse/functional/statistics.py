"""Numbers that describe sparse tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["mask_sparsity", "zero_fraction"]


def mask_sparsity(masks: Iterable[Tensor]) -> float:
    """The fraction of entries that the masks remove (True = kept).

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
    """The fraction of entries that are exactly zero, whatever made them so.

    Example:
        >>> import torch
        >>> zero_fraction([torch.tensor([0.0, -0.0, 3.0, 1e-30])])
        0.5
    """
    return mask_sparsity(tensor.detach() != 0 for tensor in tensors)
