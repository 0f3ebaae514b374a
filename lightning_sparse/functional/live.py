"""Masks that are recomputed in every step, and what they hide; on one thread with numpy, several times as fast."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.functional.masks import apply_bits_, is_for_one_thread

__all__ = ["above", "beyond", "part_"]

_NUMPY = (torch.float32, torch.float64)


def above(values: Tensor) -> Tensor:
    """Where values are positive.

    Example:
        >>> above(torch.tensor([0.5, 0.0, -0.5]))
        tensor([ True, False, False])
    """
    if is_for_one_thread(values) and values.dtype in _NUMPY:
        return torch.from_numpy(np.greater(values.detach().numpy(), 0))
    return values > 0


def beyond(values: Tensor, threshold: Tensor, out: Tensor) -> Tensor:
    """Where magnitudes are above a threshold.

    Args:
        values: of any sign.
        threshold: in a shape that broadcasts over the values.
        out: boolean, in the shape of the values; receives the mask.

    Example:
        >>> beyond(torch.tensor([0.5, -2.0, 3.0]), torch.tensor(1.0), torch.empty(3, dtype=torch.bool))
        tensor([False,  True,  True])
    """
    values, threshold = values.detach(), threshold.detach()
    if is_for_one_thread(values) and values.dtype == threshold.dtype and values.dtype in _NUMPY:
        array, limit, mask = values.numpy(), threshold.numpy(), out.numpy()
        np.greater(array, limit, mask)  # two comparisons, and no copy of the magnitudes
        np.logical_or(mask, np.less(array, -limit), mask)
        return out
    return torch.gt(values.abs(), threshold, out=out)


def part_(values: Tensor, hidden: Tensor, bits: Tensor) -> None:
    """Keep the kept entries in place, and move the dropped ones out; each leaves +0.0 in the other tensor.

    Args:
        values: all values; keeps the kept ones.
        hidden: receives the dropped ones.
        bits: as `mask_bits` returns them.

    Example:
        >>> values, hidden = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> part_(values, hidden, torch.tensor([-1, 0], dtype=torch.int8))
        >>> values, hidden
        (tensor([1., 0.]), tensor([0., 2.]))
    """
    if is_for_one_thread(values) and values.dtype == hidden.dtype == torch.float32:
        np.bitwise_and(values.detach().numpy().view(np.int32), (~bits).numpy(), hidden.numpy().view(np.int32))
    else:
        apply_bits_(hidden.copy_(values), ~bits)
    apply_bits_(values, bits)
