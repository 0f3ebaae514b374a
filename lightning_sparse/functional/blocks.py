"""Scores and masks of blocks of two dimensions."""

from __future__ import annotations

import torch  # noqa: F401 - for the examples
from torch import Tensor

__all__ = ["block_score", "expand_blocks"]


def block_score(score: Tensor, rows: int, columns: int, dims: tuple[int, int] = (0, 1)) -> Tensor:
    """One score per block: the mean over its entries; in the layout of the score, with the two dimensions reduced.

    Args:
        score: one score per entry.
        rows: rows of a block; must divide the first of the dimensions.
        columns: columns of a block; must divide the second.
        dims: the two dimensions.

    Example:
        >>> block_score(torch.tensor([[1.0, 3.0, 5.0, 5.0]]), 1, 2)
        tensor([[2., 5.]])
    """
    moved = score.movedim(dims, (-2, -1))
    *rest, height, width = moved.shape
    blocks = moved.reshape(*rest, height // rows, rows, width // columns, columns)
    return blocks.mean((-3, -1)).movedim((-2, -1), dims)


def expand_blocks(kept: Tensor, rows: int, columns: int, dims: tuple[int, int] = (0, 1)) -> Tensor:
    """The mask of a weight from that of its blocks; the inverse of `block_score`.

    Example:
        >>> expand_blocks(torch.tensor([[True, False]]), 1, 2)
        tensor([[ True,  True, False, False]])
    """
    return kept.repeat_interleave(rows, dims[0]).repeat_interleave(columns, dims[1])
