"""AC/DC: alternate between training all weights and training only the largest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sparse.core import (
    AllocationName,
    BudgetName,
    Position,
    Remembered,
    RunLength,
    StructureName,
    averages,
    initial_state,
    refuse_shorter_run,
    restart,
)
from lightning_sparse.families import Budgeted
from lightning_sparse.functional import magnitude
from lightning_sparse.methods.acdc.turns import Turns

__all__ = ["ACDC"]


@final
class ACDC(Budgeted):
    r"""Alternate between training all weights and training only the largest ones; ends sparse, with a dense companion.

    A compressed phase starts with $\theta \leftarrow T_k(\theta)$, which keeps the k weights of largest magnitude, and
    trains only those. A dense phase trains all weights; dropped ones restart from zero. As in the official code, optimizer
    state is reset at the start of each dense phase. The weights at the end of the last dense phase are a model in their own
    right, the dense companion: `save_to` saves it, and `SparsityCheckpoint(phase="dense")` keeps the best of all dense
    epochs.

    Runs at station `before_batch`. Costs one selection over all weights per compressed phase, and otherwise what every mask
    costs. A phase starts right before its first batch, so validation, checkpoints and learning rate schedulers that follow
    the last step of a phase still see what that phase trained.

    Source: Peste et al. 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
    https://arxiv.org/abs/2106.12379, algorithm 1, and the official repository IST-DASLab/ACDC. The defaults are the
    published lengths for 100 epochs of ImageNet, as fractions of the run.

    Args:
        sparsity: the fraction removed in compressed phases, in [0, 1); optional with `structure='n:m'`.
        start: when the first compressed phase starts (published: 10 of 100 epochs): a fraction of the run, `'n epochs'` or
            `'n steps'`.
        every: length of a phase (published: 5).
        last_dense: minimum length of the last dense phase (published: 10).
        end: when the last compressed phase starts (published: 85); masks are fixed from then on.
        save_to: folder for both models: `dense.ckpt`, the weights at the end of the last dense phase, and `sparse.ckpt`, the
            final weights; both load into the plain model. None saves nothing.
        allocation: how sparsity is distributed over the layers: `global` (scores of all layers compete), `uniform`,
            `uniform+`, `er`, `erk`, `erk+`, `owl` (layers with more outliers among their scores keep more).
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

    Raises:
        ValueError: if the phases do not fit into the run.

    Example:
        >>> ACDC(sparsity=0.9).label
        'ACDC'
    """

    phase = Remembered(int)
    """The current phase: 0 is the initial dense phase, odd numbers are compressed phases."""

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        start: float | str = 0.1,
        every: float | str = 0.05,
        last_dense: float | str = 0.1,
        end: float | str = 0.85,
        save_to: str | None = None,
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
        self.start, self.every, self.last_dense, self.end, self.save_to = start, every, last_dense, end, save_to
        self.turns = Turns(start, every, last_dense, end)
        self._initial: dict[nn.Parameter, dict[str, Any]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._initial = initial_state(trainer.optimizers)  # before the state of a checkpoint is loaded

    def check(self, run: RunLength, until: float = 1.0) -> None:
        for optimizer in self.run.optimizers:
            if averages(optimizer):
                raise ValueError(
                    f"{self.label} does not work with {type(optimizer).__name__}, which averages the weights of all phases; "
                    "use another optimizer such as SGD or AdamW."
                )
        super().check(run, until)
        self.turns.resolve(run)
        refuse_shorter_run(f"{self.label} starts its last compressed phase", self.turns.begins[-1], until)

    @property
    def at_target(self) -> bool:
        return self.phase % 2 == 1

    def before_batch(self, position: Position) -> None:
        if not self.run.fresh:
            return
        phases = len(self.turns.begins)
        begun = phases if self.run.ends_with_next_step else self.turns.begun(position)
        while self.phase < begun:
            self.phase += 1
            if self.phase == phases:
                self._save("dense")
            if self.at_target:
                self.prune(self.quota.sparsity, lambda name, weight: magnitude(weight))
            else:
                self._decompress()

    def _decompress(self) -> None:
        self.set_masks({name: torch.ones_like(self.masks[name]) for name in self.masks})
        for optimizer in self.run.optimizers:
            restart(optimizer, self._initial)

    def leave(self) -> None:
        super().leave()
        self._initial = {}

    def headline(self) -> Mapping[str, float | str]:
        return {"turn": f"{self.phase} of {len(self.turns.begins)}"}

    def numbers(self) -> Mapping[str, float | Tensor]:
        return {"phase": float(self.phase)}

    def conclude(self) -> None:
        if self.phase == len(self.turns.begins):
            self._save("sparse")
            return
        rank_zero_warn(
            f"{self.label} ends in phase {self.phase} of {len(self.turns.begins)} at sparsity {self.masks.sparsity:.4f}: "
            "training stopped before the last compressed phase. Train longer, or end the phases earlier."
        )

    def _save(self, what: str) -> None:
        if self.save_to is not None:
            self.run.trainer.save_checkpoint(Path(self.save_to) / f"{what}.ckpt", weights_only=True)
