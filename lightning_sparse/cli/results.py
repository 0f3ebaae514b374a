"""Test results side by side."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

__all__ = ["side_by_side"]


def side_by_side(title: str, **results: Mapping[str, float]) -> Table:
    """Metrics of several tests, one column each."""
    table = Table("test", *results, title=title, title_justify="left")
    for metric in sorted(next(iter(results.values()))):
        table.add_row(metric.removeprefix("test/"), *(f"{result[metric]:.4f}" for result in results.values()))
    return table
