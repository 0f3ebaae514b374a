"""Movement pruning: keep weights by how they move, not by how large they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.core import (
    AllocationName,
    Budget,
    Coupled,
    MaskSet,
    Plan,
    Position,
    Remembered,
    RunLength,
    StructureName,
    Target,
    Window,
    check_choice,
    lay_out,
)
from lightning_sparse.families import ShadowWeights
from lightning_sparse.families.budgeted import refuse_parted_owl
from lightning_sparse.families.ramp import Ramp
from lightning_sparse.functional import MOVEMENT_SCORES
from lightning_sparse.functional.schedules import Schedule, ScheduleName
from lightning_sparse.loop import Shards, Step

__all__ = ["MovementPruning"]


@final
class MovementPruning(ShadowWeights):
    r"""Remove the weights that training moves toward zero, along a schedule; weights removed too early come back.

    $$ s_{ij} = -\sum_t w_{ij}^{(t)} \, \frac{\partial L}{\partial w_{ij}^{(t)}} $$

    over all steps so far: high where steps move a weight away from zero. Gradients are those of the sparse model, including
    the gradients of removed weights. Their dense values are kept outside the model (`ShadowWeights`), so their scores keep
    changing, and every update until `end` selects again from all weights. Runs at stations `before_step`, `after_step` and
    `evolve`. Costs what `ShadowWeights` costs, plus two more copies of the weights in memory, one of them only during a
    step.

    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", https://arxiv.org/abs/2005.07683, hard
    movement pruning, eq. 5. `score="taylor"`: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning",
    https://arxiv.org/abs/1906.10771, eq. 8. `score="fisher"`: Theis et al. 2018, "Faster gaze prediction with dense networks
    and Fisher pruning", https://arxiv.org/abs/1801.05787, eq. 5, for single weights.

    Args:
        sparsity: the final fraction removed, in [0, 1); optional with `structure='n:m'`.
        score: `movement`; `taylor`, the sum of squares $(w \, \partial L / \partial w)^2$, the first-order change of the
            loss without the weight; or `fisher`, $w^2 / 2$ times the sum of squared gradients, the second-order change.
        start: when pruning starts: a fraction of the run, `'n epochs'` or `'n steps'`. Scores are summed from the first step
            on.
        end: when the final sparsity is reached and masks become fixed.
        every: time between updates; `'n epochs'` updates at the start of epochs, everything else after steps.
        schedule: how sparsity grows from 0: `constant` (all at once), `linear`, `cubic`, `cosine`, `exponential`, or a
            function of (progress, start value, end value).
        allocation: how sparsity is distributed over the layers: `uniform` (as published), `uniform+`, `er`, `erk`, `erk+`,
            `owl` (layers with more outliers among their scores keep more), or `global` (scores of all layers compete).
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), or `n:m`.
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> MovementPruning(sparsity=0.9).label
        'MovementPruning'
    """

    shards: ClassVar[Shards] = "any"

    masks = Remembered(MaskSet)
    window = Remembered[Window]()
    sums = Remembered[dict[str, Tensor]](dict, over="entries")
    """The sums over all steps that scores are computed from; in float32 or wider."""

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        score: Literal["movement", "taylor", "fisher"] = "movement",
        start: float | str = 0.2,
        end: float | str = 0.8,
        every: float | str = 0.01,
        schedule: ScheduleName | Schedule = "cubic",
        allocation: AllocationName = "uniform",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.sparsity, self.score, self.start, self.end, self.every = sparsity, score, start, end, every
        self.schedule, self.allocation, self.structure = schedule, allocation, structure
        self.layer_sparsity = layer_sparsity
        self.quota = Budget(sparsity, allocation, structure, layer_sparsity, usual="uniform")
        if isinstance(self.quota.structure, Coupled):
            raise ValueError(
                f"structure='{structure}' removes {self.quota.structure.noun} for good, but here removed weights may come "
                "back; use 'channel', or use MagnitudePruning."
            )
        check_choice("score", score, MOVEMENT_SCORES)
        self.ramp = Ramp(schedule, self.quota.sparsity)
        self.window = Window(start, end, every)
        self._plan: Plan | None = None
        self._moved: dict[str, Tensor] = {}

    @property
    def mask_set(self) -> MaskSet:
        return self.masks

    @property
    def at_target(self) -> bool:
        return self.window.is_over

    def misfit(self, target: Target) -> str | None:
        return self.quota.structure.unfit(target)

    def check(self, run: RunLength, until: float = 1.0) -> None:
        self.window.check(run, until, f"{self.label} ends its schedule")
        refuse_parted_owl(self.quota, self.layouts)
        self._plan = lay_out(self.quota, self.chosen)
        self._plan.check()

    @property
    def plan(self) -> Plan:
        """The budget applied to the weights of the running fit."""
        assert self._plan is not None, "called before `check`"
        return self._plan

    def begin(self) -> None:
        self.masks = MaskSet(self.weights)
        self.sums = {
            name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for name, weight in self.weights.items()
        }
        super().begin()
        self.promise(*self.plan.kept_weights())

    def shown(self, name: str, dense: Tensor) -> Tensor:
        return self.masks[name]

    def before_step(self, step: Step) -> None:
        super().before_step(step)
        if self.window.is_over:
            return
        for name, weight in step.weights.items():
            if weight.grad is not None:
                gradient = weight.grad.to(self.sums[name])
                if step.gradient_scale is not None:
                    gradient = gradient / step.gradient_scale
                self._moved[name] = MOVEMENT_SCORES[self.score].of_step(weight.detach().to(gradient), gradient)

    def after_step(self, step: Step) -> None:
        for name in step.weights:
            if name in self._moved:
                self.sums[name].add_(self._moved.pop(name))
        super().after_step(step)

    def undo_step(self, step: Step) -> None:
        for name in step.weights:
            self._moved.pop(name, None)
        super().undo_step(step)

    def evolve(self, position: Position) -> None:
        if not self.window.is_due(position) or self.steps == 0:
            return  # an update that is due before anything has moved happens after the first step
        self.window.finish()
        weights = self.weights
        self.reveal(weights)
        scores = [MOVEMENT_SCORES[self.score].of_sum(weight.detach(), self.sums[name]) for name, weight in weights.items()]
        chosen = self.plan.masks(scores, self.ramp(self.window.progress(position)))
        self.masks.replace(dict(zip(weights, chosen, strict=True)))
        self.hide(weights)
        for name, kept in self.masks.counts.items():
            if kept == 0:
                self.warn_of_empty(
                    name, "Use a lower sparsity, allocation='uniform', or give the layer its own layer_sparsity."
                )

    def conclude(self) -> None:
        if not self.window.is_over:
            rank_zero_warn(self.window.unfinished(self.label, self.masks.sparsity, self.quota.sparsity))

    def release(self) -> None:
        self._plan = None
        self._moved.clear()
        super().release()
