"""Random sparsity, fixed from the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import final

from lightning_sparse.callbacks.masked import Masked
from lightning_sparse.core import Budget, Remembered, RunLength
from lightning_sparse.functional import random_generator, random_score

__all__ = ["RandomSparsity"]


@final
class RandomSparsity(Masked):
    """Draw a random mask once and train with it to the end.

    At station `begin`, at no cost later but that of every mask. Known as random pruning or static sparse training, the
    baseline that sparse training must beat.

    Source: Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning", https://arxiv.org/abs/2202.02643. There
    each weight is drawn independently; here every layer's count is exact.

    Args:
        sparsity: the fraction removed, in [0, 1); may be left out for `structure='n:m'`.
        allocation: how sparsity is shared: `erk` (the default), `erk+` (last layer dense), `er`, `uniform`, `uniform+`,
            or `global` (every weight has the same chance). With `n:m` every layer has the same share.
        structure: what is removed: `unstructured`, `channel`, or `n:m`.
        layer_sparsity: layers with a sparsity of their own, glob -> sparsity, counted in the total.
        rescale: divide each weight by the square root of its layer's density, so that activations keep their variance.
        seed: of the mask. None takes the seed of `seed_everything`, or draws one.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.
    """

    drawn_seed = Remembered(int)

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        allocation: str | None = None,
        structure: str | int = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        rescale: bool = False,
        seed: int | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.sparsity, self.allocation, self.structure = sparsity, allocation, structure
        self.layer_sparsity, self.rescale, self.seed = layer_sparsity, rescale, seed
        if not isinstance(0 if seed is None else seed, Integral):
            raise ValueError(f"seed={seed!r} must be a whole number.")
        default = "uniform" if ":" in str(structure) else "erk"
        self.budget = Budget(sparsity, allocation or default, structure, layer_sparsity)

    def check(self, run: RunLength, until: float = 1.0) -> None:
        self.budget.check(self.chosen)

    def target_counts(self) -> tuple[int | None, dict[str, int]]:
        return self.budget.kept_weights(self.chosen)

    def begin(self) -> None:
        super().begin()
        self.drawn_seed = self.stations.draw_seed(self.seed)
        scores = [random_score(weight, random_generator(self.drawn_seed, 0, name)) for name, weight in self.weights.items()]
        masks = self.budget.masks(self.chosen, scores)
        self.set_masks(dict(zip(self.weights, masks, strict=True)))
        if self.rescale:
            for name, weight in self.weights.items():
                kept = self.masks.counts[name] or 1
                weight.mul_((weight.numel() / kept) ** 0.5)
