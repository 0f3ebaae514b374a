"""Movement pruning is a loop written from the paper, with scores of removed weights that move on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sparse import MovementPruning
from lightning_sparse.functional import MOVEMENT_SCORES
from lightning_sparse.testing import BATCHES, EPOCHS, Toy, fit, loader, network, toy
from tests.helpers.steps import SkippedSteps

STEPS = EPOCHS * BATCHES
RATE = 0.05


class Plain(Toy):
    """Steps that are easy to write by hand, in float64, without dropout."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(net=network(dropout=0))
        self.double()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def by_hand(
    score: str, sparsity: float, start: int, end: int, counts: list[dict[str, int]]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The masks after every step, by the straight-through estimator of the paper: dense weights, of which the best show.

    Shares of layers add up to that of all, so a layer may keep one weight more or less than it would alone: see `counts`.
    """
    module = Plain()
    dense = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in dense.items() if weight.ndim > 1}
    history = []
    data, step = loader(), 0
    for epoch in range(EPOCHS):
        data.set_epoch(epoch)
        for batch in data:
            for name, weight in module.named_parameters():
                weight.data = dense[name] * masks[name]
                weight.grad = None
            module.loss(batch).backward()
            step += 1
            for name, weight in module.named_parameters():
                gradient = weight.grad
                assert gradient is not None
                if name in sums and step <= end:
                    w = dense[name]
                    sums[name] += {"movement": -w * gradient, "taylor": (w * gradient) ** 2, "fisher": gradient**2}[score]
                dense[name] -= RATE * gradient * masks[name]
            if start <= step <= end:
                progress = (step - start) / (end - start)
                asked = sparsity + (0 - sparsity) * (1 - progress) ** 3
                for name, total in sums.items():
                    value = total if score != "fisher" else dense[name] ** 2 * total / 2
                    keep = counts[step - 1][name]
                    assert abs(keep - (1 - asked) * value.numel()) <= 1
                    best = value.flatten().sort(descending=True, stable=True).indices[:keep]
                    masks[name] = torch.zeros(value.numel(), dtype=torch.bool).index_fill(0, best, True).view_as(value)
            history.append({name: masks[name] for name in sums})
    return {name: weight * masks[name] for name, weight in dense.items()}, history


class Diary(L.Callback):
    def __init__(self, method: MovementPruning) -> None:
        self.method, self.masks = method, []

    def on_train_batch_end(self, *args: Any) -> None:
        self.masks.append({name: self.method.masks[name] for name in self.method.masks})


@pytest.mark.parametrize("score", MOVEMENT_SCORES)
def test_equals_a_loop_written_from_the_paper(score: Any) -> None:
    method = MovementPruning(0.5, score=score, start="2 steps", end="10 steps", every="1 step")
    diary, module = Diary(method), Plain()
    fit(module, method, diary)
    counts = [{name: int(mask.count_nonzero()) for name, mask in masks.items()} for masks in diary.masks]
    expected, history = by_hand(score, 0.5, 2, 10, counts)
    for step, (got, masks) in enumerate(zip(diary.masks, history, strict=True), start=1):
        assert all(got[name].equal(mask) for name, mask in masks.items()), step
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-9)


def test_what_was_removed_comes_back_with_its_own_value() -> None:
    method = MovementPruning(0.6, start=0, end=1.0, every="1 step")
    diary = Diary(method)
    fit(toy(), method, diary)
    pairs = zip(diary.masks, diary.masks[1:], strict=False)
    returned = sum(int((new[name] & ~old[name]).sum()) for old, new in pairs for name in new)
    assert returned > 0
    assert method.masks.kept == 2760 - 1656


def test_masks_stay_after_the_end() -> None:
    method = MovementPruning(0.5, start=0, end=0.5, every="1 step")
    diary = Diary(method)
    fit(toy(), method, diary)
    assert all(found[name].equal(diary.masks[-1][name]) for found in diary.masks[STEPS // 2 :] for name in found)
    assert not diary.masks[2]["net.6.weight"].equal(diary.masks[-1]["net.6.weight"])


def test_all_at_once_waits_for_a_first_step() -> None:
    """Before it, all scores are zero, and the first entries would win."""
    method = MovementPruning(0.5, start=0, end=0, schedule="constant")
    diary = Diary(method)
    fit(toy(), method, diary, max_epochs=1)
    mask = diary.masks[0]["net.6.weight"].flatten()
    assert mask.count_nonzero() == 1024
    assert mask[:1024].float().mean() < 0.8  # where nothing arrives, scores are zero still


@pytest.mark.parametrize(("options", "epochs"), [({}, 1), ({"start": 0.0, "end": 0.0}, 3)])
def test_so_does_the_first_of_a_grid_of_epochs(options: Any, epochs: int) -> None:
    method, seen = MovementPruning(0.9, every="1 epoch", **options), []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(round(method.masks.sparsity, 2))

    fit(Plain(), method, Note(), max_epochs=epochs)
    assert seen == [0.9] * BATCHES * epochs


def test_a_skipped_step_adds_nothing() -> None:
    method = MovementPruning(0.5, end=1.0)
    sums: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            sums.append(method.sums["net.6.weight"].clone())

    fit(toy(), method, Note(), plugins=[SkippedSteps({2})], max_epochs=1)
    assert [one.equal(other) for one, other in pairwise(sums)] == [False, True, False]
