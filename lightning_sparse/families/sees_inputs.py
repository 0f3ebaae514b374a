"""Methods that judge weights by the inputs of their layers on the user's own training batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sparse.core import Target, first_line, shows_inputs
from lightning_sparse.families.budgeted import Budgeted
from lightning_sparse.loop.dry_run import (
    dry_run,
    refuse_unrepeatable_data,
    take_step,
    train_but_leaves,
    training_batches,
)

__all__ = ["Enough", "SeesInputs"]


class Enough(Exception):
    """Raised when inputs have been read and the rest of a batch does not matter."""


@contextmanager
def _step_by_step() -> Iterator[None]:
    """Run layer by layer: torch's attention can be one opaque call, and graphs compiled earlier leave out the hooks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class SeesInputs(Budgeted):
    """Works on weights whose inputs are visible (see `core.shows_inputs`); others stay dense, and a message says so.

    Inputs are read on a copy of the module that logs nothing, in evaluation mode and without gradients, on `batches` batches
    of the training set on every rank (with gradient accumulation, times the number of accumulated batches).
    """

    batches: int

    def choose(self, module: nn.Module, goes_on: bool = False) -> None:
        self._layers = dict(module.named_modules())
        super().choose(module, goes_on)
        self._layers = {}

    def misfit(self, target: Target) -> str | None:
        path, _, leaf = target.name.rpartition(".")
        layer = self._layers[path]
        if not shows_inputs(layer, leaf):
            return f"is in a layer ({type(layer).__name__}) whose calls do not show what it is multiplied by"
        layout = target.layout
        if layout is not None and (target.groups * target.parts > 1 or {*layout.cut} - {target.output_dim}):
            return "is not sharded along its outputs"
        return super().misfit(target)

    @property
    def targets_by_name(self) -> dict[str, Target]:
        """The chosen weights, with their dimensions in their layers."""
        return {target.name: target for target in self.chosen}

    @contextmanager
    def calibration(self) -> Iterator[tuple[pl.LightningModule, Callable[..., None]]]:
        """A copy of the module that logs nothing, and a function that sends the same batches through it at every call.

        The function accepts another function, which is called after each batch.

        Raises:
            ValueError: if the data can be read only once, there are none, or `training_step` fails without gradients.
        """
        trainer, module = self.run.trainer, self.run.module
        refuse_unrepeatable_data(trainer, module, self.label)
        with dry_run(trainer, module) as twin, torch.no_grad(), _step_by_step():
            count = self.batches * self.run.accumulation(trainer.current_epoch)
            batches = list(itertools.islice(training_batches(trainer), count))
            if not batches:
                raise ValueError(
                    f"{self.label} looks at inputs on batches of the training set, and it gave none; check the "
                    "train_dataloader."
                )
            train_but_leaves(twin)

            def send(after_batch: Callable[[], None] | None = None) -> None:
                for index, batch in enumerate(batches):
                    try:
                        with trainer.precision_plugin.train_step_context():
                            take_step(twin, batch, index)
                    except Enough:
                        continue
                    except torch.OutOfMemoryError:
                        raise
                    except RuntimeError as error:
                        raise ValueError(
                            f"{self.label} sends batches through a copy of {type(module).__name__} without gradients, and "
                            f"its training_step fails there ({first_line(error)}); prune by magnitude, or take no "
                            "gradients in it."
                        ) from error
                    if after_batch is not None:
                        after_batch()

            yield twin, send

    def everywhere(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; may overwrite its input."""
        total: Tensor = self.run.trainer.strategy.reduce(tensor, reduce_op="sum")
        return total

    def refuse_unreached(self, name: str) -> None:
        """Refuse a weight that the batches never reach, such as an expert to which no token is sent.

        Raises:
            ValueError: naming it.
        """
        raise ValueError(
            f"{self.label}: no input has reached '{name}' in batches={self.batches}; take more batches, or keep it dense "
            f"with targets=['!{name.rpartition('.')[0]}']."
        )

    def refuse_infinite(self, name: str) -> None:
        """Refuse a weight whose inputs are infinite or NaN.

        Raises:
            ValueError: naming the weight.
        """
        raise ValueError(
            f"{self.label}: the inputs of '{name}' are not finite on batches of the training set; look for a bad sample, or "
            "for weights that have diverged."
        )
