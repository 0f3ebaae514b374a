"""The lottery ticket: against the rounds written out by hand, and everything that has to return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules

from lightning_sparse import LotteryTicket
from lightning_sparse.functional import exact_count
from lightning_sparse.testing import BATCHES, OPTIMIZERS, Toy, differences, fit, loader, state_of, toy, trainer

# SequentialLR of older torch calls its parts in a way that torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in")

SCHEDULES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "step": ("step", lambda o: schedules.ExponentialLR(o, 0.7)),
    "epoch": ("epoch", lambda o: schedules.ExponentialLR(o, 0.1)),
    "milestones": ("step", lambda o: schedules.MultiStepLR(o, [1, 3])),
    "one cycle": ("step", lambda o: schedules.OneCycleLR(o, 0.1, total_steps=100)),
    "warm-up": (
        "step",
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, 9)], [2]
        ),
    ),
    "plateau": ("epoch", lambda o: schedules.ReduceLROnPlateau(o, patience=0, threshold=1e9)),
}


class Scheduled(Toy):
    """With BatchNorm and a schedule."""

    def __init__(self, optimizer: str = "sgd", schedule: str = "step") -> None:
        torch.manual_seed(7)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        super().__init__(optimizer, net)
        self.interval, self.make = SCHEDULES[schedule]

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        scheduler = {"scheduler": self.make(optimizer), "interval": self.interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Diary(L.Callback):
    """What a training sees before every batch, and what the others see after it."""

    def __init__(self, method: LotteryTicket) -> None:
        self.method = method
        self.rates: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self.kept: list[int] = []
        self.rounds: list[int] = []
        self.ends: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.weights.append(copy.deepcopy(dict(pl_module.state_dict())))
        self.kept.append(self.method.masks.kept)
        self.rounds.append(self.method.round)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.ends.append(copy.deepcopy(dict(pl_module.state_dict())))


def by_hand(module: Scheduled, point: int, lengths: list[int], sparsity: float) -> dict[str, Tensor]:
    """All rounds as the paper tells them, in plain torch, on the batches that the run sees."""
    data, batches = loader(), []
    for epoch in range(3):
        data.set_epoch(epoch)
        batches += list(data)
    net = module.net
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    masks = [torch.ones_like(p) for p in matrices]
    total = sum(p.numel() for p in matrices)

    def step(index: int) -> None:
        optimizer.zero_grad()
        x, y = batches[index]
        F.cross_entropy(net(x), y).backward()
        for p, mask in zip(matrices, masks, strict=True):
            p.grad *= mask
        optimizer.step()
        with torch.no_grad():
            for p, mask in zip(matrices, masks, strict=True):
                p *= mask
        scheduler.step()

    for index in range(point):
        step(index)
    moment = copy.deepcopy((net.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    position = point
    for number, length in enumerate(lengths):
        if number > 0:
            keep = total - exact_count(1 - (1 - sparsity) ** (number / (len(lengths) - 1)), total)
            flat = torch.cat([p.detach().abs().flatten() for p in matrices])
            smallest = flat.sort(descending=True).values[keep - 1]
            masks = [(p.detach().abs() >= smallest).float() for p in matrices]
            weights, moments, rate = copy.deepcopy(moment)
            net.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            scheduler.load_state_dict(rate)
            with torch.no_grad():
                for p, mask in zip(matrices, masks, strict=True):
                    p *= mask
                    for value in optimizer.state[p].values():
                        if value.shape == p.shape:
                            value *= mask
        for index in range(position, position + length):
            step(index)
        position += length
    return {f"net.{name}": value for name, value in net.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("options", "point", "lengths"),
    [
        ({"rounds": 2}, 0, [4, 4, 4]),
        ({"rounds": 2, "rewind_to": "3 steps"}, 3, [3, 3, 3]),
        ({"rounds": 2, "rewind_to": 0.5}, 6, [2, 2, 2]),
        ({"rounds": 2, "every": "2 steps"}, 0, [2, 2, 8]),
        ({"rounds": 1, "rewind_to": "1 epoch"}, 4, [4, 4]),
        ({"rounds": 11}, 0, [1] * 12),
    ],
    ids=["initialization", "mid-epoch", "late", "short rounds", "one-shot", "every step"],
)
def test_rounds_written_out_by_hand(optimizer: str, options: dict[str, Any], point: int, lengths: list[int]) -> None:
    module, reference = Scheduled(optimizer), Scheduled(optimizer)
    fit(module, LotteryTicket(0.8, **options))
    for name, value in by_hand(reference, point, lengths, 0.8).items():
        assert module.state_dict()[name].equal(value), name


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("point", "starts"), [(0, [5, 10, 15]), (4, [8, 12, 16]), (8, [11, 14, 17])])
def test_every_round_begins_with_the_learning_rate_of_the_moment(schedule: str, point: int, starts: list[int]) -> None:
    method = LotteryTicket(0.8, rounds=3, rewind_to=f"{point} steps")
    diary = Diary(method)
    fit(Scheduled(schedule=schedule), method, diary, max_epochs=5)
    changes = [i for i in range(1, 20) if diary.rounds[i] != diary.rounds[i - 1]]
    assert changes == starts
    length = starts[0] - point
    for start in starts:
        assert diary.rates[start] == diary.rates[point]
        if SCHEDULES[schedule][0] == "step" or length == BATCHES:
            assert diary.rates[start : start + length] == diary.rates[point : point + length]
    if schedule == "step":
        assert diary.rates[starts[0] - 1] != diary.rates[point]


def test_statistics_and_unpruned_parameters_return_too() -> None:
    method = LotteryTicket(0.8, rounds=2)
    diary = Diary(method)
    fit(Scheduled(), method, diary)
    for start in (4, 8):
        for name, value in diary.weights[0].items():
            found = diary.weights[start][name]
            assert found.equal(value * method.masks[name] if name in method.masks and start == 8 else value) or start == 4
            assert not diary.ends[start - 1][name].equal(value), name
    assert int(diary.weights[8]["net.2.num_batches_tracked"]) == 0


def test_every_round_removes_the_same_share() -> None:
    method = LotteryTicket(1 - 0.8**3, rounds=3)
    diary = Diary(method)
    fit(toy(), method, diary)
    total = method.masks.total
    expected = [total - exact_count(1 - 0.8**number, total) for number in range(4)]
    assert diary.kept == [count for count in expected for _ in range(3)]


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.0, 1), (0.2, 1), (0.21, 2), (1 - 0.8**14, 14), (0.9, 11)])
def test_a_fifth_per_round_unless_told_otherwise(sparsity: float, rounds: int) -> None:
    assert LotteryTicket(sparsity).trainings.count == rounds
    assert 0.8**rounds <= 1 - sparsity + 1e-9 or rounds == 1


def test_the_best_of_what_was_left_are_kept() -> None:
    method = LotteryTicket(0.9, rounds=3)
    masks: list[dict[str, Tensor]] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            masks.append({name: method.masks[name] for name in method.masks})

    diary = Diary(method)
    fit(toy(), method, diary, Note())
    for start in (3, 6, 9):
        ended = diary.ends[start - 1]
        for name, mask in masks[start].items():
            assert not (mask & ~masks[start - 1][name]).any()
        removed = torch.cat([ended[n].abs()[masks[start - 1][n] & ~mask] for n, mask in masks[start].items()])
        left = torch.cat([ended[n].abs()[mask] for n, mask in masks[start].items()])
        assert removed.max() <= left.min()


def test_validation_and_checkpoints_see_the_trained_ticket(tmp_path: Path) -> None:
    """At the end of a round the others look at what was trained, with the masks it was trained with."""
    method = LotteryTicket(0.8, rounds=2)
    diary = Diary(method)
    seen: list[tuple[int, bool]] = []

    class Look(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            same = all(value.equal(diary.ends[-1][name]) for name, value in pl_module.state_dict().items())
            seen.append((method.masks.kept, same))

    fit(toy(), method, diary, Look(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    total = method.masks.total
    kept = [total - exact_count(1 - 0.2 ** (number / 2), total) for number in range(3)]
    assert seen == [(count, True) for count in kept]
    for epoch in range(3):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert all(saved[name].equal(value) for name, value in diary.ends[4 * epoch + 3].items())


def test_every_ticket_is_saved(tmp_path: Path) -> None:
    method = LotteryTicket(0.8, rounds=2, rewind_to="3 steps", save_to=str(tmp_path / "tickets"))
    diary = Diary(method)
    fit(toy(), method, diary)
    files = sorted(path.name for path in (tmp_path / "tickets").iterdir())
    assert files == sorted(f"round={i}-{what}.ckpt" for i in range(3) for what in ("ticket", "trained"))

    def load(number: int, what: str) -> dict[str, Tensor]:
        saved = torch.load(tmp_path / "tickets" / f"round={number}-{what}.ckpt", weights_only=True)
        fresh = toy(seed=5)
        fresh.load_state_dict(saved["state_dict"], strict=True)
        return dict(fresh.state_dict())

    for number in range(3):
        assert differences(load(number, "ticket"), diary.weights[3 + 3 * number]) == []
        assert differences(load(number, "trained"), diary.ends[5 + 3 * number]) == []
        for name in method.masks:
            alive = load(number, "ticket")[name] != 0
            assert alive.equal(load(number, "trained")[name] != 0)
            assert load(number, "ticket")[name].equal(load(0, "ticket")[name] * alive)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_learning_rate_alone_may_return(optimizer: str) -> None:
    method = LotteryTicket(0.5, rounds=1, rewind="learning rate")
    diary = Diary(method)
    module = Scheduled(optimizer)
    moments: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            state = trainer.optimizers[0].state[pl_module.net[1].weight]
            moments.append(torch.stack([v.clone() for v in state.values() if v.ndim]) if state else torch.zeros(0))

    fit(module, method, diary, Note(), max_epochs=2)
    assert diary.rates[4:] == diary.rates[:4]
    for name, value in diary.weights[4].items():
        expected = diary.ends[3][name]
        assert value.equal(expected * method.masks[name] if name in method.masks else expected), name
    mask = method.masks["net.1.weight"]
    assert moments[4][:, mask].any()
    assert not moments[4][:, ~mask].any()


REWINDS: list[dict[str, Any]] = [{}, {"rewind_to": "2 steps"}, {"rewind": "learning rate"}]
PLANS = ["milestones", "warm-up", "epoch"]


@pytest.mark.parametrize("options", REWINDS, ids=str)
@pytest.mark.parametrize("schedule", PLANS)
def test_resume_from_every_step(options: dict[str, Any], schedule: str, tmp_path: Path) -> None:
    """Each way of rewinding sees each of the steps with one of the schedules, and each schedule with one of the ways."""

    def state(module: Toy, runner: L.Trainer, method: LotteryTicket) -> Any:
        return state_of(module, runner, method), runner.lr_scheduler_configs[0].scheduler.state_dict()

    method, module = LotteryTicket(0.9, rounds=3, **options), Scheduled("adamw", schedule)
    runner = fit(module, method, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    expected = state(module, runner, method)
    for step in range(1 + (REWINDS.index(options) + PLANS.index(schedule)) % 3, 12, 3):
        again, other = LotteryTicket(0.9, rounds=3, **options), Scheduled("adamw", schedule)
        torch.manual_seed(step)
        runner = fit(other, again, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert differences(expected, state(other, runner, again)) == [], f"resumed at step {step}"
        assert torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["global_step"] == step


def test_a_moving_average_begins_again_with_every_round() -> None:
    if not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    average = L.pytorch.callbacks.EMAWeightAveraging(decay=0.99)
    method = LotteryTicket(0.5, rounds=2)
    seen: list[bool] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            averaged = average._average_model.module.state_dict()
            seen.append(all(value.equal(averaged[name]) for name, value in pl_module.state_dict().items()))

    fit(Scheduled(), average, method, Note())
    assert seen == [index % 4 == 0 for index in range(12)]


def test_the_round_is_shown() -> None:
    """On the bar whenever it is drawn, and in the log at the end of every epoch."""
    bar, shown = TQDMProgressBar(), []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            shown.append(bar.get_metrics(trainer, pl_module)["round"])

    method = LotteryTicket(0.8, rounds=2)
    runner = trainer(method, Note(), bar, enable_progress_bar=True)
    runner.fit(toy(), loader(), loader(1))
    assert shown == [f"{round_} of 2" for round_ in range(3) for _ in range(BATCHES)]
    assert float(runner.callback_metrics["LotteryTicket/round"]) == 2


@pytest.mark.parametrize("rounds", range(1, 7))
def test_with_steps_of_different_length_the_target_is_met(rounds: int) -> None:
    """Seven steps, the last of which takes the whole third epoch."""
    method = LotteryTicket(0.9, rounds=rounds)
    fit(toy(), method, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}))
    assert method.round == rounds
    assert method.masks.kept == method.goal["total"] == 276


def test_rounds_wait_for_the_gradients_of_a_step() -> None:
    """A third of eight batches lies between two halves of a step."""
    method = LotteryTicket(0.8, rounds=2)
    diary = Diary(method)
    fit(toy(), method, diary, max_epochs=2, accumulate_grad_batches=2)
    assert diary.rounds == [0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.filterwarnings("ignore:.*starts in the middle")
def test_a_moment_that_has_passed(tmp_path: Path) -> None:
    fit(toy(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    with pytest.raises(
        ValueError, match=r"rewind_to='3 steps' lies before step 6, at which this run begins, so it is never"
    ):
        fit(toy(), LotteryTicket(0.8, rounds=1, rewind_to="3 steps"), ckpt_path=tmp_path / "step=6.ckpt")
    for rewind_to in (0, "7 steps"):
        method = LotteryTicket(0.8, rounds=1, rewind_to=rewind_to)
        fit(toy(), method, ckpt_path=tmp_path / "step=6.ckpt")
        assert method.round == 1


def test_a_run_that_became_too_short(tmp_path: Path) -> None:
    fit(toy(), LotteryTicket(0.8, rounds=4), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=5)
    with pytest.raises(
        ValueError, match="starts its last round at 80% of the run as it was begun, but training now ends at 60%"
    ):
        fit(toy(), LotteryTicket(0.8, rounds=4), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=3)


def test_a_training_that_is_stopped_says_so() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    with pytest.warns(
        UserWarning, match=r"LotteryTicket ends in round 1 of 2 at sparsity 0.55\d\d, not 0.8: training stopped"
    ):
        fit(toy(), LotteryTicket(0.8, rounds=2), Stop())


def test_data_without_length() -> None:
    """Only the beginnings of epochs can begin rounds."""
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.rand(1, 8, 8), 0)] * 16)

    method = LotteryTicket(0.8, rounds=2)
    diary = Diary(method)
    trainer(method, diary, max_epochs=5).fit(toy(), DataLoader(Stream(), 8), loader(1))
    assert diary.rounds == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
