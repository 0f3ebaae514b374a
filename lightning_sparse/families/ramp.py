"""How sparsity grows within a window."""

from __future__ import annotations

from lightning_sparse.core import check_choice, check_schedule
from lightning_sparse.functional import SCHEDULES
from lightning_sparse.functional.schedules import Schedule, ScheduleName

__all__ = ["Ramp"]


class Ramp:
    """Sparsity from 0 to its final value, as a function of the progress through a window.

    Args:
        schedule: a name in `SCHEDULES`, or a function of (progress, start value, end value).
        sparsity: in the end.

    Raises:
        ValueError: for an unknown name, or a function that returns an invalid sparsity.

    Example:
        >>> Ramp("linear", 0.8)(0.5)
        0.4
    """

    def __init__(self, schedule: ScheduleName | Schedule, sparsity: float) -> None:
        if callable(schedule):
            check_schedule("schedule", schedule, 0.0, sparsity)
        else:
            check_choice("schedule", schedule, SCHEDULES, " or give a function")
        self.schedule, self.sparsity = schedule, sparsity

    def __call__(self, progress: float) -> float:
        """The sparsity at this progress."""
        if progress >= 1:
            return self.sparsity
        return min(max(self._asked(progress), 0.0), self.sparsity)

    def _asked(self, progress: float) -> float:
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return float(schedule(progress, 0.0, self.sparsity))
