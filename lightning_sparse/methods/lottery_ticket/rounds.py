"""When: rounds of equal length after a point to which each of them returns."""

from __future__ import annotations

import math

from lightning_sparse.core.window import Position, RunLength, Span

__all__ = ["Rounds"]


class Rounds:
    """A run up to a point, and then several trainings of one length, each of which begins at that point.

    Args:
        count: how many trainings follow the first one.
        every: length of a training, as a span; None shares out what follows the point.
        start: the point, as a span from the beginning of the run.

    Raises:
        ValueError: for a count or a span that cannot be.

    Example:
        >>> rounds = Rounds(3, None, "2 epochs")
        >>> rounds.resolve(RunLength(epochs=10, steps=100))
        >>> [rounds.due(Position(epoch / 10, epoch, 10 * epoch)) for epoch in range(10)]
        [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    """

    def __init__(self, count: int, every: float | str | None, start: float | str) -> None:
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"rounds={count!r} must be a whole number from 1 up: how many times is pruned.")
        self.count = count
        self._start = Span.parse(start, "rewind_to")
        self._every = None if every is None else Span.parse(every, "every")
        if self._every is not None and self._every.value <= 0:
            raise ValueError(f"every={every!r} must be longer than nothing.")
        self.start = self.length = 0.0

    @property
    def end(self) -> float:
        """Where the last training begins."""
        return self.start + self.count * self.length

    def resolve(self, run: RunLength) -> None:
        """Turn spans into fractions of this run.

        Raises:
            ValueError: if the trainings do not fit into the run.
        """
        if run.epochs is None and run.steps is None:
            raise ValueError("The length of this run is unknown, so no rounds can be laid out; set max_epochs or max_steps.")
        self.start = self._start.fraction(run, "rewind_to")
        if self.start >= 1:
            raise ValueError(
                f"rewind_to='{self._start}' is the end of training, to which nothing returns; rewind to an earlier point."
            )
        share = (1 - self.start) / (self.count + 1)
        self.length = share if self._every is None else self._every.fraction(run, "every")
        if self.length > share + 1e-9:
            raise ValueError(
                f"rounds={self.count} need {self.count + 1} trainings of every='{self._every}', but from rewind_to="
                f"'{self._start}' on the run has room for {math.floor((1 - self.start) / self.length + 1e-9)}; take fewer "
                "rounds, shorter ones, or train longer."
            )
        # Without positions inside epochs a round can only begin with an epoch.
        grid, unit = (run.steps, "steps") if run.within_epochs else (run.epochs, "epochs")
        if grid is not None and self.length * grid < 1 - 1e-9:
            raise ValueError(
                f"rounds={self.count} leave less than one of the run's {grid:g} {unit} to each training; take fewer rounds "
                "or train longer."
            )

    def due(self, position: Position) -> int:
        """How many trainings are over."""
        return min(self.count, max(0, math.floor((position.fraction - self.start) / self.length + 1e-9)))

    def reached_start(self, position: Position) -> bool:
        """Whether the run has come to the point."""
        return position.fraction >= self.start - 1e-9

    def passed_start(self, position: Position) -> bool:
        """Whether the run is beyond the point."""
        return position.fraction > self.start + 1e-9
