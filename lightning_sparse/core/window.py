"""Spans of a run, and a window of it with a grid of updates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["FINAL", "Position", "RunLength", "Span", "TooShort", "Window", "refuse_shorter_run"]


FINAL = 1 << 62
"""The number of the update that ends a window."""


class TooShort(ValueError):
    """Raised if a method needs a longer run."""


class Position(NamedTuple):
    """A position in a run.

    Args:
        fraction: fraction of the run that is done, in [0, 1].
        epoch: complete epochs.
        step: optimizer steps done.
        epoch_start: whether this is the moment before the first batch of an epoch, not after a step.
    """

    fraction: float
    epoch: int
    step: int
    epoch_start: bool = False


class RunLength(NamedTuple):
    """The length of a run; unknown parts are None.

    Args:
        epochs: number of epochs.
        steps: number of optimizer steps.
        within_epochs: whether positions inside an epoch are known; False if the data has no length.
    """

    epochs: float | None
    steps: int | None
    within_epochs: bool = True


@dataclass(frozen=True)
class Span:
    """A length of time: a fraction of the run (0.75), or `'30 epochs'`, or `'500 steps'`.

    Example:
        >>> Span.parse("30 epochs").fraction(RunLength(epochs=40, steps=4000))
        0.75
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, span: float | str, name: str = "span") -> Span:
        """Parse a span as users write it.

        Raises:
            ValueError: if it is neither a fraction nor a number of epochs or steps.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)\s*(epoch|step|)s?\s*", str(span))
        if match and match[2]:
            return cls(float(match[1]), f"{match[2]}s")
        if match and 0 <= float(match[1]) <= 1:
            return cls(float(match[1]), "fraction")
        raise ValueError(
            f"{name}={span!r} is not a span of time; write a fraction of the run from 0 to 1, '{span} epochs' or "
            f"'{span} steps'."
            if match
            else f"{name}={span!r} is not a span of time; write a fraction such as 0.75, '30 epochs' or '500 steps'."
        )

    def fraction(self, run: RunLength, name: str = "span") -> float:
        """The span as a fraction of a run.

        Raises:
            ValueError: if the run's length in this unit is unknown, or the span is longer than the run.
        """
        if self.unit == "fraction":
            return self.value
        length = run.epochs if self.unit == "epochs" else run.steps
        if length is None:
            raise ValueError(
                f"{name}='{self}' needs to know the run's length in {self.unit}; write a fraction of the run instead."
            )
        if self.value > length:
            raise ValueError(
                f"{name}='{self}' is after the end of training ({length:g} {self.unit}); end earlier, train longer, or "
                "write a fraction of the run such as 0.75."
            )
        return self.value / length

    def __str__(self) -> str:
        return f"{self.value:g}" if self.unit == "fraction" else f"{self.value:g} {self.unit}"


def refuse_shorter_run(what: str, end: float, until: float) -> None:
    """Refuse to resume a run that is now shorter than its schedule.

    Args:
        what: what happens at the end, such as `SET ends its schedule`.
        end: when it happens, as a fraction of the originally planned run.
        until: the fraction of that run that is over when training ends now.

    Raises:
        ValueError: if training ends earlier.
    """
    if end > until + 1e-9:
        raise ValueError(
            f"{what} at {end:.0%} of the run as it was begun, but training now ends at {until:.0%} of that; train at least "
            "as long as planned then, or start a new run from the weights."
        )


class Window:
    """A part of the run with updates on a grid, and the record of which are done.

    The record is state, for checkpoints; the times of opening and closing are not.

    Args:
        start: when it opens.
        end: when it closes; the last update is due then.
        every: the grid. `'k epochs'` updates at the start of epochs, everything else right after steps. On a grid of epochs
            the window starts and ends with the grid epoch that has started by then.
        end_name: name of the end in messages.

    Raises:
        ValueError: for spans that cannot be read, or an empty grid.
    """

    def __init__(self, start: float | str, end: float | str, every: float | str, end_name: str = "end") -> None:
        self._end_name = end_name
        self._end, self._start = Span.parse(end, end_name), Span.parse(start, "start")
        for name, value in (("start", start), ("every", every)):
            # A grid of the whole run has one update, so 1 must mean an epoch or a step, even as the 1.0 of a command line.
            if value == 1 and (name == "every" or isinstance(value, int)):
                raise ValueError(f"{name}=1 would be the whole run; write '1 epoch', '1 step' or a fraction such as 0.01.")
        self._every = Span.parse(every, "every")
        if self._every.value <= 0 or (self._every.unit != "fraction" and self._every.value != int(self._every.value)):
            raise ValueError(f"every={every!r} must be a positive fraction, or a whole number of epochs or steps.")
        if self._start.unit == self._end.unit and self._start.value > self._end.value:
            raise ValueError(f"start={start!r} is after {end_name}={end!r}; swap them.")
        self.start = self.end = 0.0
        self.done = self.due = 0
        """The numbers of the latest update that is done, and of the latest that was due."""

    def resolve(self, run: RunLength) -> None:
        """Turn spans into fractions of this run.

        Raises:
            ValueError: if the window does not fit into the run.
        """
        if run.epochs is None and run.steps is None:
            raise ValueError("The length of this run is unknown, so there can be no schedule; set max_epochs or max_steps.")
        self.end = self._end.fraction(run, self._end_name)
        self.start = self._start.fraction(run, "start")
        if self.start > self.end:
            raise ValueError(
                f"start='{self._start}' is after {self._end_name}='{self._end}' in a run of {run.epochs} epochs; swap them."
            )
        if run.epochs is None:
            if self.by_epochs:
                raise ValueError(
                    f"every='{self._every}' needs to know the run's length in epochs; set max_epochs, or write a number of "
                    "steps or a fraction of the run."
                )
            return
        if not run.within_epochs and run.steps is None and self.end > 0:
            if run.epochs <= 1:
                raise ValueError(
                    "The data have no length, so there can be no schedule within one epoch; set max_steps or "
                    "limit_train_batches."
                )
            self.start, self.end = (self._epoch_before(fraction, run.epochs, 1) for fraction in (self.start, self.end))
        if self.by_epochs:
            self.start, self.end = (
                self._epoch_before(fraction, run.epochs, self._every.value) for fraction in (self.start, self.end)
            )

    @property
    def by_epochs(self) -> bool:
        """Whether updates are made at the start of epochs, not after steps."""
        return self._every.unit == "epochs"

    def interval(self, run: RunLength) -> float | None:
        """Time between updates as a fraction of the run; None if the run's length in that unit is unknown."""
        length = {"fraction": 1.0, "epochs": run.epochs, "steps": run.steps}[self._every.unit]
        return None if length is None else self._every.value / length

    @staticmethod
    def _epoch_before(fraction: float, epochs: float, every: float) -> float:
        """The latest start of an epoch of the grid, at or before a point of the run; the end itself starts no epoch."""
        latest = min(fraction * epochs, math.ceil(epochs) - 1)
        return int(latest / every + 1e-9) * every / epochs

    def progress(self, position: Position) -> float:
        """The progress through the window: 0 before it, 1 after it."""
        if position.fraction >= self.end - 1e-9:
            return 1.0
        return max(0.0, (position.fraction - self.start) / (self.end - self.start))

    def tick(self, position: Position) -> int:
        """The number of the latest update that is due here; an update is needed if it exceeds the last one done.

        0 before the window, `FINAL` from its end on. A grid of epochs advances only at the start of an epoch.
        """
        if (self.by_epochs and not position.epoch_start) or position.fraction < self.start - 1e-9:
            return 0
        if self.progress(position) >= 1:
            return FINAL
        if self._every.unit == "fraction":
            return int((position.fraction - self.start) / self._every.value + 1e-9) + 1
        return int((position.epoch if self.by_epochs else position.step) // self._every.value) + 1

    # ---- which updates have been made --------------------------------------------------------------------------------

    def is_due(self, position: Position) -> bool:
        """Whether an update is due; it stays due until it is done."""
        self.due = max(self.due, self.tick(position))
        return self.due > self.done

    def finish(self) -> None:
        """Record that everything due is done."""
        self.done = self.due

    def take(self, position: Position) -> bool:
        """Whether an update is due; records it as done."""
        due = self.is_due(position)
        self.finish()
        return due

    def skip(self, position: Position) -> None:
        """Record what is due here as done, except the last update."""
        tick = self.tick(position)
        self.done = self.due = tick if tick < FINAL else 0

    @property
    def is_over(self) -> bool:
        """Whether the last update is done."""
        return self.done == FINAL

    def check(self, run: RunLength, until: float, what: str) -> None:
        """Resolve the window for a run, and refuse a run that has become too short for it.

        Args:
            run: the length that fractions of the run refer to.
            until: fraction of it that is over when this fit ends.
            what: what happens at the end, for the message.
        """
        self.resolve(run)
        if not self.is_over:
            refuse_shorter_run(what, self.end, until)

    def unfinished(self, label: str, reached: float, promised: float) -> str:
        """The message for a training that stopped before the last update."""
        return (
            f"{label} ends at sparsity {reached:.4f}, not {promised}: training stopped before the schedule did. Train on, "
            "or end the schedule earlier."
        )

    def reset(self) -> None:
        """Forget all updates."""
        self.done = self.due = 0

    def state_dict(self) -> dict[str, Any]:
        """The record of updates."""
        return {"done": self.done, "due": self.due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.done, self.due = state["done"], state["due"]

    def to(self, weights: Mapping[str, Tensor]) -> None:
        """Do nothing: numbers are on no device."""
