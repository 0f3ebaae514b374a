"""Constant fan-in: every output of a layer keeps the same number of inputs, for kernels without row pointers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lightning_sparse.core.structure import Structure
from lightning_sparse.core.target import Target
from lightning_sparse.functional import drop_count, fan_in_mask, regrow_fan_in

__all__ = ["FanIn"]


@final
class FanIn(Structure):
    """Single weights, the same number in every output of a layer.

    The number that a layer keeps is computed as for single weights and rounded to the nearest multiple of its outputs, at
    least one per output. Each output then keeps its best. The sparsity is met to within half a connection per output, except
    in layers that would keep less than half a connection per output: they keep one.
    """

    text = "fan_in"

    def misfit(self, target: Target) -> str | None:
        if not target.layout_known:
            return "is in a layer of an unknown type, and structure='fan_in' needs its outputs (register_layer)"
        if target.shares_rows:
            return "is a grouped transposed convolution, where one row serves several outputs that structure='fan_in' counts"
        return None

    def units(self, target: Target) -> int:
        return target.size

    def score(self, score: Tensor, target: Target) -> Tensor:
        return score

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return kept

    def spread(self, kept: Sequence[Tensor], targets: Sequence[Target], scores: Sequence[Tensor]) -> list[Tensor]:
        masks = []
        for mask, target, score in zip(kept, targets, scores, strict=True):
            rows = score.movedim(target.output_dim, 0).flatten(1)
            alive = int((rows > -torch.inf).any(1).sum())
            fan_in = _nearest(int(mask.count_nonzero()), alive)
            masks.append(fan_in_mask(score, fan_in, target.output_dim))
        return masks

    def regrow(
        self, target: Target, mask: Tensor, keep: Tensor, grow: Tensor, fraction: float, kept: int, min_salient: float
    ) -> Tensor:
        return regrow_fan_in(mask, keep, grow, drop_count(kept, fraction), min_salient, target.output_dim)

    def entries(self, kept: Mapping[int, int], targets: Sequence[Target]) -> dict[int, int]:
        outputs = {layer: targets[layer].shape[targets[layer].output_dim] for layer in kept}
        return {layer: _nearest(number, outputs[layer]) * outputs[layer] for layer, number in kept.items()}


def _nearest(number: int, outputs: int) -> int:
    """The nearest number of connections per output, at least one; halves are rounded up."""
    return max(1, (2 * number + outputs) // (2 * outputs)) if outputs else 1
