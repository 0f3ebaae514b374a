"""Methods that promise a sparsity and share it among layers."""

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
    """Outliers are looked for in whole layers.

    Raises:
        ValueError: if they are asked for, and weights are cut into shards.
    """
    if quota.allocation == "owl" and layouts:
        raise ValueError(
            "allocation='owl' looks for outliers in whole layers, and weights are cut into shards here; write another "
            "allocation, such as 'uniform'."
        )


class Budgeted(Masked):
    """A method that removes an exact share of the weights, or of the channels, that it works on.

    With `structure='coupled'` biases and norms go with their channels: they are zero where a channel is gone.

    Args:
        sparsity: the fraction removed in the end, in [0, 1); may be left out for `structure='n:m'`.
        allocation: how sparsity is shared: `global` (scores of all layers compete), `uniform`, `uniform+`, `er`, `erk`,
            `erk+`, `owl` (more where scores have outliers). With `n:m` every layer has the same share.
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (the same,
            in all layers that additions couple, with biases and norms, so that they can leave the network), `heads` (of
            attention, which can leave too), `fan_in` (as many weights in every output), `block:RxC` (outputs by inputs),
            `n:m` or `transposable n:m` (both ways).
        layer_sparsity: layers with a sparsity of their own, glob -> sparsity, counted in the total.
        max_layer_sparsity: the largest share that a layer loses where layers compete, in (0, 1].
        budget: what sparsity counts: `units` (weights, or channels), or, with `coupled` or `heads`, the `macs` or the
            `parameters` of the whole network, to within one channel.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.
    """

    left = Remembered[dict[str, list[int]]](dict)
    """Of coupled channels, and of what they cost, how much is kept and how much there is."""
    has_scores: ClassVar[bool] = True
    """Whether the method scores weights, by which `allocation='owl'` shares."""

    traced = Remembered[dict[str, Any]](dict)
    """Which channels are coupled; a resumed run may stand where its loader has no batch left to find it with."""

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
        """The budget laid out on the weights of the running fit."""
        assert self._plan is not None, "asked before `check`"
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
        """Remove the lowest scores until exactly this fraction is removed; entries removed before come first.

        Args:
            sparsity: the fraction removed after this.
            score: of a weight, by name; higher survives.
        """
        masks = self.masks
        scores = [score(name, weight).masked_fill(masks.dropped(name), -torch.inf) for name, weight in self.weights.items()]
        chosen = self.plan.each_mask(scores, sparsity, list(masks.counts.values()))
        self.set_masks(zip(self.weights, chosen, strict=True))

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
        """As of every method; with coupled channels also what is left of them, of all parameters and multiplications."""
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
