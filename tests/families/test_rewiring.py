"""SET, RigL and GraNet against a training loop written out by hand, and what their papers promise."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sparse import SET, GraNet, RandomSparsity, RigL
from lightning_sparse.core import Layout, Part, Target
from lightning_sparse.families import Rewiring
from lightning_sparse.functional import hashed_score, over_parameterization_rate, random_generator
from lightning_sparse.testing import BATCHES, Toy, fit, loader, toy
from tests.helpers.modules import double
from tests.helpers.oracles import slow_regrow
from tests.helpers.rewiring import METHODS, STEPS, Diary

# ---- one layer after the other ---------------------------------------------------------------------------------------


def test_a_gradient_is_let_go_when_its_layer_is_rewired() -> None:
    left = []

    class Watched(RigL):
        def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
            left.append((len(self.gradients), len(self.chosen)))
            return super().grow_score(name, weight, gradient)

    fit(toy(), Watched(0.5, every="3 steps"))
    layers = left[0][1]
    assert layers > 2
    assert [number for number, _ in left[:layers]] == [*range(layers - 1, -1, -1)]


# ---- the whole training, by hand ------------------------------------------------------------------------------------


class ByHand:
    """Momentum SGD of the toy under masks, in plain loops; subclasses say what happens at an update."""

    updates: tuple[int, ...] = (3, 6)

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self.module = double(Toy)
        self.weights = dict(self.module.named_parameters())
        self.masks = {name: mask.clone() for name, mask in masks.items()}
        self.momenta = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.restarted = 0
        self.project()

    def project(self) -> None:
        for name, mask in self.masks.items():
            self.weights[name].data *= mask
            self.momenta[name] *= mask

    def run(self) -> None:
        data, number = loader(), 0
        for epoch in range(3):
            data.set_epoch(epoch)
            for batch in data:
                number += 1
                loss = self.module.loss(batch)
                gradients = dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))
                self.step(number, gradients)

    def move(self, gradients: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            gradient = gradients[name] * self.masks[name] if name in self.masks else gradients[name]
            self.momenta[name] = 0.9 * self.momenta[name] + gradient + 1e-3 * weight.data
            weight.data -= 0.05 * self.momenta[name]
        self.project()

    def rewire(self, fraction: float, grow: dict[str, Tensor]) -> None:
        for name, mask in self.masks.items():
            count = math.floor(fraction * int(mask.sum()))
            self.masks[name] = slow_regrow(mask, self.weights[name].data.abs(), grow[name], count)
            for tensor in (self.weights[name].data, self.momenta[name]):
                tensor[self.masks[name] & ~mask] = 0
        self.project()

    def step(self, number: int, gradients: dict[str, Tensor]) -> None:
        self.move(gradients)


class SETByHand(ByHand):
    def step(self, number: int, gradients: dict[str, Tensor]) -> None:
        self.move(gradients)
        if number in self.updates:
            fraction = 0.15 * (1 + math.cos(math.pi * number / 9))
            draw = self.updates.index(number) + 1
            grow = {name: hashed_score(mask, random_generator(5, draw, name)) for name, mask in self.masks.items()}
            self.rewire(fraction, grow)


class RigLByHand(ByHand):
    def step(self, number: int, gradients: dict[str, Tensor]) -> None:
        if number in self.updates:
            fraction = 0.15 * (1 + math.cos(math.pi * number / 9))
            self.rewire(fraction, {name: self.score(gradient) for name, gradient in gradients.items()})
        else:
            self.move(gradients)

    def score(self, gradient: Tensor) -> Tensor:
        return gradient.abs()


class RigLPerOutputByHand(RigLByHand):
    def score(self, gradient: Tensor) -> Tensor:
        lengths = [math.sqrt(sum(float(entry) ** 2 for entry in row.flatten())) for row in gradient]
        return torch.stack([row.abs() / (length or 1) for row, length in zip(gradient, lengths, strict=True)])


class GraNetByHand(ByHand):
    updates = (2, 4, 6, 8, 10)

    def step(self, number: int, gradients: dict[str, Tensor]) -> None:
        self.move(gradients)
        if number in self.updates:
            cut = self.prune(0.9 + (0.5 - 0.9) * (1 - min(number / 6, 1)) ** 3)
            fraction = 0.005 + 0.495 * (1 + math.cos(math.pi * number / 12)) / 2
            self.rewire(fraction, {name: gradient.abs() for name, gradient in gradients.items()})
            for name, mask in self.masks.items():
                self.restarted += int((mask & cut[name]).sum())

    def prune(self, sparsity: float) -> dict[str, Tensor]:
        total = sum(mask.numel() for mask in self.masks.values())
        alive = [
            (float(self.weights[name].data.flatten()[i].abs()), name, i)
            for name, mask in self.masks.items()
            for i in mask.flatten().nonzero().flatten().tolist()
        ]
        alive.sort(reverse=True)
        cut = {name: torch.zeros_like(mask) for name, mask in self.masks.items()}
        for _, name, i in alive[total - round(sparsity * total) :]:
            self.masks[name].view(-1)[i] = False
            cut[name].view(-1)[i] = True
        self.project()
        return cut


CASES: dict[str, tuple[type[ByHand], dict[str, Any]]] = {
    "SET": (SETByHand, {"every": "3 steps"}),
    "RigL": (RigLByHand, {"every": "3 steps"}),
    "RigL, growth per output": (RigLPerOutputByHand, {"every": "3 steps", "growth_per_output": True}),
    "GraNet": (GraNetByHand, {"every": "2 steps"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_equals_the_loop_written_by_hand(case: str) -> None:
    cls, options = CASES[case]
    method = METHODS[case.partition(",")[0]](0.9, seed=5, **options)
    module = double(Toy)
    diary = Diary(method)
    fit(module, method, diary)
    hand = cls(diary.first)
    hand.run()
    assert diary.changes() == list(cls.updates)
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight, hand.weights[name], rtol=1e-9, atol=1e-12, msg=name)
    for name, mask in hand.masks.items():
        assert method.masks[name].equal(mask)
    assert case != "GraNet" or hand.restarted > 0, "nothing that was pruned came back, so that case is not compared"


# ---- counts, times, states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "per_output", "fits"), [((1,), True, False), ((1,), False, True), ((0,), True, True)])
def test_growth_per_output_needs_all_inputs_of_an_output(cut: tuple[int, ...], per_output: bool, fits: bool) -> None:
    size = (1, 4) if cut == (0,) else (2, 2)
    part = Part.make(torch.ones(size), torch.nn.Parameter(torch.ones(2, 4)), Layout((2, 4), (0, 0), size, cut))
    why = RigL(0.5, growth_per_output=per_output).misfit(Target("weight", part))
    assert why is None if fits else "growth_per_output needs all inputs of an output on one rank" in str(why)


@pytest.mark.parametrize("cls", [SET, RigL])
@pytest.mark.parametrize("allocation", ["erk", "uniform", "global"])
def test_every_layer_keeps_its_number(cls: type[Rewiring], allocation: str) -> None:
    method = cls(0.8, every="2 steps", allocation=allocation)
    diary = Diary(method)
    fit(toy("adamw"), method, diary)
    assert len(diary.changes()) >= 3
    for masks in diary.masks:
        assert {name: int(mask.count_nonzero()) for name, mask in masks.items()} == method.masks.counts
    assert method.masks.kept == 552


def test_a_density_of_each_layers_own() -> None:
    method = RigL(0.8, layer_sparsity={"net.0": 0.0, "net.6": 0.9}, every="2 steps")
    fit(toy(), method)
    assert (method.masks.counts["net.0.weight"], method.masks.counts["net.6.weight"]) == (72, 205)
    assert method.masks.kept == 552


def test_the_first_mask_is_that_of_random_sparsity() -> None:
    diaries = [Diary(method) for method in (RandomSparsity(0.8, seed=3), RigL(0.8, seed=3), SET(0.8, seed=3))]
    for diary in diaries:
        fit(toy(), diary.method, diary)
    for name, mask in diaries[0].first.items():
        assert diaries[1].first[name].equal(mask)
        assert diaries[2].first[name].equal(mask)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": "3 steps", "end": 1.0}, [3, 6, 9]),
        ({"every": "3 steps"}, [3, 6]),
        ({"every": "3 steps", "end": "6 steps"}, [3]),
        ({"every": 0.25, "end": 1.0}, [3, 6, 9]),
        ({"every": "2 steps", "start": "5 steps", "end": 1.0}, [5, 7, 9, 11]),
        ({"every": "4 steps", "end": 1.0, "drop_schedule": "constant"}, [4, 8]),
        ({"every": "1 step", "end": "8 steps"}, [2, 4, 6]),
    ],
)
def test_when_rigl_updates(options: dict[str, Any], expected: list[int]) -> None:
    """Never at its end or after; and at least one step that moves lies between two that do not."""
    method = RigL(0.8, **options)
    diary = Diary(method)
    fit(toy(), method, diary)
    assert diary.changes() == expected
    assert method.updates == len(expected)


@pytest.mark.parametrize(("cls", "expected"), [(RigL, [5, 9]), (GraNet, [5, 9])])
def test_updates_by_epoch_read_the_gradient_of_its_first_step(cls: type[Rewiring], expected: list[int]) -> None:
    method = cls(0.8, every="1 epoch", end=0.3) if cls is GraNet else cls(0.8, every="1 epoch", end=1.0)
    diary = Diary(method)
    fit(toy(), method, diary, max_epochs=4)
    assert diary.changes() == expected


def test_updates_by_epoch_without_gradients_come_before_its_first_step() -> None:
    method = SET(0.8, every="1 epoch", end=1.0)
    seen = []

    class Early(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            seen.append(method.masks.fingerprint())

    fit(toy(), method, Early(), max_epochs=4)
    changes = [i for i in range(1, len(seen)) if not seen[i].equal(seen[i - 1])]
    assert changes == [BATCHES, 2 * BATCHES]  # the fourth epoch is the end


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_grown_weights_start_at_zero_without_moments(name: str, optimizer: str) -> None:
    method = METHODS[name](0.8, every="3 steps")
    diary = Diary(method)
    grown_at: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if len(diary.masks) < 2:
                return
            for name, weight in method.weights.items():
                grown = diary.masks[-1][name] & ~diary.masks[-2][name]
                if grown.any():
                    grown_at.append(len(diary.masks))
                    assert not weight[grown].any()
                    for state in trainer.optimizers[0].state[weight].values():
                        assert state.shape != weight.shape or not state[grown].any()

    module = toy(optimizer)
    fit(module, method, diary, Look())
    assert set(grown_at) >= {3, 6}
    first = {name: diary.masks[2][name] & ~diary.masks[1][name] for name in method.masks}
    moved = sum(int(dict(module.named_parameters())[name][mask].count_nonzero()) for name, mask in first.items())
    assert moved > 0, "what was grown never moved"


def test_an_update_of_rigl_takes_the_place_of_a_step() -> None:
    method, module = RigL(0.8, every="3 steps"), toy("adamw")
    seen: list[dict[str, Tensor]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    runner = fit(module, method, Look())
    for number in range(2, STEPS + 1):
        before, after = seen[number - 2], seen[number - 1]
        still = all(after[name].equal(before[name]) for name in after if name.endswith("bias"))
        assert still == (number in (3, 6)), number
        if still:
            for name in method.masks:
                stays = after[name] != 0
                assert after[name][stays].equal(before[name][stays])
    counters = {float(state["step"]) for state in runner.optimizers[0].state.values()}
    assert counters == {STEPS - 2.0}


def test_the_seed_decides_what_set_grows() -> None:
    def trained(seed: int) -> Tensor:
        torch.manual_seed(0)  # of dropout
        method = SET(0.8, every="3 steps", seed=seed)
        fit(toy(), method)
        return method.masks.fingerprint()

    assert trained(1).equal(trained(1))
    assert not trained(1).equal(trained(2))


# ---- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [RigL, SET])
def test_two_of_four_at_every_step(cls: type[Rewiring]) -> None:
    method = cls(structure="2:4", targets=["!:first"], every="2 steps")
    diary = Diary(method)
    fit(toy(), method, diary)
    assert len(diary.changes()) >= 3
    for masks in diary.masks:
        assert (masks["net.2.weight"].view(8, 2, 4, 3, 3).sum(2) == 2).all()
        assert (masks["net.6.weight"].view(16, 32, 4).sum(2) == 2).all()


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_granet_ends_at_two_of_four(initial: float) -> None:
    method = GraNet(structure="2:4", initial_sparsity=initial, targets=["!:first"], every="2 steps")
    diary = Diary(method)
    fit(toy(), method, diary)
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in diary.masks]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == method.masks.total - round(initial * method.masks.total)
    for masks in diary.masks:
        assert (masks["net.6.weight"].view(16, 32, 4).sum(2) >= 2).all()
    assert (method.masks["net.6.weight"].view(16, 32, 4).sum(2) == 2).all()
    assert (method.masks["net.2.weight"].view(8, 2, 4, 3, 3).sum(2) == 2).all()


# ---- GraNet ---------------------------------------------------------------------------------------------------------


def test_golden_sparsities_of_granet() -> None:
    """28 updates from 0.5 to 0.95; the official code ends at 0.94998, here the target is met."""
    method = GraNet(0.95, every="1 step", end="28 steps")
    diary = Diary(method)
    fit(toy(), method, diary, max_epochs=14)
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in diary.masks]
    golden = {1: 0.546513, 7: 0.760156, 14: 0.893750, 28: 0.95, 56: 0.95}
    for number, sparsity in golden.items():
        assert kept[number - 1] == pytest.approx((1 - sparsity) * 2760, abs=0.51), number
    assert kept == sorted(kept, reverse=True)
    assert diary.changes()[-1] > 28, "regeneration goes on"


def test_granet_from_dense() -> None:
    method = GraNet(0.9, initial_sparsity=0, every="1 step")
    diary = Diary(method)
    fit(toy(), method, diary)
    assert sum(int(mask.sum()) for mask in diary.masks[0].values()) == 2760 - round(2760 * 0.9 * (1 - (5 / 6) ** 3))
    assert method.masks.kept == 276


def test_granet_starts_by_erk() -> None:
    diaries = [Diary(method) for method in (RandomSparsity(0.5, seed=1), GraNet(0.9, seed=1))]
    for diary in diaries:
        fit(toy(), diary.method, diary)
    assert all(diaries[1].first[name].equal(mask) for name, mask in diaries[0].first.items())


def test_granet_ends_at_the_target_whatever_the_grid() -> None:
    for options in ({"every": "1 epoch", "end": 1.0}, {"every": "5 steps", "end": "11 steps"}):
        method = GraNet(0.9, **options)  # type: ignore[arg-type]
        fit(toy(), method)
        assert method.masks.kept == 276


def test_granet_that_ends_early_says_so() -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"GraNet ends at sparsity 0\.\d+, not 0.9: training stopped before"):
        fit(toy(), GraNet(0.9), Stop())


# ---- what has been explored -----------------------------------------------------------------------------------------


def test_the_share_of_weights_ever_active() -> None:
    method = SET(0.9, every="2 steps", track_explored=True)
    diary = Diary(method)
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            rates.append(method.explored_rate)

    fit(toy(), method, diary, Rates())
    for number in range(1, STEPS + 1):
        union = [torch.stack([masks[name] for masks in diary.masks[:number]]).any(0) for name in method.masks]
        assert rates[number - 1] == pytest.approx(over_parameterization_rate(union))
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] > 0.12
    assert SET(0.9).explored_rate is None


def test_the_share_ever_active_survives_a_resume(tmp_path: Any) -> None:
    first = RigL(0.9, every="2 steps", track_explored=True)
    fit(toy(), first, L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1))
    again = RigL(0.9, every="2 steps", track_explored=True)
    fit(toy(seed=1), again, ckpt_path=tmp_path / "step=5.ckpt")
    assert again.explored_rate == first.explored_rate
    assert again.explored.fingerprint().equal(first.explored.fingerprint())


def test_a_method_of_ones_own_is_two_scores() -> None:
    class Noisy(Rewiring):
        def keep_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
            return (weight * gradient).abs()

        def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
            return gradient.abs()

    method = Noisy(0.8, every="3 steps")
    diary = Diary(method)
    fit(toy(), method, diary)
    assert diary.changes() == [3, 6]
