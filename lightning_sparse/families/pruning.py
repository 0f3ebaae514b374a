"""Methods that prune by a score along a schedule."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.core import FINAL, Budget, Position, Remembered, RunLength, Window
from lightning_sparse.families.masked import Masked
from lightning_sparse.functional import SCHEDULES
from lightning_sparse.functional.schedules import Schedule

__all__ = ["Pruning"]


class Pruning(Masked):
    """Removes the weights of lowest score, step by step along a schedule; what is removed stays removed.

    At station `evolve`, at the cost of one selection over all weights per update.

    Args:
        sparsity: the fraction removed in the end, in [0, 1); may be left out for `structure='n:m'`.
        start: when pruning starts: a fraction of the run, `'n epochs'` or `'n steps'`.
        end: when the final sparsity is reached.
        every: time between updates; `'n epochs'` updates at the start of epochs, all else after steps.
        schedule: how sparsity grows from 0: `constant` (all at once), `linear`, `cubic`, `cosine`, `exponential`, or a
            function of (progress, start value, end value).
        allocation: how sparsity is shared: `global` (scores of all layers compete), `uniform`, `uniform+`, `er`, `erk`,
            `erk+`.
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (the same,
            in all layers that additions couple, with biases and norms, so that they can leave the network), or `n:m`.
        layer_sparsity: layers with a sparsity of their own, glob -> sparsity, counted in the total.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.
    """

    _tick = Remembered(int)

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        start: float | str = 0.2,
        end: float | str = 0.8,
        every: float | str = 0.01,
        schedule: Schedule | str = "cubic",
        allocation: str = "global",
        structure: str | int = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.sparsity, self.allocation, self.structure = sparsity, allocation, structure
        self.layer_sparsity = layer_sparsity
        self.start, self.end, self.every, self.schedule = start, end, every, schedule
        if schedule not in SCHEDULES if isinstance(schedule, str) else not callable(schedule):
            raise ValueError(f"schedule={schedule!r} is unknown; choose from {list(SCHEDULES)} or give a function.")
        self.budget = Budget(sparsity, allocation, structure, layer_sparsity)
        self.window = Window(start, end, every)

    @abstractmethod
    def score(self, name: str, weight: Tensor) -> Tensor:
        """How much each entry matters; higher survives. Must be the same on all ranks."""

    def check(self, run: RunLength, until: float = 1.0) -> None:
        for progress in (0.0, 0.5, 1.0):
            if not math.isfinite(value := self._scheduled(progress)):
                raise ValueError(f"schedule gives {value} at progress {progress}; it must return a sparsity.")
        self.window.resolve(run)
        if self.window.end > until + 1e-9 and self._tick != FINAL:
            raise ValueError(
                f"{self.label} ends its schedule at {self.window.end:.0%} of the run as it was begun, but training now ends "
                f"at {until:.0%} of that; train at least as long as planned then, or start anew from the weights."
            )
        self.check_budget(self.budget)

    def target_counts(self) -> tuple[int | None, dict[str, int]]:
        return self.budget.kept_weights(self.chosen)

    @property
    def at_target(self) -> bool | None:
        return None if self.mask_set is None else self._tick == FINAL  # also of channels, whose weights nobody counts ahead

    def evolve(self, position: Position) -> None:
        tick = self.window.tick(position)
        if tick <= self._tick:
            return
        self._tick = tick
        self.prune_to(self.planned_sparsity(position))

    def planned_sparsity(self, position: Position) -> float:
        """What the schedule asks for at this position."""
        progress = self.window.progress(position)
        if progress >= 1:
            return self.budget.sparsity
        return min(max(self._scheduled(progress), 0.0), self.budget.sparsity)

    def _scheduled(self, progress: float) -> float:
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return float(schedule(progress, 0.0, self.budget.sparsity))

    def prune_to(self, sparsity: float) -> None:
        """Remove the lowest scores until exactly this fraction is removed; entries removed before come first."""
        self.prune(self.budget, sparsity, self.score)

    def conclude(self) -> None:
        if self._tick != FINAL:
            rank_zero_warn(
                f"{self.label} ends at sparsity {self.masks.sparsity:.4f}, not {self.budget.sparsity}: training stopped "
                "before the schedule did. Train on, or end the schedule earlier."
            )
