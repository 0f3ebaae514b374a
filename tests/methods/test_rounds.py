"""Rounds of a run: where they begin, what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sparse.core import Position, RunLength
from lightning_sparse.methods.lottery_ticket.rounds import Rounds

RUN = RunLength(epochs=10.0, steps=40)


def beginnings(rounds: Rounds, run: RunLength = RUN) -> list[int]:
    """After how many steps each round is due, walking through the run."""
    rounds.resolve(run)
    steps = run.steps or 40
    due = [rounds.due(Position(step / steps, 0, step)) for step in range(steps)]
    assert due == sorted(due)
    return [due.index(number) for number in range(1, rounds.count + 1) if number in due]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, None, 0), [20]),
        ((3, None, 0), [10, 20, 30]),
        ((2, None, 0.1), [16, 28]),
        ((2, None, "1 step"), [14, 27]),
        ((2, None, "2 epochs"), [19, 30]),
        ((2, "2 epochs", 0), [8, 16]),
        ((2, "10 steps", "5 steps"), [15, 25]),
        ((39, None, 0), list(range(1, 40))),
        ((6, None, 0), [6, 12, 18, 23, 29, 35]),
    ],
)
def test_where_rounds_begin(arguments: tuple[Any, ...], expected: list[int]) -> None:
    assert beginnings(Rounds(*arguments)) == expected


def test_the_point_to_return_to() -> None:
    rounds = Rounds(2, None, "4 steps")
    rounds.resolve(RUN)
    at = [Position(step / 40, 0, step) for step in range(6)]
    assert [rounds.reached_start(position) for position in at] == [False] * 4 + [True] * 2
    assert [rounds.passed_start(position) for position in at] == [False] * 5 + [True]
    assert rounds.end == pytest.approx(28 / 40)


REFUSED: list[tuple[tuple[Any, ...], RunLength, str]] = [
    ((40, None, 0), RUN, "rounds=40 leave less than one of the run's 40 steps to each training; use fewer"),
    ((10, None, 0), RunLength(10.0, None, within_epochs=False), "less than one of the run's 10 epochs"),
    (
        (2, "4 epochs", 0),
        RUN,
        "rounds=2 need 3 trainings of every='4 epochs', but from rewind_to='0' on the run has room for 2",
    ),
    ((1, None, "40 steps"), RUN, "rewind_to='40 steps' is the end of training, so nothing rewinds to it; choose"),
    ((1, None, 1.0), RUN, "rewind_to='1' is the end of training"),
    ((1, None, "41 steps"), RUN, "rewind_to='41 steps' is after the end of training (40 steps)"),
    ((1, None, "3 steps"), RunLength(10.0, None), "rewind_to='3 steps' needs to know the run's length in steps"),
    ((1, None, 0), RunLength(None, None), "The length of this run is unknown, so rounds cannot be scheduled"),
]


@pytest.mark.parametrize(("arguments", "run", "sentence"), REFUSED, ids=[row[-1][:40] for row in REFUSED])
def test_what_does_not_fit(arguments: tuple[Any, ...], run: RunLength, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        Rounds(*arguments).resolve(run)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, None, 0), "rounds=0 must be an integer >= 1: the number of pruning rounds"),
        ((1.5, None, 0), "rounds=1.5 must be an integer >= 1: the number"),
        ((1, 0.0, 0), "every=0.0 must be longer than zero"),
        ((1, None, 500), "rewind_to=500 is not a span of time; write a fraction of the run from 0 to 1, '500 epochs'"),
        ((1, "often", 0), "every='often' is not a span of time"),
    ],
)
def test_what_cannot_be_read(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        Rounds(*arguments)
    assert sentence in str(error.value)
