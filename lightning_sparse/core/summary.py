"""Summarize what is kept of each layer, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_sparse.core.masks import Masks

__all__ = ["LayerRow", "format_table", "summarize"]


class LayerRow(NamedTuple):
    """One layer of a sparse model, or the sum of all.

    Args:
        layer: name of the weight, `total`, or `whole model`.
        kept: number of entries that the mask keeps.
        total: number of all entries.
        target: number of entries to keep at the end; None if it depends on the scores.
    """

    layer: str
    kept: int
    total: int
    target: int | None

    @property
    def density(self) -> float:
        """The fraction kept."""
        return self.kept / self.total if self.total else 1.0

    def cells(self) -> tuple[str, str, str, str]:
        """Return the row as text: layer, kept of total, target, density."""
        target = "by score" if self.target is None else f"{self.target:,}"
        return self.layer, f"{self.kept:,} of {self.total:,}", target, f"{self.density:.2%}"


SUMS = ("total", "whole model", "coupled channels", "parameters", "macs")
"""Names of the rows that are not layers; the last three appear if channels leave the network."""

HEADER = ("layer", "kept", "target", "density")
"""The columns of the table of layers."""


def summarize(
    masks: Masks, target: int | None = None, targets: Mapping[str, int] | None = None, model: int | None = None
) -> list[LayerRow]:
    """Return one row per masked weight, then their sum, then the whole model if its size is given.

    Args:
        masks: the masks of the weights.
        target: number of entries to keep in total, if known.
        targets: number of entries to keep per weight, if known.
        model: number of entries in the whole model, including those without masks.
    """
    counts = masks.counts
    rows = [LayerRow(name, counts[name], masks.numel(name), (targets or {}).get(name)) for name in masks]
    rows.append(LayerRow(SUMS[0], masks.kept, masks.total, target))
    if model is not None:
        rest = model - masks.total
        rows.append(LayerRow(SUMS[1], rest + masks.kept, model, None if target is None else rest + target))
    return rows


def format_table(rows: Sequence[LayerRow]) -> str:
    """Return the rows as aligned text."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
