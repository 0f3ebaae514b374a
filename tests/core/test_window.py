import pytest

from lightning_sparse.core import FINAL, Position, RunLength, Span, Window

RUN = RunLength(epochs=10, steps=1000)


def after_step(step: int, run: RunLength = RUN) -> Position:
    assert run.steps is not None
    return Position(step / run.steps, step // 100, step)


def before_epoch(epoch: int) -> Position:
    return Position(epoch / 10, epoch, epoch * 100, epoch_start=True)


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        (0, 0),
        (1, 1),
        (0.25, 0.25),
        ("0.5", 0.5),
        ("3 epochs", 0.3),
        ("1 epoch", 0.1),
        ("250 steps", 0.25),
        ("2.5 epochs", 0.25),
        (1e-5, 1e-5),
    ],
)
def test_spans(text: float | str, fraction: float) -> None:
    assert Span.parse(text).fraction(RUN) == fraction


@pytest.mark.parametrize("text", [1.5, 30, -0.1, "ten epochs", "5 days", "", "nan"])
def test_no_spans(text: float | str) -> None:
    with pytest.raises(ValueError, match=r"end=.* is not a span of time; write a fraction"):
        Span.parse(text, "end")


def test_an_integer_hints_at_its_units() -> None:
    with pytest.raises(ValueError, match=r"'30 epochs' or '30 steps'"):
        Span.parse(30)


def test_fractional_grid_updates_once_per_point_and_ends() -> None:
    window = Window(0.2, 0.8, 0.1)
    window.resolve(RUN)
    done, ticks = 0, []
    for step in range(1, 1001):
        tick = window.tick(after_step(step))
        if tick > done:
            done = tick
            ticks.append(step)
    assert ticks == [200, 300, 400, 500, 600, 700, 800]
    assert done == FINAL


def test_steps_are_multiples() -> None:
    window = Window(0, 1, "250 steps")
    window.resolve(RUN)
    assert [step for step in range(1, 1001) if window.tick(after_step(step)) > window.tick(after_step(step - 1))] == [
        250,
        500,
        750,
        1000,
    ]


def test_epochs_update_before_epochs_only() -> None:
    window = Window(0.2, 0.75, "2 epochs")
    window.resolve(RUN)
    assert all(window.tick(after_step(step)) == 0 for step in range(1001))
    done, updates = 0, []
    for epoch in range(10):
        tick = window.tick(before_epoch(epoch))
        if tick > done:
            done = tick
            updates.append(epoch)
    assert updates == [2, 4, 6]
    assert done == FINAL


@pytest.mark.parametrize(
    ("start", "end", "every", "epochs", "expected"),
    [
        (0, 1, 1, 10, (0, 9)),
        (0.2, 0.8, 1, 3, (0, 2)),
        (0.5, 0.5, 1, 3, (1, 1)),
        (0.2, 0.8, 1, 1, (0, 0)),
        (0.3, 1, 4, 10, (0, 8)),
    ],
)
def test_windows_snap_to_epochs(start: float, end: float, every: int, epochs: int, expected: tuple[int, int]) -> None:
    window = Window(start, end, f"{every} epochs")
    window.resolve(RunLength(epochs, None))
    assert (window.start * epochs, window.end * epochs) == pytest.approx(expected)


def test_where_epochs_are_all_that_is_known() -> None:
    window = Window(0.2, 0.8, 0.01)
    window.resolve(RunLength(4, None, within_epochs=False))
    assert (window.start, window.end) == (0, 0.75)
    with pytest.raises(ValueError, match="data have no length.* set max_steps or limit_train_batches"):
        window.resolve(RunLength(1, None, within_epochs=False))


def test_progress() -> None:
    window = Window("2 epochs", "800 steps", 0.01)
    window.resolve(RUN)
    assert [window.progress(after_step(s)) for s in (0, 199, 500, 800, 1000)] == pytest.approx([0, 0, 0.5, 1, 1])
    one_shot = Window(0.5, 0.5, 0.01)
    one_shot.resolve(RUN)
    assert [one_shot.tick(after_step(s)) for s in (499, 500)] == [0, FINAL]


@pytest.mark.parametrize(
    ("window", "run", "sentence"),
    [
        ((0, "30 epochs", 0.1), RUN, "end='30 epochs' is after the end of training (10 epochs)"),
        (("2000 steps", 1, 0.1), RUN, "start='2000 steps' is after the end of training"),
        (("9 epochs", 0.5, 0.1), RUN, "start='9 epochs' is after end='0.5'"),
        ((0, "100 steps", 0.1), RunLength(10, None), "needs to know the run's length in steps"),
        (
            (0, 1.0, "2 epochs"),
            RunLength(None, 100),
            "every='2 epochs' needs to know the run's length in epochs; set max_epochs",
        ),
    ],
)
def test_windows_that_do_not_fit(window: tuple[object, ...], run: RunLength, sentence: str) -> None:
    with pytest.raises(ValueError, match="end|start|every") as error:
        Window(*window).resolve(run)  # type: ignore[arg-type]
    assert sentence in str(error.value)


@pytest.mark.parametrize(("every", "expected"), [("2 epochs", 0.2), ("5 steps", 0.005), (0.01, 0.01)])
def test_the_interval_as_a_fraction(every: float | str, expected: float) -> None:
    assert Window(0, 1, every).interval(RUN) == pytest.approx(expected)
    assert Window(0, 1, "5 steps").interval(RunLength(3, None)) is None
