"""What the loop logs, and what it shows on the progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_sparse.loop.method import Method
from lightning_sparse.loop.phase import phase_of
from lightning_sparse.loop.replacements import Replacements
from lightning_sparse.loop.run import Run

__all__ = ["Log"]


class Log:
    """Writes the sparsity of a run and the numbers of its methods.

    Args:
        run: the running fit.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._kept = -1
        self._phase: str | None = None

    def show_words(self, methods: Sequence[Method], replacements: Replacements) -> None:
        """Show words on the bar: logged values can only be numbers, and stay there when their name is no longer used."""
        bar: Any = self.run.trainer.progress_bar_callback
        if bar is None or "get_metrics" in vars(bar):
            return
        original = bar.get_metrics

        def get_metrics(*args: Any) -> dict[str, Any]:
            phase = {} if self._phase is None else {"phase": self._phase}
            words = {key: value for method in methods for key, value in method.headline().items()}
            return {**original(*args), **phase, **words}

        replacements.replace(bar, "get_metrics", get_metrics)

    def numbers(self, method: Method, numbers: Mapping[str, float | Tensor]) -> None:
        """Log numbers of a method under its label."""
        named = {f"{method.label}/{key}": value for key, value in numbers.items()}
        if named:
            self.run.module.log_dict(named, on_step=False, on_epoch=True, batch_size=1)

    def batch(self, methods: Sequence[Method], everyone: Sequence[Method]) -> None:
        """Log the sparsity after a batch if it has changed, and all numbers in the first batch of an epoch.

        Args:
            methods: the methods that are visited.
            everyone: all methods of the fit; one of them has counted the parameters of the model.
        """
        first = self.run.batch_idx == 0
        if first:
            for method in methods:
                self.numbers(method, method.numbers())
        masks = [masks for method in methods if (masks := method.mask_set) is not None]
        if any(mask.live for mask in masks) and not self.run.time_to_count:
            return
        kept = sum([mask.kept for mask in masks])
        # Lightning keeps showing and logging a value until the epoch ends, and a call costs half a millisecond.
        if masks and (first or kept != self._kept):
            sparsity = 1 - kept / sum([mask.total for mask in masks])
            # One name for the bar, and one for loggers: some keep metrics as files, where `sparsity` cannot also be a
            # folder.
            self.run.module.log("sparsity", sparsity, prog_bar=True, logger=False, batch_size=1)
            self.run.module.log("sparsity/actual", sparsity, batch_size=1)
            dropped = sum([mask.total for mask in masks]) - kept
            size = max(method.model_size for method in everyone)
            self.run.module.log("sparsity/model", dropped / size, batch_size=1)
            self._kept, self._phase = kept, phase_of(methods)
