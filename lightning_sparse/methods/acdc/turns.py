"""The schedule of AC/DC: alternating dense and compressed phases, the first dense, the last compressed."""

from __future__ import annotations

from bisect import bisect

from lightning_sparse.core.window import Position, RunLength, Span, TooShort

__all__ = ["Turns"]


class Turns:
    """An initial dense phase, then compressed and dense phases of equal length in turn, a last dense one, a compressed end.

    As many phases of length `every` as fit are placed between `start` and the last dense phase; the first and the last of
    them are compressed. The remainder goes to the last dense phase.

    Args:
        start: when the first compressed phase starts, as a span from the beginning of the run.
        every: length of a phase.
        last_dense: minimum length of the last dense phase.
        end: when the last compressed phase starts.

    Raises:
        ValueError: for spans that cannot be read or are zero.

    Example:
        >>> turns = Turns(0.1, 0.2, 0.2, 0.9)
        >>> turns.resolve(RunLength(epochs=10, steps=100))
        >>> [round(begin, 6) for begin in turns.begins]
        [0.1, 0.3, 0.5, 0.7, 0.9]
        >>> [turns.begun(Position(epoch / 10, epoch, 10 * epoch)) for epoch in range(10)]
        [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    """

    def __init__(self, start: float | str, every: float | str, last_dense: float | str, end: float | str) -> None:
        self._spans = {
            name: Span.parse(span, name)
            for name, span in (("start", start), ("every", every), ("last_dense", last_dense), ("end", end))
        }
        for name in ("every", "last_dense"):
            if self._spans[name].value <= 0:
                raise ValueError(f"{name}='{self._spans[name]}' must be longer than zero.")
        self.begins: list[float] = []
        """When each phase after the first starts, as a fraction of the run; compressed and dense phases alternate."""

    def resolve(self, run: RunLength) -> None:
        """Turn spans into fractions of this run.

        Raises:
            ValueError: if the phases do not fit into the run.
        """
        if run.epochs is None and run.steps is None:
            raise ValueError(
                "The length of this run is unknown, so phases cannot be scheduled; set max_epochs or max_steps."
            )
        start, every, last, end = (span.fraction(run, name) for name, span in self._spans.items())
        # Without positions inside epochs, a phase can only start at the start of an epoch.
        grid, unit = (run.steps, "steps") if run.within_epochs else (run.epochs, "epochs")
        for name, length in (("every", every), ("last_dense", last), ("end", 1 - end)):
            if grid is not None and length * grid < 1 - 1e-9:
                phase = "the last compressed phase" if name == "end" else "a phase"
                raise TooShort(
                    f"{name}='{self._spans[name]}' leaves {phase} less than one of the run's {grid:g} {unit}; make it "
                    f"longer, or train longer."
                )
        count = int((end - last - start) / every + 1e-9)
        if count < 1:
            given = ", ".join(f"{name}='{span}'" for name, span in self._spans.items())
            raise TooShort(
                f"{given} leave no room for a compressed phase before the last dense one; start earlier, or use shorter "
                "phases."
            )
        count -= 1 - count % 2
        self.begins = [*(start + phase * every for phase in range(count + 1)), end]

    def begun(self, position: Position) -> int:
        """How many phases after the first have started; odd numbers are compressed phases."""
        return bisect(self.begins, position.fraction + 1e-9)
