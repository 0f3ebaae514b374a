"""The readings of a monitor, epoch by epoch, as plain values of bounded size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["History", "best_of", "choose_metric", "is_loss", "stem"]

Row = dict[str, Any]


class History:
    """Rows of readings in the order of epochs; a long run keeps every second, fourth, ... row, and always the newest.

    Args:
        limit: maximum number of rows.

    Example:
        >>> history = History(limit=3)
        >>> for epoch in range(8):
        ...     history.add({"epoch": epoch, "sparsity": epoch / 10})
        >>> history.column("epoch"), history.column("sparsity")
        ([0, 4, 7], [0.0, 0.4, 0.7])
        >>> history.add({"epoch": 5, "sparsity": 0.6})  # resumed from an earlier checkpoint
        >>> history.column("epoch")
        [0, 4, 5]
    """

    def __init__(self, limit: int = 512) -> None:
        self.limit = limit
        self.rows: list[Row] = []
        self.stride = 1

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it replaces rows of the same and of later epochs."""
        while self.rows and self.rows[-1]["epoch"] >= row["epoch"]:
            self.rows.pop()
        number = self.rows[-1]["number"] + 1 if self.rows else 0
        if self.rows and self.rows[-1]["number"] % self.stride:
            self.rows.pop()  # it was kept only as the newest
        self.rows.append({**row, "number": number})
        while len(self.rows) > self.limit:
            self.stride *= 2
            self.rows = [row for row in self.rows if row["number"] % self.stride == 0 or row["number"] == number]

    def column(self, key: str) -> list[Any]:
        """One value of every row; None if a row lacks it."""
        return [row.get(key) for row in self.rows]

    def state_dict(self) -> dict[str, Any]:
        """The rows as plain values."""
        return {"rows": [dict(row) for row in self.rows], "stride": self.stride}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rows, self.stride = [dict(row) for row in state["rows"]], state["stride"]


def choose_metric(names: Iterable[str], asked: str | None = None) -> str | None:
    """Choose the metric for the accuracy curve: validation before training, accuracy before loss.

    Args:
        names: names of all logged metrics.
        asked: a name that is preferred over all others, if it was logged.

    Example:
        >>> choose_metric(["train/loss", "val/loss", "val/accuracy", "train/accuracy"])
        'val/accuracy'
    """
    known = sorted(names)
    if asked in known:
        return asked
    kinds: Sequence[str] = ("acc", "f1", "auc", "iou", "map", "psnr", "r2", "loss", "mse", "error", "perplexity")
    for prefer in ("val", "test", ""):
        for kind in kinds:
            for name in known:
                if kind in name.lower() and prefer in name.lower():
                    return name
    return None


def is_loss(metric: str) -> bool:
    """Whether lower is better, judging by the name."""
    return any(word in metric.lower() for word in ("loss", "error", "mse", "perplexity"))


def stem(metric: str) -> str:
    """The name without the set that it was measured on.

    Example:
        >>> stem("val/accuracy"), stem("test_loss"), stem("score")
        ('accuracy', 'loss', 'score')
    """
    return re.sub(r"^(val|valid|validation|test|train)[/_]", "", metric)


def best_of(rows: Sequence[Row], metric: str) -> Row | None:
    """The row with the best value of a metric, among those of the run's final phase; the first of equals.

    Example:
        >>> rows = [{"phase": "dense", "metrics": {"score": 0.9}}, {"phase": "at target", "metrics": {"score": 0.8}}]
        >>> best_of(rows, "score")["phase"]
        'at target'
    """
    read = [row for row in rows if row["phase"] == rows[-1]["phase"] and math.isfinite(row["metrics"].get(metric, math.nan))]
    return (min if is_loss(metric) else max)(read, key=lambda row: row["metrics"][metric], default=None)
