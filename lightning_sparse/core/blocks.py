"""Blocks of weights: rectangles of outputs and inputs, for kernels and accelerators that work on tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lightning_sparse.core.structure import Structure
from lightning_sparse.core.target import Target
from lightning_sparse.functional import block_score, drop_count, expand_blocks, normalized, regrow, top_k_masks

__all__ = ["Blocks"]


@final
class Blocks(Structure):
    """Blocks of consecutive outputs and inputs; in convolutions, at one position of the kernel.

    The score of a block is the mean of its entries' scores, divided by the mean of its layer, as for channels. Without the
    division, means of one layer would lie close together, and a layer with small weights would be removed entirely. The best
    block of each layer is always kept.

    Args:
        rows: number of outputs in a block.
        columns: number of inputs in a block.
    """

    keeps_one = True

    def __init__(self, rows: int, columns: int) -> None:
        if rows < 1 or columns < 1 or rows * columns == 1:
            raise ValueError(
                f"structure='block:{rows}x{columns}' is not a block structure; write 'block:RxC' such as 'block:16x16'."
            )
        self.rows, self.columns = rows, columns

    @property
    def text(self) -> str:
        return f"block:{self.rows}x{self.columns}"

    def misfit(self, target: Target) -> str | None:
        if not target.layout_known:
            return f"is in a layer of an unknown type, and structure='{self.text}' needs its dimensions (register_layer)"
        outputs, inputs = target.shape[target.output_dim], target.shape[target.input_dim]
        if outputs % self.rows or inputs % self.columns:
            return (
                f"is {outputs} by {inputs} (outputs by inputs), which blocks of {self.rows} by {self.columns} do not "
                f"divide, and structure='{self.text}' needs whole ones"
            )
        return None

    def units(self, target: Target) -> int:
        return target.size // (self.rows * self.columns)

    def score(self, score: Tensor, target: Target) -> Tensor:
        return normalized(block_score(score, self.rows, self.columns, (target.output_dim, target.input_dim)))

    def rank(self, scores: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
        ranked = super().rank(scores, targets)
        return [score.masked_fill(top_k_masks([score], 1)[0], torch.inf) for score in ranked]

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return expand_blocks(kept, self.rows, self.columns, (target.output_dim, target.input_dim))

    def regrow(
        self, target: Target, mask: Tensor, keep: Tensor, grow: Tensor, fraction: float, kept: int, min_salient: float
    ) -> Tensor:
        blocks, held = self.score(mask.float(), target) > 0, kept // (self.rows * self.columns)
        survive, gain = self.score(keep, target), self.score(grow, target)
        return self.expand(regrow(blocks, survive, gain, drop_count(held, fraction), held), target)
