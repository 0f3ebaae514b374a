"""The schedule of the lottery ticket: rounds of equal length after a point that each of them rewinds to."""

from __future__ import annotations

import math

from lightning_sparse.core.window import Position, RunLength, Span, TooShort

__all__ = ["Rounds"]


class Rounds:
    """A run up to a point, then several trainings of equal length, each starting from that point.

    Args:
        count: number of trainings after the first one.
        every: length of a training, as a span; None divides what follows the point.
        start: the point, as a span from the beginning of the run.

    Raises:
        ValueError: for an invalid count or span.

    Example:
        >>> rounds = Rounds(3, None, "2 epochs")
        >>> rounds.resolve(RunLength(epochs=10, steps=100))
        >>> [rounds.due(Position(epoch / 10, epoch, 10 * epoch)) for epoch in range(10)]
        [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    """

    def __init__(self, count: int, every: float | str | None, start: float | str) -> None:
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"rounds={count!r} must be an integer >= 1: the number of pruning rounds.")
        self.count = count
        self._start = Span.parse(start, "rewind_to")
        self._every = None if every is None else Span.parse(every, "every")
        if self._every is not None and self._every.value <= 0:
            raise ValueError(f"every={every!r} must be longer than zero.")
        self.start = self.length = 0.0

    @property
    def end(self) -> float:
        """When the last training starts."""
        return self.start + self.count * self.length

    def resolve(self, run: RunLength) -> None:
        """Turn spans into fractions of this run.

        Raises:
            ValueError: if the trainings do not fit into the run.
        """
        if run.epochs is None and run.steps is None:
            raise ValueError(
                "The length of this run is unknown, so rounds cannot be scheduled; set max_epochs or max_steps."
            )
        self.start = self._start.fraction(run, "rewind_to")
        if self.start >= 1:
            raise ValueError(
                f"rewind_to='{self._start}' is the end of training, so nothing rewinds to it; choose an earlier point."
            )
        share = (1 - self.start) / (self.count + 1)
        self.length = share if self._every is None else self._every.fraction(run, "every")
        if self.length > share + 1e-9:
            raise TooShort(
                f"rounds={self.count} need {self.count + 1} trainings of every='{self._every}', but from rewind_to="
                f"'{self._start}' on the run has room for {math.floor((1 - self.start) / self.length + 1e-9)}; use fewer "
                "rounds, shorter ones, or train longer."
            )
        # Without positions inside epochs, a round can only start at the start of an epoch.
        grid, unit = (run.steps, "steps") if run.within_epochs else (run.epochs, "epochs")
        if grid is not None and self.length * grid < 1 - 1e-9:
            raise TooShort(
                f"rounds={self.count} leave less than one of the run's {grid:g} {unit} to each training; use fewer rounds "
                "or train longer."
            )

    def due(self, position: Position) -> int:
        """How many trainings are complete."""
        return min(self.count, max(0, math.floor((position.fraction - self.start) / self.length + 1e-9)))

    def reached_start(self, position: Position) -> bool:
        """Whether the run has reached the point."""
        return position.fraction >= self.start - 1e-9

    def passed_start(self, position: Position) -> bool:
        """Whether the run is past the point."""
        return position.fraction > self.start + 1e-9
