"""A logger that keeps what it is given."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers.logger import Logger

__all__ = ["Written"]


class Written(Logger):
    """Nothing goes to a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[int | None, dict[str, float]]] = []
        self.configuration: dict[str, Any] = {}

    name = version = save_dir = None  # type: ignore[assignment]

    @property
    def keys(self) -> list[str]:
        return sorted({key for _, numbers in self.numbers for key in numbers})

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.numbers.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.configuration |= dict(params)
