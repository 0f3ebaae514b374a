"""The running fit, as far as a method may use it: trainer, module, position, gradient scale."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_sparse.core import Position, RunLength, parts_of
from lightning_sparse.loop.privates import average_models, unscales_itself

__all__ = ["Run"]


class Run:
    """A fit from its first batch to its end.

    Args:
        trainer: Trainer of the fit.
        module: the module that is trained.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.batch_idx = 0
        """The current batch of the epoch, or -1 before the first."""
        self.fresh = True
        """Whether no gradients of earlier batches are pending."""
        self.log_interval: int = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        """Lightning logs once in as many steps."""
        self._unscaled: set[int] = set()
        self._shards = [part for part in module.modules() if isinstance(part, FSDPModule)]

    @property
    def optimizers(self) -> list[Optimizer]:
        """The plain optimizers."""
        return self.trainer.optimizers

    def reshard(self) -> None:
        """Make every FSDP2 layer gather its weights anew: after validation some still hold the old ones.

        Called around everything that reads or changes weights outside a step; free if nothing is sharded.
        """
        for part in self._shards:
            part.reshard()

    # ---- how long it is, and where it is ----------------------------------------------------------------------------

    def length(self) -> RunLength:
        """Epochs and steps of the whole run, as far as they are known before it starts."""
        trainer = self.trainer
        max_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
        max_steps = None if trainer.max_steps == -1 else trainer.max_steps
        batches = trainer.num_training_batches
        unlimited = max_epochs is None and max_steps is None
        whole_epochs = None if max_epochs is None else float(max_epochs)
        if unlimited or batches == float("inf") or batches == 0:
            return RunLength(whole_epochs, max_steps, within_epochs=False)
        if not self.module.automatic_optimization:  # manual optimization may step any number of times
            return RunLength(whole_epochs, max_steps)
        epochs = steps = 0
        while (max_epochs is None or epochs < max_epochs) and (max_steps is None or steps < max_steps):
            in_epoch = -(-int(batches) // self.accumulation(epochs))
            if max_steps is not None and steps + in_epoch > max_steps:
                return RunLength(epochs + (max_steps - steps) / in_epoch, max_steps)
            epochs, steps = epochs + 1, steps + in_epoch
        return RunLength(float(epochs), steps)

    def share(self, length: RunLength, begun: RunLength) -> float:
        """The fraction of the originally planned run that is over when this fit ends; counted like positions."""
        shares = [length.epochs / begun.epochs] if length.epochs and begun.epochs else []
        if length.steps and begun.steps and (self.trainer.max_steps != -1 or not shares):
            shares.append(length.steps / begun.steps)
        return min(1.0, max(shares, default=1.0))

    def accumulation(self, epoch: int) -> int:
        """Batches per optimizer step in an epoch."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                return callback.get_accumulate_grad_batches(epoch)
        return self.trainer.accumulate_grad_batches

    def position(self, length: RunLength, steps: int, epoch_start: bool = False, under_way: int = 0) -> Position:
        """The current position: before the first batch of an epoch, or after the step of the current batch.

        Args:
            length: length of the run, to which fractions refer.
            steps: steps that a method has counted.
            epoch_start: whether this is the moment before the first batch.
            under_way: steps that were made but not yet counted by Lightning.
        """
        trainer = self.trainer
        epoch, fraction = trainer.current_epoch, 0.0
        if length.epochs:
            batches = trainer.num_training_batches
            inside = 0.0 if epoch_start or batches == float("inf") else (self.batch_idx + 1) / batches
            fraction = (epoch + inside) / length.epochs
        if length.steps and trainer.max_steps != -1:
            fraction = max(fraction, (trainer.global_step + under_way) / length.steps)
        return Position(min(fraction, 1.0), epoch, steps, epoch_start)

    @property
    def time_to_count(self) -> bool:
        """Whether to count masks that change in every step: as often as Lightning logs, because it waits for the device."""
        return self.batch_idx == 0 or self.trainer.global_step % self.log_interval == 0

    @property
    def ends_with_next_step(self) -> bool:
        """Whether the step that the next batch starts to accumulate for is the last one; False if unknown."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if trainer.max_epochs in (None, -1) or batches == float("inf") or not self.module.automatic_optimization:
            return False
        accumulated = self.batch_idx + 1 + self.accumulation(trainer.current_epoch)
        return trainer.current_epoch + 1 == trainer.max_epochs and accumulated >= batches

    # ---- the scale of gradients --------------------------------------------------------------------------------------

    @cached_property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def gradient_scale(self, optimizer: Optimizer) -> Tensor | None:
        """The factor that gradients carry right before a step, or None if there is none."""
        if self._scaler is None:
            return None
        self._unscaled.discard(id(optimizer))
        return self._scale(optimizer)

    def _scale(self, optimizer: Optimizer) -> Tensor | None:
        if self._scaler is None or not unscales_itself(optimizer):
            return None
        scale: Tensor = self._scaler.scale(torch.ones((), device=self.module.device))
        return scale

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide gradients by their scale now, and look for infinities, where a fused optimizer would do so in its step.

        For methods that hide gradients from it: hidden gradients would not be checked. Called at station `silence`, when
        scaled gradients are no longer read; only the first call has an effect, because a scaler allows only one.
        """
        if id(optimizer) not in self._unscaled and self._scale(optimizer) is not None:
            self._unscaled.add(id(optimizer))
            self._scaler.unscale_(optimizer)

    # ---- copies of the model -----------------------------------------------------------------------------------------

    def averages(self) -> list[dict[str, nn.Parameter]]:
        """The weights of moving averages (`EMAWeightAveraging`, `StochasticWeightAveraging`), by the module's names.

        A pruned entry must become zero in the average too: there it would decay but never become zero.
        """
        return [parts_of(_averaged(model)) for model in average_models(self.trainer)]


def _averaged(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, AveragedModel) else model
