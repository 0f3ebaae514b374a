"""The progress bar of the command line: one line, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, MetricsTextColumn
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["OneLineBar", "fitting"]

BAR, TIME, LONGEST = 8, 7, 60
"""Characters: minimum for the bar, for the time, and maximum for the bar."""


@final
class OneLineBar(RichProgressBar):
    """Lightning's `RichProgressBar`, but metrics that do not fit into the terminal are dropped instead of wrapped.

    Metrics are shown in order of what changes first: logged numbers, then phases. The run's version is omitted, and so is
    the speed, because the remaining time is more useful. The bar ends with the training, so nothing printed after it is
    overwritten.
    """

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        theme = self.theme
        # Lightning has created its own just before it asks for the others, and puts it after them afterwards.
        self._metric_component = _Metrics(
            trainer, theme.metrics, theme.metrics_text_delimiter, theme.metrics_format, self._room
        )
        one_line = Column(no_wrap=True)
        batches = BatchesProcessedColumn(theme.batch_progress)
        batches.get_table_column = lambda: one_line.copy()  # type: ignore[method-assign]
        return [
            TextColumn("[progress.description]{task.description}"),
            BarColumn(
                None,
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
                table_column=Column(max_width=LONGEST),
            ),
            batches,
            TimeRemainingColumn(elapsed_when_finished=True, table_column=one_line),
        ]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _room(self) -> int:
        """Characters left for metrics, beside everything else and a space before each column."""
        if self.train_progress_bar_id is None:
            return 0
        task = self.train_progress_bar
        total = "--" if task.total in (None, float("inf")) else f"{task.total:.0f}"
        return get_console().width - len(task.description) - BAR - 2 * len(total) - 1 - TIME - 4


class _Metrics(MetricsTextColumn):
    """As many metrics as fit into one line."""

    def __init__(self, trainer: pl.Trainer, style: Any, delimiter: str, number: str, room: Any) -> None:
        super().__init__(trainer, style, delimiter, number)
        self.delimiter, self.number, self.room = delimiter, number, room

    def get_table_column(self) -> Column:
        return Column(no_wrap=True, overflow="ellipsis")

    def update(self, metrics: dict[Any, Any]) -> None:
        super().update(fitting(metrics, self.room(), self.delimiter, self.number))


def fitting(metrics: Mapping[str, Any], room: int, delimiter: str = " ", number: str = ".3f") -> dict[str, str]:
    """The metrics that fit into a line, as text; one that does not fit is skipped in favor of later ones.

    Args:
        metrics: by name, most important first.
        room: number of available characters.
        delimiter: text between two metrics.
        number: format of numbers.

    Example:
        >>> fitting({"val/accuracy": 0.98134, "a/very/long/name": 1.0, "sparsity": 0.9}, 36)
        {'val/accuracy': '0.981', 'sparsity': '0.900'}
    """
    found: dict[str, str] = {}
    for name, value in metrics.items():
        text = value if isinstance(value, str) else f"{value:{number}}"
        needed = len(f"{name}: {text}") + (len(delimiter) if found else 0)
        if needed <= room:
            found[name] = text
            room -= needed
    return found
