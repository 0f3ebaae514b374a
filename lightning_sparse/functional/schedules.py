"""Schedules that move a value from its start to its end. A schedule is a function of progress in [0, 1]."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Literal

__all__ = [
    "SCHEDULES",
    "Schedule",
    "ScheduleName",
    "constant",
    "cosine",
    "cubic",
    "exponential",
    "linear",
    "piecewise_linear",
]

Schedule = Callable[[float, float, float], float]
"""`schedule(progress, start, end)` begins at `start` and is exactly `end` at progress 1."""

ScheduleName = Literal["constant", "linear", "cubic", "cosine", "exponential"]
"""The names in `SCHEDULES`."""


def constant(progress: float, start: float, end: float) -> float:
    """Take the end value at once."""
    return end


def linear(progress: float, start: float, end: float) -> float:
    """Change at a constant rate."""
    return end if progress >= 1 else start + (end - start) * progress


def cubic(progress: float, start: float, end: float) -> float:
    r"""Change fast at first, while there is much to remove, and slowly at the end.

    $$ v(t) = end + (start - end)(1 - t)^3 $$

    Source: Zhu and Gupta 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878, eq. 1.

    Example:
        >>> round(cubic(0.5, 0.0, 0.8), 6)
        0.7
    """
    return end + (start - end) * (1 - progress) ** 3


def cosine(progress: float, start: float, end: float) -> float:
    """Change slowly at both ends: half a period of a cosine."""
    return end if progress >= 1 else start + (end - start) * (1 - math.cos(math.pi * progress)) / 2


def exponential(progress: float, start: float, end: float) -> float:
    r"""Remove a constant fraction of what is left per unit of progress, like iterative pruning.

    $$ 1 - v(t) = (1 - start) \left(\frac{1 - end}{1 - start}\right)^t $$

    Needs start < 1 and end < 1.
    """
    return end if progress >= 1 else 1 - (1 - start) * ((1 - end) / (1 - start)) ** progress


def piecewise_linear(progress: float, knots: Sequence[Sequence[float]]) -> float:
    """Interpolate linearly between knots; the value is constant before the first knot and after the last.

    Args:
        progress: in [0, 1].
        knots: pairs of (progress, value), in order.

    Example:
        >>> piecewise_linear(0.25, [(0, 0.0), (0.5, 1.0), (1, 0.5)])
        0.5
    """
    after = bisect([knot[0] for knot in knots], progress)
    if after in (0, len(knots)):
        return float(knots[min(after, len(knots) - 1)][1])
    (x0, y0), (x1, y1) = knots[after - 1], knots[after]
    return float(y0 + (y1 - y0) * (progress - x0) / (x1 - x0))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "exponential": exponential,
}
"""The schedules by name."""
