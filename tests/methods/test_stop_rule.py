"""The stop rule against golden traces, and against the rule written down as the official code runs it."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_sparse.methods.hypersparse.stop_rule import Attempt, StopRule


def attempt(epoch: int, score: float) -> Attempt:
    return Attempt(epoch, score, {"w": torch.tensor([score])}, {})


def trace(rule: StopRule, dense: list[float], pruned: list[float]) -> list[tuple[str | None, int, float, float]]:
    seen = []
    for epoch, (d, p) in enumerate(zip(dense, pruned, strict=True), 1):
        reason = rule.add(attempt(epoch, p), d)
        assert rule.best is not None
        seen.append((reason, rule.best.epoch, rule.best.score, round(rule.mean, 2)))
        if reason:
            break
    return seen


def test_it_stops_when_the_dense_model_sinks_below_an_old_best() -> None:
    seen = trace(StopRule(), [92, 91, 90, 80, 70, 60, 50], [50, 56, 53, 20, 20, 20, 20])
    assert seen == [(None, 1, 50, 50), *[(None, 2, 56, 53)] * 5, ("stale", 2, 56, 53)]


def test_a_mean_is_compared_with_a_single_score() -> None:
    seen = trace(StopRule(), list(range(90, 80, -1)), [10, 20, 12, 60, 40, 75, 90, 70, 86, 88])
    bests = [(1, 10, 10), (2, 20, 15), (2, 20, 15), (3, 12, 30.67), (4, 60, 37.33), (4, 60, 37.33)]
    bests += [(6, 75, 68.33), (7, 90, 78.33), (7, 90, 78.33), (7, 90, 78.33)]
    assert seen == [(None, *best) for best in bests]


def test_it_stops_fresh_with_the_attempt_of_the_epoch_before() -> None:
    seen = trace(StopRule(), [99, 99, 92], [89, 92, 97])
    assert seen == [(None, 1, 89, 89), (None, 2, 92, 90.5), ("fresh", 2, 92, 92.67)]


def test_equal_is_not_caught_up() -> None:
    assert trace(StopRule(), [90, 90, 90], [90, 90, 90]) == [(None, 1, 90, 90)] * 3


@pytest.mark.parametrize("radius", [1, 2, 10])
def test_against_the_rule_as_it_is_written_down(radius: int) -> None:
    generator = torch.Generator().manual_seed(radius)
    dense = (80 + 10 * torch.rand(120, generator=generator)).tolist()
    pruned = (torch.arange(120) * 1.5 + 20 * torch.rand(120, generator=generator)).tolist()
    queue: list[tuple[int, float]] = []
    middle, mean, epoch = 0.0, 0.0, 0
    expected = []
    for now in range(120):
        queue.append((now + 1, pruned[now]))
        if len(queue) > 2 * radius + 1:
            queue.pop(0)
        average = sum(score for _, score in queue) / len(queue)
        if average > middle:
            epoch, middle = queue[min(len(queue) - 1, radius)]
            mean = average
        expected.append((epoch, middle, round(mean, 2)))
        if mean > dense[now]:
            break
    seen = trace(StopRule(radius), dense, pruned)
    assert [entry[1:] for entry in seen] == expected
    assert seen[-1][0] is not None


def test_it_goes_on_after_a_checkpoint() -> None:
    dense, pruned = [92.0, 91, 90, 80, 70, 60, 50], [50.0, 56, 53, 20, 20, 20, 20]
    expected = trace(StopRule(), dense, pruned)
    for stop in range(7):
        rule, again = StopRule(), StopRule()
        for epoch in range(stop):
            rule.add(attempt(epoch + 1, pruned[epoch]), dense[epoch])
        again.load_state_dict(rule.state_dict())
        rest = [again.add(attempt(epoch + 1, pruned[epoch]), dense[epoch]) for epoch in range(stop, 7)]
        assert rest == [reason for reason, *_ in expected[stop:]]
        assert again.best is not None
        assert again.best.state["w"].item() == 56


def test_a_best_attempt_inside_the_window_is_saved_once() -> None:
    rule = StopRule()
    for epoch, score in itertools.islice(enumerate([50.0, 56, 53]), 3):
        rule.add(attempt(epoch, score), 100)
    assert len(rule.state_dict()["attempts"]) == 3
    rule.add(attempt(3, 20), 100)
    rule.add(attempt(4, 20), 100)
    assert len(rule.state_dict()["attempts"]) == 4
