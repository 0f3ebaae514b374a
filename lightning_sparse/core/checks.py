"""Checks of arguments, with messages that name the given value and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = ["check_choice", "check_number", "check_schedule", "check_sparsity", "check_whole", "refuse_nan"]


def check_choice(name: str, value: Any, choices: Iterable[str], more: str = "") -> None:
    """Refuse a value that is not among the choices.

    Args:
        name: name of the argument.
        value: the given value.
        choices: all valid values.
        more: what else is allowed, such as ` or give a function`.
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose from {known}{more}.")


def check_number(name: str, value: Any) -> None:
    """Refuse anything but a finite number >= 0."""
    if not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number >= 0.")


def check_whole(name: str, value: Any, least: int, more: str = "") -> None:
    """Refuse anything but an integer of at least this size."""
    if not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name}={value!r} must be an integer >= {least}{more}.")


def check_sparsity(name: str, value: Any) -> None:
    """Refuse anything but a fraction below one."""
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} must be a number in [0, 1): the fraction that is removed.")
    value = float(value)
    if not 0 <= value < 1:
        hint = f"; for {value:g}% write {value / 100:g}" if 1 < value <= 100 else ""
        if value in (1, 100):
            raise ValueError(f"{name}={value:g} would remove everything; write 0.99 to keep one of a hundred.")
        raise ValueError(f"{name}={value} must be in [0, 1): the fraction that is removed{hint}.")


def check_schedule(name: str, schedule: Callable[..., Any], start: float, end: float) -> None:
    """Refuse a function that is not a schedule.

    Args:
        name: name of the argument.
        schedule: the given function.
        start: its start value.
        end: its end value.
    """
    label = getattr(schedule, "__name__", type(schedule).__name__)
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        try:
            value = schedule(progress, start, end)
        except TypeError as error:
            raise ValueError(
                f"{name}={label} cannot be called with (progress, start, end), which are three numbers ({error}); give a "
                "function of these."
            ) from error
        try:
            fits = 0 <= float(value) <= 1
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"{name}={label} gives {value!r} at progress {progress:g}; it must return a fraction from 0 to 1."
            )


def refuse_nan(scores: Sequence[Tensor], names: Sequence[str]) -> None:
    """Name the first weight whose score contains NaN.

    Raises:
        ValueError: if there is one.
    """
    for score, name in zip(scores, names, strict=True):
        if bool(score.isnan().any()):
            raise ValueError(
                f"The score of '{name}' contains NaN, so nothing can be ranked; training has diverged: lower the learning "
                "rate or clip gradients."
            ) from None
