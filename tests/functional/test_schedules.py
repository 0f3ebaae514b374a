import itertools

import pytest

from lightning_sparse.functional import SCHEDULES, cosine, cubic, exponential, linear


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.9), (0.5, 0.95), (0.0, 0.995)])
def test_schedules_rise_to_exactly_the_end(name: str, start: float, end: float) -> None:
    schedule = SCHEDULES[name]
    values = [schedule(i / 50, start, end) for i in range(51)]
    assert values[-1] == end
    assert all(a <= b for a, b in itertools.pairwise(values))
    if name != "constant":
        assert values[0] == pytest.approx(start)


def test_cubic_golden_values() -> None:
    """Gradual pruning of GraNet from 0.5 to 0.95 in 28 updates."""
    values = {i: round(cubic(i / 28, 0.5, 0.95), 6) for i in (1, 7, 14)}
    assert values == {1: 0.546513, 7: 0.760156, 14: 0.89375}


def test_middle_of_the_others() -> None:
    assert linear(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert cosine(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert cosine(0.25, 0.0, 1.0) == pytest.approx(0.1464466)
    assert 1 - exponential(0.5, 0.0, 0.99) == pytest.approx(0.1)  # ten times fewer, and ten times fewer again
