"""Gradual pruning with regeneration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.core import (
    AllocationName,
    Budget,
    Position,
    RunLength,
    Span,
    StructureName,
    UnscoredAllocationName,
    Window,
    check_choice,
    check_sparsity,
    lay_out,
)
from lightning_sparse.families import Rewiring
from lightning_sparse.functional import ALLOCATIONS, cubic, magnitude
from lightning_sparse.functional.regrowth import DropScheduleName
from lightning_sparse.functional.schedules import Schedule
from lightning_sparse.loop import Shards

__all__ = ["GraNet"]


@final
class GraNet(Rewiring):
    """Prune the smallest weights along a cubic schedule; at each update, regenerate some connections by gradient.

    Source: Liu et al. 2021, "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
    https://arxiv.org/abs/2106.10404, and the official repository VITA-Group/GraNet. Each update prunes first, and then drops
    and grows connections in each layer. A weight that this update pruned restarts at zero if it is grown again. The official
    code stops just short of the target; here the target is met exactly.

    Set `initial_sparsity=0` to start dense. For the arguments not listed see `Rewiring`.

    Args:
        sparsity: the final fraction removed, in [0, 1); optional with `structure='n:m'`.
        initial_sparsity: sparsity of the random initial mask; 0 starts dense.
        initial_allocation: how the initial sparsity is distributed over the layers: `erk`, `erk+`, `er`, `uniform`,
            `uniform+` or `global`.
        start: when pruning and regeneration start.
        end: when the final sparsity is reached.
        rewiring_end: when regeneration ends.
        every: time between updates.
        drop_fraction: fraction of each layer's connections that are regenerated at the start.
        final_drop_fraction: the drop fraction at `rewiring_end`.
        drop_schedule: `cosine`, `constant`, or a function of (progress, start value, end value).
        allocation: how pruning is distributed over the layers: `global` (weights of all layers compete) or a layerwise rule,
            as above.
        structure: `unstructured`, or `n:m`: every group of m inputs keeps at least n connections, and exactly n at the end.
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        track_explored: record which weights have ever been active.
        seed: seed of the initial mask.
        targets: patterns that select the weights.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> GraNet(sparsity=0.9).label
        'GraNet'
    """

    has_scores: ClassVar[bool] = True
    shards: ClassVar[Shards] = "any"

    refused: ClassVar[Mapping[str, str]] = {
        "pruning_end": "the final sparsity is reached at end, and regeneration ends at rewiring_end"
    }

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        initial_sparsity: float = 0.5,
        initial_allocation: UnscoredAllocationName = "erk",
        start: float | str = 0.0,
        end: float | str = 0.5,
        rewiring_end: float | str = 1.0,
        every: float | str = 0.01,
        drop_fraction: float = 0.5,
        final_drop_fraction: float = 0.005,
        drop_schedule: DropScheduleName | Schedule = "cosine",
        allocation: AllocationName = "global",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        track_explored: bool = False,
        seed: int | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            start=start,
            end=1.0,  # this class makes its own window below
            every=every,
            drop_fraction=drop_fraction,
            final_drop_fraction=final_drop_fraction,
            drop_schedule=drop_schedule,
            allocation=allocation,  # type: ignore[arg-type]  # this method has scores, unlike others that rewire
            structure=structure,
            layer_sparsity=layer_sparsity,
            track_explored=track_explored,
            seed=seed,
            targets=targets,
            name=name,
        )
        self.end, self.rewiring_end = end, rewiring_end
        self.window = Window(start, rewiring_end, every, "rewiring_end")
        self.initial_sparsity, self.initial_allocation = initial_sparsity, initial_allocation
        check_sparsity("initial_sparsity", initial_sparsity)
        if initial_sparsity > self.quota.sparsity:
            raise ValueError(
                f"initial_sparsity={initial_sparsity} is above sparsity={self.quota.sparsity}, but the number of "
                f"connections "
                "never increases; start less sparse, or dense with initial_sparsity=0."
            )
        check_choice("initial_allocation", initial_allocation, ["global", *ALLOCATIONS])
        self._initial = Budget(sparsity, initial_allocation, structure, layer_sparsity, usual="erk")
        self._span = Span.parse(end, "end")
        self._pruned = 1.0

    def keep_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return magnitude(weight)

    def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return magnitude(gradient)

    def check(self, run: RunLength, until: float = 1.0) -> None:
        super().check(run, until)
        lay_out(self._initial, self.chosen).kept_weights(self.initial_sparsity)  # refuses what layers cannot hold
        self._pruned = self._span.fraction(run, "end")
        last = min(Span.parse(self.rewiring_end).fraction(run), until)
        if not self.window.start <= self._pruned <= last + 1e-9:
            raise ValueError(
                f"end={self.end!r} is {self._pruned:.0%} of the run as originally planned, but updates start at "
                f"{self.window.start:.0%} and stop at {last:.0%}; move it between them."
            )

    def first_masks(self) -> Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]:
        if self.initial_sparsity == 0:
            return {name: torch.ones_like(self.masks[name]) for name in self.masks}
        return lay_out(self._initial, self.chosen).random_masks(self.drawn_seed, self.initial_sparsity)

    def planned_sparsity(self, position: Position) -> float:
        """The sparsity that the cubic schedule gives at this position; the final sparsity once regeneration has ended."""
        start, end = self.window.start, self._pruned
        if position.fraction >= end - 1e-9 or self.window.progress(position) >= 1:
            return self.quota.sparsity
        return cubic(max(0.0, (position.fraction - start) / (end - start)), self.initial_sparsity, self.quota.sparsity)

    def update(self, position: Position) -> None:
        sparsity = self.planned_sparsity(position)
        if self.plan.kept_units(sparsity) < self.masks.kept:
            self.prune(sparsity, lambda name, weight: magnitude(weight))
        super().update(position)

    def conclude(self) -> None:
        super().conclude()
        if self.goal["total"] not in (None, self.masks.kept):
            rank_zero_warn(self.window.unfinished(self.label, self.masks.sparsity, self.quota.sparsity))
