"""Connections under LpSphere: they fade, fall and return, toward a sparsity or exactly to it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sparse import LpSphere
from lightning_sparse.functional import exact_count, from_dual, lp_norm
from lightning_sparse.testing import Toy, Watcher, fit, loader, toy, trainer
from tests.helpers.spheres import SPHERES, digits

# ---- connections that fade, fall and return -------------------------------------------------------------------------


def test_what_is_removed_fades_and_lives_on() -> None:
    """Without a gradient of its own, v becomes (1 - eta) v / |u|_q: all removed entries of an output shrink alike."""
    method = LpSphere(p=1.2, sparsity=0.5, initial_sparsity=0.5, start=1.0, end=1.0, mixing=0.1, mixing_schedule="constant")
    module, q = toy(), 1.2 / 0.2
    duals: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not duals:
                duals.append(method.duals["net.6.weight"].clone())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            duals.append(method.duals["net.6.weight"].clone())
            dropped = method.masks.dropped("net.6.weight")
            assert not pl_module.net[6].weight[dropped].any()
            assert not pl_module.net[6].weight.grad[dropped].any()
            assert not method.momenta["net.6.weight"][dropped].any()
            norm = lp_norm(pl_module.net[6].weight.detach(), 1.2)
            assert float(norm.max()) <= 1 + 1e-5

    fit(module, method, Note())
    dropped = method.masks.dropped("net.6.weight")
    for before, after in itertools.pairwise(duals):
        # Every faded entry of a row has shrunk by one and the same factor.
        ratio = (after / before).masked_fill(~dropped, torch.nan)
        low, high = ratio.nan_to_num(9).amin(1), ratio.nan_to_num(-9).amax(1)
        torch.testing.assert_close(low, high, rtol=1e-4, atol=0)
        assert (high >= 0.9 - 1e-4).all(), "(1 - eta) / |u|, and the norm of u is at most 1"
        assert (lp_norm(after, q) - 1).abs().max() < 1e-5
    assert duals[-1][dropped].all(), "they live on"
    assert duals[-1][dropped].abs().mean() < 0.9 * duals[0][dropped].abs().mean(), "and fade"


class Update:
    """What one update was given and what it made."""

    def __init__(self, method: LpSphere, progress: float) -> None:
        self.progress, self.step = progress, method.steps
        self.before = {name: method.masks[name] for name in method.masks}
        self.weights = {name: weight.detach().clone() for name, weight in method.weights.items()}
        self.gradients = {name: gradient.clone() for name, gradient in method._dense.items()}
        self.growth = method.growth

    def close(self, method: LpSphere) -> None:
        self.after = {name: method.masks[name] for name in method.masks}
        self.next_growth, self.sparsity = method.growth, method.masks.sparsity
        self.momenta = {name: value.clone() for name, value in method.momenta.items()}
        self.now = {name: weight.detach().clone() for name, weight in method.weights.items()}
        self.duals = {name: value.clone() for name, value in method.duals.items()}


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """All updates of the runs in a test."""
    seen: list[Update] = []
    for name in ("_steer", "_follow"):
        original = getattr(LpSphere, name)

        def watched(self: LpSphere, progress: float, original: Any = original) -> None:
            seen.append(Update(self, progress))
            original(self, progress)
            seen[-1].close(self)

        monkeypatch.setattr(LpSphere, name, watched)
    return seen


def falls(update: Update, name: str, threshold: float) -> Tensor:
    """The drop rule, unit by unit, with plain numbers."""
    mask, weight = update.before[name].flatten(1), update.weights[name].flatten(1).abs().double()
    out = torch.zeros_like(mask)
    for unit in range(len(mask)):
        active = weight[unit][mask[unit]].tolist()
        mean = sum(active) / len(active) if active else 0.0
        for entry in range(mask.shape[1]):
            out[unit, entry] = bool(mask[unit, entry]) and float(weight[unit, entry]) < threshold * mean
    return out.view_as(update.before[name])


def test_the_published_update(updates: list[Update]) -> None:
    method = LpSphere(p=1.15, sparsity=0.8, start=0.0, end=1.0, every="2 steps", mixing=0.1, drop_threshold=0.6)
    fit(toy(), method)
    assert len(updates) == 7
    assert updates[0].growth == 0.95
    for update in updates:
        threshold = 0.6 * (1 + math.cos(math.pi * update.progress)) / 2
        for name, before in update.before.items():
            fallen = falls(update, name, threshold)
            kept, after = before & ~fallen, update.after[name]
            assert (after | ~kept).all(), "only what is small falls"
            returned = after & ~kept
            count = min(int(int(fallen.sum()) * update.growth), int((~kept).sum()))
            assert int(returned.sum()) == count
            gradient = update.gradients[name].flatten(1).double()
            score = (gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300)).abs().view_as(kept)
            stayed = ~kept & ~returned
            if count and stayed.any():
                assert float(score[returned].min()) >= float(score[stayed].max()) - 1e-6
        s, line = update.sparsity, 0.8 * (1 - threshold / 2)
        assert update.next_growth == pytest.approx((0.9 if s < line else 1.1) * s / 0.8)
    assert any(not update.before[name].equal(update.after[name]) for update in updates for name in update.before)


def test_momentum_and_weights_right_after_an_update(updates: list[Update]) -> None:
    method = LpSphere(p=1.15, sparsity=0.8, start=0.0, end=1.0, every="2 steps", mixing=0.1, drop_threshold=0.6)
    fit(toy(), method)
    returned = 0
    for update, name in itertools.product(updates, SPHERES):
        grown = update.after[name] & ~update.before[name]
        returned += int(grown.sum())
        assert not update.momenta[name][grown | ~update.after[name]].any()
        expected = from_dual(update.duals[name], 1.15)
        assert update.now[name][grown].equal(expected[grown])
        assert not update.now[name][~update.after[name]].any()
        assert (lp_norm(expected, 1.15) - 1).abs().max() < 1e-5
    assert returned > 20
    assert any(update.now[name][update.after[name] & ~update.before[name]].any() for update in updates for name in SPHERES)


def test_nothing_falls_below_a_threshold_of_zero(updates: list[Update]) -> None:
    method = LpSphere(p=1.07, sparsity=0.9, start=0.0, every="1 step", mixing=0.1, drop_threshold=0.0)
    fit(toy(), method)
    assert len(updates) > 5
    assert all(update.before[name].equal(update.after[name]) for update in updates for name in update.before)


def test_an_output_that_has_lost_everything_stays_so(updates: list[Update]) -> None:
    """Where nothing is active the threshold is 0, and 0 >= 0 must not bring the whole output back."""

    class Emptied(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            masks = {name: method.masks[name] for name in method.masks}
            masks["net.6.weight"][3] = False
            method.set_masks(masks)

    method = LpSphere(p=1.2, sparsity=0.5, start=0.1, every="1 step", mixing=0.1)
    method.growth = 0.0
    runner = trainer(method, Emptied(), max_epochs=1)
    module = toy()
    with torch.no_grad():
        module.net[6].bias[3] = -100  # no gradient ever reaches this output, so nothing grows there
    runner.fit(module, loader(), loader(1))
    assert updates
    assert not method.masks["net.6.weight"][3].any()
    assert method.masks["net.6.weight"][2].any()


def test_masks_change_on_the_grid_inside_the_window_only() -> None:
    method = LpSphere(p=1.1, sparsity=0.8, start="4 steps", end="9 steps", every="2 steps", mixing=0.3, drop_threshold=0.8)
    seen: list[Tensor] = []
    fit(toy(), Watcher(lambda m, module: seen.append(method.masks.fingerprint()) if m == "batch end" else None), method)
    changes = [step for step, (a, b) in enumerate(itertools.pairwise(seen), start=2) if not a.equal(b)]
    assert changes == [4, 6, 8]


def test_the_first_masks_have_exact_counts_and_depend_on_the_seed() -> None:
    prints = []
    for seed in (1, 1, 2):
        method = LpSphere(p=1.2, sparsity=0.9, start=1.0, end=1.0, seed=seed)
        fit(toy(), method, max_epochs=1)
        assert all(
            method.masks.numel(n) - kept == math.ceil(0.2 * method.masks.numel(n)) for n, kept in method.masks.counts.items()
        )
        prints.append(method.masks.fingerprint())
    assert prints[0].equal(prints[1])
    assert not prints[0].equal(prints[2])
    less = LpSphere(p=1.2, sparsity=0.05, start=1.0, end=1.0, seed=1)
    fit(toy(), less, max_epochs=1)
    assert less.masks.sparsity <= 0.06


def test_the_feedback_mode_meets_its_schedule_at_every_update(updates: list[Update]) -> None:
    method = LpSphere(p=1.3, sparsity=0.9, mode="feedback", start=0.0, end=0.9, every="2 steps", mixing=0.1)
    fit(toy(), method)
    total = method.masks.total
    for update in updates:
        planned = 0.9 + (0.2 - 0.9) * (1 - update.progress) ** 3
        assert sum(int(mask.sum()) for mask in update.after.values()) == total - exact_count(planned, total)
    assert updates[-1].progress == 1
    assert method.masks.kept == method.goal["total"] == total - exact_count(0.9, total)


@pytest.mark.filterwarnings("ignore:.*has removed all of")  # the first layer has 72 weights
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.21, 0.5, 0.99])
@pytest.mark.parametrize("p", [1.07, 2.0, 6.0])
def test_the_feedback_mode_arrives_at_any_target(sparsity: float, p: float) -> None:
    method = LpSphere(p=p, sparsity=sparsity, mode="feedback")
    fit(toy(), method, max_epochs=1)
    assert method.masks.kept == method.masks.total - exact_count(sparsity, method.masks.total)


def test_a_sparsity_of_all_parameters() -> None:
    module = toy()
    everything = sum(p.numel() for p in module.parameters())
    method = LpSphere(p=1.3, sparsity=0.5, mode="feedback", of_all_parameters=True)
    fit(module, method)
    assert method.masks.total - method.masks.kept == exact_count(0.5, everything)
    assert method.masks.total < everything


def test_two_optimizers_that_never_step_in_the_same_batch() -> None:
    class Alternating(Toy):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            layers = list(self.net.children())
            halves = [[p for layer in part for p in layer.parameters()] for part in (layers[:4], layers[4:])]
            return tuple(torch.optim.SGD(half, lr=0.01) for half in halves)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    method = LpSphere(p=1.3, sparsity=0.8, mode="feedback", every="1 step", start=0.0)
    fit(Alternating(), method)
    assert method.masks.kept == method.goal["total"]


def test_it_is_told_in_the_log() -> None:
    runner = fit(toy(), LpSphere(p=1.2, sparsity=0.5))
    assert 0 < float(runner.logged_metrics["LpSphere/mixing"]) < 1
    assert float(runner.logged_metrics["LpSphere/growth"]) > 0
    assert float(runner.progress_bar_metrics["sparsity"]) > 0


# ---- in training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "sparsity"), [(1.07, 0.9), (1.15, 0.8)])
def test_the_published_controller_arrives_where_p_fits_the_sparsity(p: float, sparsity: float) -> None:
    method = LpSphere(p=p, sparsity=sparsity, mixing=2 / 50)
    digits(12, method)
    assert abs(method.masks.sparsity - sparsity) <= 0.03


def test_and_falls_short_where_p_does_not() -> None:
    official, feedback = (LpSphere(p=2.0, sparsity=0.8, mixing=2 / 50, mode=mode) for mode in ("official", "feedback"))
    digits(6, official)
    digits(6, feedback)
    assert official.masks.sparsity < 0.7
    assert feedback.masks.kept == feedback.masks.total - exact_count(0.8, feedback.masks.total)
