"""Random sparsity, fixed from the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from lightning_sparse.core import BudgetName, Remembered, StructureName, UnscoredAllocationName
from lightning_sparse.families import Budgeted
from lightning_sparse.loop import Shards
from lightning_sparse.loop.rng import check_seed, draw_seed

__all__ = ["RandomSparsity"]


@final
class RandomSparsity(Budgeted):
    """Draw a random mask once and train with it to the end.

    Runs at station `begin`; afterwards it costs only what every mask costs. Also known as random pruning or static sparse
    training; it is the baseline that sparse training must beat.

    Source: Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning", https://arxiv.org/abs/2202.02643. There each
    weight is drawn independently; here the count of every layer is exact.

    Args:
        sparsity: the fraction removed, in [0, 1); optional with `structure='n:m'`.
        allocation: how sparsity is distributed over the layers: `erk`, `erk+` (last layer dense), `er`, `uniform`,
            `uniform+`, or `global` (every weight has the same chance). With `n:m` every layer has the same sparsity.
        structure: what is removed: `unstructured`, `channel`, `coupled` (channels across all layers that additions tie
            together, with biases and norms, so that they can be cut out of the network), `heads` (whole attention heads,
            which can be cut out too), `fan_in`, `block:RxC`, `n:m` or `transposable n:m`.
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        max_layer_sparsity: the largest fraction that one layer may lose where layers compete, in (0, 1].
        budget: what sparsity counts: `units` (weights, channels or heads) or, with `coupled` or `heads`, the `macs` or
            `parameters` of the whole network, to within one channel.
        rescale: divide each weight by the square root of its layer's density, so that activations keep their variance.
        seed: seed of the mask. None uses the seed of `seed_everything`, or draws one.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.
    """

    has_scores: ClassVar[bool] = False
    shards: ClassVar[Shards] = "any"

    drawn_seed = Remembered(int)

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        allocation: UnscoredAllocationName = "erk",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        budget: BudgetName = "units",
        rescale: bool = False,
        seed: int | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            max_layer_sparsity=max_layer_sparsity,
            budget=budget,
            targets=targets,
            name=name,
        )
        self.rescale, self.seed = rescale, seed
        check_seed(seed)

    def begin(self) -> None:
        super().begin()
        self.drawn_seed = draw_seed(self.run.trainer, self.seed)
        self.set_masks(self.plan.random_masks(self.drawn_seed))
        if self.rescale:
            for name, weight in self.weights.items():
                kept = self.masks.counts[name] or 1
                weight.mul_((self.masks.numel(name) / kept) ** 0.5)
