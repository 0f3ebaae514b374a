"""Methods that prune by a score along a schedule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.core import AllocationName, BudgetName, Position, Remembered, RunLength, StructureName, Window
from lightning_sparse.families.budgeted import Budgeted
from lightning_sparse.families.ramp import Ramp
from lightning_sparse.functional.schedules import Schedule, ScheduleName

__all__ = ["Pruning"]


class Pruning(Budgeted):
    """Remove the weights of lowest score step by step along a schedule; removed weights stay removed.

    Runs at station `evolve`, at the cost of one selection over all weights per update.

    Args:
        sparsity: the final fraction removed, in [0, 1); optional with `structure='n:m'`.
        start: when pruning starts: a fraction of the run, `'n epochs'` or `'n steps'`.
        end: when the final sparsity is reached.
        every: time between updates; `'n epochs'` updates at the start of epochs, everything else after steps.
        schedule: how sparsity grows from 0: `constant` (all at once), `linear`, `cubic`, `cosine`, `exponential`, or a
            function of (progress, start value, end value).
        allocation: how sparsity is distributed over the layers: `global` (scores of all layers compete), `uniform`,
            `uniform+`, `er`, `erk`, `erk+`, `owl` (layers with more outliers among their scores keep more). With `n:m` every
            layer has the same sparsity.
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (channels
            across all layers that additions tie together, with biases and norms, so that they can be cut out of the
            network), `heads` (whole attention heads, which can be cut out too), `fan_in` (the same number of weights in
            every output), `block:RxC` (outputs by inputs), `n:m` or `transposable n:m` (in both directions).
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        max_layer_sparsity: the largest fraction that one layer may lose where layers compete, in (0, 1].
        budget: what sparsity counts: `units` (weights, channels or heads) or, with `coupled` or `heads`, the `macs` or
            `parameters` of the whole network, to within one channel.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.
    """

    window = Remembered[Window]()

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        start: float | str = 0.2,
        end: float | str = 0.8,
        every: float | str = 0.01,
        schedule: ScheduleName | Schedule = "cubic",
        allocation: AllocationName = "global",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        budget: BudgetName = "units",
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
        self.start, self.end, self.every, self.schedule = start, end, every, schedule
        self.ramp = Ramp(schedule, self.quota.sparsity)
        self.window = Window(start, end, every)

    @abstractmethod
    def score(self, name: str, weight: Tensor) -> Tensor:
        """How important each entry is; higher survives. Must be the same on all ranks."""

    def check(self, run: RunLength, until: float = 1.0) -> None:
        self.window.check(run, until, f"{self.label} ends its schedule")
        super().check(run, until)

    @property
    def at_target(self) -> bool | None:
        return None if self.mask_set is None else self.window.is_over  # for channels too, whose weights are not known ahead

    @property
    def evolves(self) -> bool:
        return not self.window.is_over or type(self).evolve is not Pruning.evolve

    def evolve(self, position: Position) -> None:
        window = self.window
        if window.take(position):
            self.prune(self.ramp(window.progress(position)), self.score)

    def conclude(self) -> None:
        if not self.window.is_over:
            rank_zero_warn(self.window.unfinished(self.label, self.masks.sparsity, self.quota.sparsity))
