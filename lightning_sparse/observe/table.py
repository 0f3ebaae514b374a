"""A table at the end of training: what every layer was to keep, and what it kept."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from lightning_sparse.core import HEADER, SUMS, LayerRow, Masks

__all__ = ["SparsityTable", "render"]


def render(rows: list[LayerRow], title: str = "") -> Table:
    """The rows as a rich table, the total and the whole model set off."""
    table = Table(title=title or None, title_justify="left")
    for column, heading in enumerate(HEADER):
        table.add_column(heading, justify="left" if column == 0 else "right", overflow="fold")
    for row in rows:
        is_sum = row.layer in SUMS
        if row.layer == SUMS[0]:
            table.add_section()
        table.add_row(*row.cells(), style="bold" if is_sum else None)
    return table


class SparsityTable(Callback):
    """Print what is left of each layer when training ends.

    Finds every callback of the Trainer that owns masks.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(masks := getattr(callback, "mask_set", None), Masks) and len(masks):
                rows = callback.summary()  # where weights are cut into shards, all ranks count together
                if trainer.is_global_zero:
                    Console().print("", render(rows, title=callback.label))  # the progress bar may still stand
