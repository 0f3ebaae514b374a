"""A table at the end of training: the target and the actual count of every layer."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.table import Table

from lightning_sparse.core import HEADER, SUMS, LayerRow, Masks

__all__ = ["SparsityTable", "render"]

SHORTEST = 12
"""Minimum number of characters of a name, however narrow the terminal is."""


def render(rows: list[LayerRow], title: str = "") -> Table:
    """The rows as a rich table, with the total and the whole model set apart; long names are cut from the left."""
    cells = [row.cells() for row in rows]
    others = sum(max(map(len, column)) for column in list(zip(HEADER, *cells, strict=True))[1:])
    room = max(get_console().width - others - 3 * len(HEADER) - 1, SHORTEST)
    table = Table(title=title or None, title_justify="left")
    for column, heading in enumerate(HEADER):
        table.add_column(heading, justify="left" if column == 0 else "right", overflow="fold")
    for row, (layer, *numbers) in zip(rows, cells, strict=True):
        is_sum = row.layer in SUMS
        if row.layer == SUMS[0]:
            table.add_section()
        shown = layer if len(layer) <= room else "…" + layer[1 - room :]
        table.add_row(shown, *numbers, style="bold" if is_sum else None)
    return table


class SparsityTable(Callback):
    """Print what is left of each layer when training ends.

    Finds every callback of the Trainer that has masks.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(masks := getattr(callback, "mask_set", None), Masks) and len(masks):
                rows = callback.summary()  # where weights are sharded, all ranks count together
                if trainer.is_global_zero:
                    get_console().print("", render(rows, title=callback.label))  # the progress bar may still stand
