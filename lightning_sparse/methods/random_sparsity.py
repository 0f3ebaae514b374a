"""Random sparsity, fixed from the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lightning_sparse.core import Budget, Remembered, RunLength
from lightning_sparse.families.masked import Masked
from lightning_sparse.loop.rng import check_seed, draw_seed

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
        structure: what is removed: `unstructured`, `channel`, `coupled` (channels, in all layers that additions couple, with
            biases and norms, so that they can leave the network), or `n:m`.
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
        check_seed(seed)
        default = "uniform" if ":" in str(structure) else "erk"
        self.budget = Budget(sparsity, allocation or default, structure, layer_sparsity)

    def check(self, run: RunLength, until: float = 1.0) -> None:
        self.check_budget(self.budget)

    def target_counts(self) -> tuple[int | None, dict[str, int]]:
        return self.budget.kept_weights(self.chosen)

    def begin(self) -> None:
        super().begin()
        self.drawn_seed = draw_seed(self.stations.trainer, self.seed)
        self.set_masks(self.budget.random_masks(self.chosen, self.drawn_seed))
        if self.rescale:
            for name, weight in self.weights.items():
                kept = self.masks.counts[name] or 1
                weight.mul_((weight.numel() / kept) ** 0.5)
