"""The schedule of eta: how much of a new direction a step mixes in."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_sparse.core import check_choice

__all__ = ["Knots", "read_knots"]

Knots = Sequence[Sequence[float]]

MIXING_SCHEDULES: dict[str, Knots] = {
    # The knots of the published recipe, 0, E/6, E/3, E-3 and E for E = 50 epochs, in units of its peak of 2/256.
    "published": ((0, 0.02), (1 / 6, 1), (1 / 3, 0.25), (0.94, 0.002), (1, 0.0001)),
    "constant": ((0, 1),),
}


def read_knots(schedule: str | Knots, peak: float) -> Knots:
    """The knots of eta's schedule, as fractions of its peak."""
    if isinstance(schedule, str):
        check_choice("mixing_schedule", schedule, MIXING_SCHEDULES, " or give knots")
        return MIXING_SCHEDULES[schedule]
    try:
        times, factors = [float(time) for time, _ in schedule], [float(factor) for _, factor in schedule]
    except (TypeError, ValueError):
        times = factors = []
    if not times or times != sorted(times) or not 0 <= times[0] <= times[-1] <= 1:
        raise ValueError(
            f"mixing_schedule={schedule!r} must list pairs of (fraction of the run, fraction of the peak) in order, such as "
            "[[0, 0.1], [1, 1]]."
        )
    for time, factor in zip(times, factors, strict=True):
        if not 0 <= peak * factor <= 1:
            raise ValueError(f"mixing_schedule makes eta {peak * factor:g} at {time:.0%} of the run; keep it in [0, 1].")
    return schedule
