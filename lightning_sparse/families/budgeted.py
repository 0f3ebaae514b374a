"""Methods with a target sparsity that is distributed over the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sparse.core import (
    AllocationName,
    Budget,
    BudgetName,
    ChannelCosts,
    Coupled,
    CoupledVectors,
    Coupling,
    LayerRow,
    Plan,
    Remembered,
    RunLength,
    StructureName,
    Target,
    count_macs,
    lay_out,
)
from lightning_sparse.families.masked import Masked
from lightning_sparse.loop import Run, Step
from lightning_sparse.loop.arguments import arguments
from lightning_sparse.loop.dry_run import dry_run, example_inputs

__all__ = ["Budgeted", "refuse_parted_owl"]


def refuse_parted_owl(quota: Budget, layouts: Mapping[str, Any]) -> None:
    """Refuse `owl` with sharded weights: it counts outliers in whole layers.

    Raises:
        ValueError: if `owl` is requested and weights are sharded.
    """
    if quota.allocation == "owl" and layouts:
        raise ValueError(
            "allocation='owl' looks for outliers in whole layers, and weights are sharded here; write another "
            "allocation, such as 'uniform'."
        )


class Budgeted(Masked):
    """A method that removes an exact fraction of its weights or channels.

    With `structure='coupled'` biases and norms are removed with their channels: they are zero where a channel is removed.

    Args:
        sparsity: the final fraction removed, in [0, 1); optional with `structure='n:m'`.
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

    left = Remembered[dict[str, list[int]]](dict)
    """Kept and total numbers of coupled channels and of their cost."""
    has_scores: ClassVar[bool] = True
    """Whether the method scores weights, which `allocation='owl'` needs."""

    traced = Remembered[dict[str, Any]](dict)
    """Which channels are coupled; stored because a resumed run may have no batch left in its loader to find out again."""

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        allocation: AllocationName = "global",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        budget: BudgetName = "units",
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.sparsity, self.allocation, self.structure = sparsity, allocation, structure
        self.layer_sparsity = layer_sparsity
        usual = arguments(type(self)).get("allocation", "global")
        self.max_layer_sparsity, self.budget = max_layer_sparsity, budget
        self.quota = Budget(
            sparsity, allocation, structure, layer_sparsity, usual, max_layer_sparsity, budget, scored=self.has_scores
        )
        """The budget of weights, or of what `budget` counts."""
        self._plan: Plan | None = None
        self.vectors: CoupledVectors | None = None
        self._coupling: Coupling | None = None
        self._coupled: Mapping[str, Any] = {}
        self._costs: dict[str, ChannelCosts] = {}

    def misfit(self, target: Target) -> str | None:
        return self.quota.structure.unfit(target)

    def enter(self, run: Run) -> None:
        super().enter(run)
        if isinstance(self.quota.structure, Coupled):
            self._coupling = coupling = self._find_coupling(self.quota.structure)
            self.chosen = [target for target in self.chosen if target.name in coupling.units]

    def check(self, run: RunLength, until: float = 1.0) -> None:
        refuse_parted_owl(self.quota, self.layouts)
        coupling = self._coupling
        self._costs = {} if coupling is None else self._costs_of(coupling)
        self._plan = lay_out(self.quota, self.chosen, coupling, self._costs.get(self.quota.measure))
        self._plan.check()

    @property
    def plan(self) -> Plan:
        """The budget applied to the weights of the running fit."""
        assert self._plan is not None, "called before `check`"
        return self._plan

    def begin(self) -> None:
        super().begin()
        self.traced = dict(self._coupled)
        self.promise(*self.plan.kept_weights())

    def resume(self) -> None:
        super().resume()
        self._follow_channels()

    def release(self) -> None:
        self._plan = self.vectors = self._coupling = None
        self._costs = {}
        super().release()

    def prune(self, sparsity: float, score: Callable[[str, Tensor], Tensor]) -> None:
        """Remove the lowest scores until exactly this fraction is removed; already removed entries come first.

        Args:
            sparsity: the total fraction removed afterwards.
            score: scores a weight, given its name; higher survives.
        """
        masks = self.masks
        scores = [score(name, weight).masked_fill(masks.dropped(name), -torch.inf) for name, weight in self.weights.items()]
        outliers = self.plan.outliers(scores)
        for place, name in enumerate(self.weights):
            scores[place] = self.rivals(name, scores[place])
        chosen = self.plan.each_mask(scores, sparsity, list(masks.counts.values()), outliers)
        self.set_masks(zip(self.weights, chosen, strict=True))

    def rivals(self, name: str, score: Tensor) -> Tensor:
        """The scores of a weight in the form in which they compete; -inf where it is removed already."""
        return score

    def set_masks(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        super().set_masks(masks)
        self._follow_channels()

    def clean(self) -> None:
        super().clean()
        self._follow_channels()

    # ---- coupled channels --------------------------------------------------------------------------------------------

    def _find_coupling(self, structure: Coupled) -> Coupling:
        trainer, module = self.run.trainer, self.run.module
        channels = {target.name: target.shape[target.output_dim] for target in self.chosen}
        traced: Mapping[str, Any] = self.traced if trainer.global_step > 0 else {}
        if self.brought is not None:
            traced = self.brought["memory"].get("traced", {})
        coupling, macs = structure.restore(traced, channels), traced.get("macs")
        if coupling is None or macs is None:
            with dry_run(trainer, module) as twin:
                calls = example_inputs(trainer, twin, self.label, list(channels))
                coupling = structure.find(twin, calls, channels)
                samples, parts = max(call.samples for call in calls), structure.parts(coupling)
                macs = count_macs(twin, lambda: [call(twin) for call in calls], samples, parts=parts)
            stay = [f"'{name}' ({reason})" for name, reason in coupling.staying.items() if name in channels]
            if stay:
                rank_zero_info(f"{self.label}: {structure.noun} stay in {', '.join(stay)}.")
        self._coupled = {**coupling.state(), "macs": macs}
        self.vectors = CoupledVectors(coupling, dict(module.named_parameters()))
        return coupling

    def _costs_of(self, coupling: Coupling) -> dict[str, ChannelCosts]:
        sizes = {name: parameter.numel() for name, parameter in self.run.module.named_parameters()}
        return {"parameters": ChannelCosts(coupling, sizes), "macs": ChannelCosts(coupling, self._coupled["macs"])}

    def _follow_channels(self) -> None:
        if self.vectors is not None:
            alive = {t.name: self.masks[t.name].movedim(t.output_dim, 0).flatten(1).any(1) for t in self.chosen}
            self.vectors.follow(alive, self.run.optimizers, self.run.averages())
            kept = self.vectors.coupling.gather(alive)
            assert isinstance(self.quota.structure, Coupled)
            self.left = {self.quota.structure.counted: [int(kept.sum()), len(kept)]}
            self.left |= {name: [costs(kept), costs.dense] for name, costs in self._costs.items()}

    def summary(self) -> list[LayerRow]:
        """As for every method; with coupled channels also the remaining channels, parameters and multiplications."""
        goal = {self.quota.measure: 1 - self.quota.sparsity}
        rows = [
            LayerRow(name, kept, total, int(goal[name] * total) if name in goal else None)
            for name, (kept, total) in self.left.items()
        ]
        return super().summary() + rows

    def silence(self, step: Step) -> None:
        super().silence(step)
        if self.vectors is not None:
            self.vectors.silence()

    def after_unseen_step(self, step: Step) -> None:
        super().after_unseen_step(step)
        if self.vectors is not None:
            self.vectors.clear(step.optimizer)

    def project(self, step: Step) -> None:
        super().project(step)
        if self.vectors is not None:
            self.vectors.project()
