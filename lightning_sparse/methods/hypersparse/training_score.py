"""One number that says how well a model does on the training set, for any task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sparse.core import MaskSet, Piece, parts_of, to_cpu
from lightning_sparse.loop import Run
from lightning_sparse.loop.dry_run import dry_run, loss_of, size_of, training_outputs

__all__ = ["TrainingScore"]

NO_LOSS = (
    "training_step returns no loss, so models cannot be compared by it; return the loss (in manual optimization too), or "
    "set score to a function of (output, batch)."
)


class TrainingScore:
    """The mean over samples of a number in the output of `training_step`; higher is better.

    Args:
        what: None uses the entry `accuracy` of a dictionary that has it, otherwise the loss. Or the name of an entry, with a
            minus sign if lower is better; or a function of (output, batch), higher is better.

    Example:
        >>> score = TrainingScore("-error")
        >>> score.weighted({"loss": torch.tensor(2.0), "error": torch.tensor(0.25)}, torch.rand(8, 3)).tolist()
        [-2.0, 8.0]
    """

    def __init__(self, what: str | Callable[[Any, Any], Any] | None = None) -> None:
        self.what = what

    def add(self, total: Tensor, output: Any, batch: Any, may_skip: bool) -> None:
        """Add a batch to a sum; one whose `training_step` returns None is left out.

        Args:
            total: what `weighted` returned for earlier batches, summed.
            output: of `training_step`.
            batch: the batch it was given.
            may_skip: whether None stands for a skipped batch, as in automatic optimization.
        """
        if output is not None or callable(self.what) or not may_skip:
            total += self.weighted(output, batch)

    def of_copy(
        self, run: Run, masks: MaskSet, set_mode: Callable[[nn.Module], Any]
    ) -> tuple[dict[str, Tensor | Piece], Tensor]:
        """The state of a masked copy of the model, and its score on the training set: the sum, and the number of samples."""
        total = torch.zeros(2, dtype=torch.float64, device=run.module.device)
        with dry_run(run.trainer, run.module) as twin:
            masks.apply_(parts_of(twin))
            set_mode(twin)
            state = {name: to_cpu(value) for name, value in twin.state_dict().items()}
            for batch, output in training_outputs(run.trainer, twin):
                self.add(total, output, batch, run.module.automatic_optimization)
        return state, total

    def weighted(self, output: Any, batch: Any) -> Tensor:
        """The sum over a batch and the number of its samples, on the device.

        Raises:
            ValueError: if the output contains no such number.
        """
        value = torch.as_tensor(self._value(output, batch)).detach()
        if value.numel() != 1:
            raise ValueError(f"The score of a batch must be a single number, not a tensor of shape {tuple(value.shape)}.")
        size = size_of(batch)
        return torch.stack([value.reshape(()).double() * size, torch.full_like(value, size).reshape(()).double()])

    @staticmethod
    def mean(trainer: pl.Trainer, total: Tensor) -> float:
        """The mean of everything summed so far, over all ranks.

        Raises:
            ValueError: if `training_step` has returned None for every batch of every rank.
        """
        value, samples = TrainingScore.over_ranks(trainer, total).tolist()
        if not samples:
            raise ValueError(NO_LOSS)
        return float(value / samples)

    @staticmethod
    def over_ranks(trainer: pl.Trainer, numbers: Tensor) -> Tensor:
        """The sum over all ranks."""
        summed: Tensor = trainer.strategy.reduce(numbers.to(trainer.strategy.root_device), reduce_op="sum")
        return summed

    def _value(self, output: Any, batch: Any) -> Any:
        entries = output if isinstance(output, Mapping) else {}
        if callable(self.what):
            return self.what(output, batch)
        if self.what is not None:
            key = self.what.removeprefix("-")
            if key not in entries:
                has = f"has {list(entries)}" if entries else "is not a dictionary"
                raise ValueError(f"score='{self.what}' needs an entry '{key}' in the output of training_step, which {has}.")
            return -torch.as_tensor(entries[key]) if self.what.startswith("-") else entries[key]
        if "accuracy" in entries:
            return entries["accuracy"]
        loss = loss_of(output)
        if loss is None:
            raise ValueError(NO_LOSS)
        return -loss
