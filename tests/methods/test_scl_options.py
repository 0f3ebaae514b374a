"""Options of sparse connectivity learning: freezing, warming up, targets, minima."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sparse import SparseConnectivityLearning as SCL
from lightning_sparse.functional import exact_count, steer_price
from lightning_sparse.testing import BATCHES, differences, fit, state_of, toy


class Diary(L.Callback):
    """Masks, price and weights after every step."""

    def __init__(self, method: SCL) -> None:
        self.method = method
        self.masks: list[Tensor] = []
        self.costs: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.masks.append(torch.cat([self.method.mask_set[name].flatten() for name in self.method.mask_set]))
        self.weights.append(torch.cat([w.detach().flatten() for w in self.method.weights.values()]))
        self.costs.append(self.method.cost)

    @property
    def changed(self) -> list[bool]:
        return [not a.equal(b) for a, b in itertools.pairwise(self.masks)]


@pytest.mark.parametrize("freeze", ["2 epochs", 2 / 3, "8 steps"])
def test_frozen_masks_stay_and_weights_train_on(freeze: Any) -> None:
    method = SCL(price=0.2, end=freeze)
    diary = Diary(method)
    fit(toy(), method, diary)
    assert diary.changed[:7][-1]
    assert diary.changed[7:] == [False] * 4
    assert not diary.weights[-1].equal(diary.weights[7])
    assert (diary.weights[-1] != 0).equal(diary.masks[-1])


def test_the_price_warms_up() -> None:
    method = SCL(price=0.6, warmup=0.5, end=1.0)
    diary = Diary(method)
    used: list[float] = []

    class Used(L.Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            used.append(method.cost)

    fit(toy(), method, diary, Used())
    assert used == pytest.approx([0.6 * min(1.0, step / 6) for step in range(12)])
    assert diary.costs[-1] == 0.6


@pytest.mark.parametrize("mask_lr", [0.01, 0.0003])  # the second is too slow to come near
@pytest.mark.parametrize(("sparsity", "min_kept"), [(0.3, 0), (0.5, 2), (0.9, 2), (0.97, 20)])
def test_a_target_is_met_exactly_and_stays(sparsity: float, min_kept: int, mask_lr: float) -> None:
    method = SCL(sparsity=sparsity, min_kept=min_kept, learning_rate=mask_lr)
    diary = Diary(method)
    module = toy()
    fit(module, method, diary, max_epochs=8)
    total = method.mask_set.total
    kept = [int(mask.count_nonzero()) for mask in diary.masks]
    assert kept[-9:] == [total - exact_count(sparsity, total)] * 9
    assert method.goal["total"] == kept[-1]
    assert len(set(diary.costs)) > 2
    assert diary.changed[-8:] == [False] * 8
    assert all(count >= min_kept for count in method.mask_set.counts.values())


def test_the_controller_has_nearly_arrived_when_masks_are_settled() -> None:
    method = SCL(sparsity=0.8)
    diary = Diary(method)
    fit(toy("sgd"), method, diary, max_epochs=40)
    settled = int(0.75 * 40 * BATCHES)
    density = float(diary.masks[settled - 2].float().mean())
    assert density == pytest.approx(0.2, rel=0.25)
    assert diary.costs[settled - 2] != pytest.approx(0.01)


def test_the_controller_acts_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{SCL.__module__}.STEERING", 0.125)
    elapsed: list[float] = []

    def steer(memory: float, error: float, time: float) -> tuple[float, float]:
        elapsed.append(time)
        return steer_price(memory, error, time)

    monkeypatch.setattr(f"{SCL.__module__}.steer_price", steer)
    method = SCL(sparsity=0.8)
    diary = Diary(method)
    fit(toy(), method, diary, max_epochs=8)
    acted = [step for step in range(1, 32) if diary.costs[step] != diary.costs[step - 1]]
    assert set(acted) <= {3, 7, 11, 15, 19}  # at 23 masks are settled
    assert len(acted) > 2
    assert elapsed[0] <= 1 / 24  # at the first step
    assert sum(elapsed) == pytest.approx(20 / 24)  # of the time until masks are settled
    assert elapsed[2:] == pytest.approx([1 / 6] * (len(elapsed) - 2))


def test_a_price_beside_a_target_is_where_the_controller_starts() -> None:
    method = SCL(price=0.003, sparsity=0.8)
    costs: list[float] = []

    class Note(L.Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            costs.append(method.cost)

    fit(toy(), method, Note(), max_epochs=20)
    assert costs[0] == pytest.approx(0.003)
    assert max(costs) > 0.01


def test_those_with_the_highest_variables_settle() -> None:
    method = SCL(sparsity=0.6)
    settle, seen = method._settle, []

    def note(budget: Any) -> None:
        seen.append(torch.cat([variable.flatten() for variable in method.variables.values()]))
        settle(budget)

    method._settle = note  # type: ignore[method-assign]
    fit(toy(), method)
    kept = torch.cat([method.mask_set[name].flatten() for name in method.mask_set])
    assert seen[0][kept].min() >= seen[0][~kept].max()
    assert not kept.equal(seen[0] > 0)


def test_training_that_stops_before_the_masks_are_frozen() -> None:
    method = SCL(sparsity=0.9)
    with pytest.warns(UserWarning, match=r"ends at sparsity 0\.\d+, not 0\.9: training stopped before the masks were fixed"):
        fit(toy(), method, StopAt(5))
    assert not method.frozen


def test_a_run_that_became_too_short_for_its_target(tmp_path: Any) -> None:
    files = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(toy(), SCL(sparsity=0.9, min_kept=1), files, max_epochs=10)
    with pytest.raises(ValueError, match=r"fixes its masks at 75% of the run .* but training now ends at 30% of that"):
        fit(toy(), SCL(sparsity=0.9, min_kept=1), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=3)


class StopAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize(
    "make",
    [
        lambda: SCL(price=0.2, warmup=0.5, end=0.75, min_kept=5, proxy="leaky_relu"),
        lambda: SCL(price=0.02, norm="l2", feature="layer", warmup="5 steps", proxy="softplus", learning_rate=0.1, end=1.0),
        lambda: SCL(sparsity=0.7, end="2 epochs", min_kept=3),
    ],
    ids=["price", "layer", "target"],
)
def test_resume_is_exact_with_every_option(make: Callable[[], SCL], tmp_path: Any) -> None:
    first, module = make(), toy("adamw")
    runner = fit(module, first, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    expected = state_of(module, runner, first)
    for step in (2, 5, 8, 10):
        torch.manual_seed(step)
        again, other = make(), toy("adamw", seed=step)
        resumed = fit(other, again, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert differences(expected, state_of(other, resumed, again)) == []


# ---- layers that are gone, or kept ----------------------------------------------------------------------------------


def test_a_layer_without_connections_is_named_once(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    method = SCL(price=5.0, end=1.0)
    fit(toy(), method, log_every_n_steps=1)
    said = [str(warning.message) for warning in recwarn if "has removed all of" in str(warning.message)]
    assert method.mask_set.kept == 0
    assert sorted(line.split("'")[1] for line in said) == sorted(method.mask_set)
    assert all("Lower the price, or set min_kept" in line for line in said)


def test_a_minimum_of_connections_is_kept_everywhere_at_all_times() -> None:
    method = SCL(price=5.0, min_kept=7, end=1.0)
    least: list[int] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            least.append(min(method.mask_set.counts.values()))

    module = toy()
    fit(module, method, Note())
    assert least[-1] == 7
    assert min(least) == 7
    assert method.mask_set.counts == dict.fromkeys(method.mask_set, 7)


def test_the_ends_can_be_exempt() -> None:
    module, method = toy(), SCL(price=0.3, targets=["!:first", "!:last"], end=1.0)
    fit(module, method)
    assert list(method.variables) == ["net.2.weight", "net.6.weight"]
    assert module.net[0].weight.all()
    assert module.net[8].weight.all()
    assert not module.net[6].weight.all()
