"""Methods that own masks: silence before the step, project after it, keep the optimizer's memory clean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.core import Budget, Coupled, Coupling, MaskSet, Remembered, clear_moments
from lightning_sparse.core.dependencies import find_coupling
from lightning_sparse.loop.dry_run import dry_run, example_inputs
from lightning_sparse.loop.loop import Step
from lightning_sparse.loop.sparsifier import Sparsifier

__all__ = ["Masked"]


class Masked(Sparsifier):
    """A method that holds weights at exact zeros through masks.

    At stations `silence` and `project`, at the cost of two passes over the weights per step. Pruned entries have zero
    weight, zero gradient into the optimizer and zero optimizer moments from the moment they are pruned; an entry that
    comes back starts with zero moments.
    """

    masks = Remembered(MaskSet)
    _traced = Remembered[dict[str, Any]](dict)
    """The input that coupled channels were found with; a resumed run may stand where its loader has no batch left."""

    coupling: Coupling | None = None
    """Which channels go together, with `structure='coupled'`."""
    vectors: Mapping[str, nn.Parameter] = MappingProxyType({})
    """Biases and norms of coupled channels: they are zero where a channel is gone, and are not counted."""
    vector_masks = MaskSet()
    _input: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def target_counts(self) -> tuple[int | None, dict[str, int]]:
        """What `goal` holds, for the chosen weights."""

    @property
    def mask_set(self) -> MaskSet | None:
        return self.masks

    def check_budget(self, budget: Budget) -> None:
        """Refuse what cannot be reached on the chosen weights; find out which channels go together, if that is asked for."""
        if isinstance(budget.structure, Coupled):
            self._couple(budget.structure)
        budget.check(self.chosen)

    def _couple(self, structure: Coupled) -> None:
        module = self.stations.module
        known = self._traced if self._saved is None else self._saved["memory"].get("_traced")
        with dry_run(self.stations.trainer, module) as twin:
            if known:
                inputs = torch.zeros(known["shape"], dtype=getattr(torch, known["dtype"]))
            else:
                inputs = example_inputs(self.stations.trainer, twin, self.label)
            channels = {target.name: target.weight.shape[target.output_dim] for target in self.chosen}
            self.coupling = structure.coupling = find_coupling(twin, inputs.to(module.device), channels)
        self._input = {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
        parameters = dict(module.named_parameters())
        self.vectors = {name: parameters[name] for name in self.coupling.vectors}
        stay = [f"'{name}' ({reason})" for name, reason in self.coupling.staying.items() if name in channels]
        if stay and not known:
            rank_zero_info(f"{self.label}: channels stay in {', '.join(stay)}.")

    def begin(self) -> None:
        self._traced = dict(self._input)
        self.masks = MaskSet(self.weights)
        total, layers = self.target_counts()
        self.goal = {"total": total, "layers": layers}

    def resume(self) -> None:
        self.masks.apply_(self.weights)
        self._mask_vectors()

    def release(self) -> None:
        self.coupling, self.vectors = None, {}
        super().release()

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Exchange masks, and bring weights, moments and moving averages in line.

        Args:
            masks: by name; True = kept. Masks left out stay.
        """
        weights = self.weights
        changed = {}
        for name, mask in masks.items():
            unsettled = self.masks.dropped(name) | ~mask  # all but what was kept and stays kept
            if not mask.equal(self.masks[name]):
                changed[name] = mask
                for optimizer in self.stations.trainer.optimizers:
                    clear_moments(optimizer, weights[name], unsettled)
        self.masks.replace(changed)
        self.masks.changed = True  # also where nothing has changed: all ranks must come to the comparison together
        self.masks.apply_({name: weights[name] for name in changed})
        for average in self.stations.averages():
            self.masks.apply_({name: average[name] for name in changed})
        if changed:
            self._mask_vectors()
        for name in changed:
            if self.masks.counts[name] == 0:
                rank_zero_warn(
                    f"{self.label} has removed all of '{name}'; signals no longer pass this layer. Use a lower sparsity, "
                    "allocation='erk', or give the layer its own layer_sparsity."
                )

    def prune(self, budget: Budget, sparsity: float, score: Callable[[str, Tensor], Tensor]) -> None:
        """Remove the lowest scores until exactly this fraction is removed; entries removed before come first.

        Args:
            budget: shares the sparsity among layers.
            sparsity: the fraction removed after this.
            score: of a weight, by name; higher survives.
        """
        scores = [
            score(name, weight).masked_fill(self.masks.dropped(name), -torch.inf) for name, weight in self.weights.items()
        ]
        masks = budget.masks(self.chosen, scores, sparsity, list(self.masks.counts.values()))
        self.set_masks(dict(zip(self.weights, masks, strict=True)))

    def _mask_vectors(self) -> None:
        """Biases and norms of channels that are gone become zero, and so does what optimizers and averages know of them."""
        if self.coupling is None:
            return
        self.vector_masks = MaskSet(self.vectors)
        alive = {t.name: self.masks[t.name].movedim(t.output_dim, 0).flatten(1).any(1) for t in self.chosen}
        units = self.coupling.gather(alive)
        self.vector_masks.replace({name: self.coupling.spread(units, name) for name in self.vectors})
        self.vector_masks.apply_(self.vectors)
        for optimizer in self.stations.trainer.optimizers:
            self._clear(optimizer, self.vectors, self.vector_masks)
        for average in self.stations.averages():
            self.vector_masks.apply_({name: average[name] for name in self.vectors})

    def clean(self) -> None:
        """Weights, biases, norms and moments may have come back from elsewhere; bring all of them in line."""
        self.masks.apply_(self.weights)
        for optimizer in self.stations.trainer.optimizers:
            self._clear(optimizer, self.weights, self.masks)
        self._mask_vectors()

    @staticmethod
    def _clear(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], masks: MaskSet) -> None:
        for name, parameter in parameters.items():
            clear_moments(optimizer, parameter, masks.dropped(name).to(parameter.device))

    def silence(self, step: Step) -> None:
        self.masks.apply_({name: weight.grad for name, weight in step.weights.items()})
        self.vector_masks.apply_({name: vector.grad for name, vector in self.vectors.items()})

    def after_unseen_step(self, step: Step) -> None:
        self._clear(step.optimizer, step.weights, self.masks)
        self._clear(step.optimizer, self.vectors, self.vector_masks)

    def project(self, step: Step) -> None:
        self.masks.apply_(step.weights)
        self.vector_masks.apply_(self.vectors)
