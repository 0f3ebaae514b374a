"""Returning to a moment: everything is as it was, and the moment itself never changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules

from lightning_sparse.methods.lottery_ticket.snapshot import Snapshot
from lightning_sparse.testing import differences

# How SequentialLR of torch before 2.7 steps its schedules.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: AdamW(p, lr=0.1, amsgrad=True),
}
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "exponential": lambda o: schedules.ExponentialLR(o, 0.9),
    "milestones": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "function": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.3, total_steps=100),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "warm-up": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.5)], [3]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
}


class Training:
    """A small network on data that depend on the step alone."""

    def __init__(self, optimizer: str, schedule: str) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.schedule = SCHEDULES[schedule](self.optimizer)

    def run(self, steps: range) -> list[Any]:
        trace = []
        for step in steps:
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            loss = (self.net(x) - x[:, :1]).square().mean()
            loss.backward()
            trace.append([loss.item(), *(group["lr"] for group in self.optimizer.param_groups)])
            self.optimizer.step()
            self.schedule.step(*([1.0] if isinstance(self.schedule, schedules.ReduceLROnPlateau) else []))
        return trace

    def state(self) -> Any:
        return copy.deepcopy([dict(self.net.state_dict()), self.optimizer.state_dict(), self.schedule.state_dict()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", [0, 4])
def test_from_a_moment_everything_repeats(optimizer: str, schedule: str, start: int) -> None:
    training, snapshot = Training(optimizer, schedule), Snapshot()
    training.run(range(start))
    snapshot.take(training.net, [training.optimizer], [training.schedule])
    moment, kept = training.state(), copy.deepcopy(snapshot.state_dict())
    first = training.run(range(start, start + 6))
    end = training.state()
    for _ in range(2):
        snapshot.restore_weights(training.net)
        snapshot.restore_optimizers([training.optimizer], [training.schedule])
        assert differences(moment, training.state()) == []
        assert training.run(range(start, start + 6)) == first
        assert differences(end, training.state()) == []
    assert differences(kept, snapshot.state_dict()) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_travels_in_a_checkpoint(schedule: str) -> None:
    training, snapshot = Training("adamw", schedule), Snapshot()
    assert not snapshot
    training.run(range(3))
    snapshot.take(training.net, [training.optimizer], [training.schedule])
    file = io.BytesIO()
    torch.save(snapshot.state_dict(), file)
    file.seek(0)
    other = Snapshot()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other
    assert differences(snapshot.state_dict(), other.state_dict()) == []
    moment = training.state()
    training.run(range(3, 6))
    other.restore_weights(training.net)
    other.restore_optimizers([training.optimizer], [training.schedule])
    assert differences(moment, training.state()) == []


def test_the_learning_rate_alone() -> None:
    training, snapshot = Training("adamw", "exponential"), Snapshot()
    training.run(range(2))
    snapshot.take(training.net, [training.optimizer], [training.schedule])
    (_, before, schedule) = training.state()
    training.run(range(2, 5))
    (weights, after, _) = training.state()
    snapshot.restore_optimizers([training.optimizer], [training.schedule], moments=False)
    (same, now, returned) = training.state()
    assert differences(weights, same) == []
    assert differences(after["state"], now["state"]) == []
    assert differences(before["param_groups"], now["param_groups"]) == []
    assert differences(schedule, returned) == []


def test_what_others_have_changed_meanwhile() -> None:
    training, snapshot = Training("sgd", "exponential"), Snapshot()
    snapshot.take(training.net, [training.optimizer], [training.schedule])
    training.optimizer.param_groups[0]["swa_lr"] = 0.5
    exchanged = schedules.StepLR(training.optimizer, 3)
    before = copy.deepcopy(exchanged.state_dict())
    snapshot.restore_optimizers([training.optimizer], [exchanged])
    assert training.optimizer.param_groups[0]["swa_lr"] == 0.5
    assert differences(before, exchanged.state_dict()) == []
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="SGD has other parameter groups than when the snapshot was taken; add all of them"):
        snapshot.restore_optimizers([training.optimizer], [training.schedule])


def test_a_moment_that_never_came() -> None:
    with pytest.raises(ValueError, match="There is no snapshot to rewind to"):
        Snapshot().restore_weights(nn.Linear(1, 1))


def test_the_comparison_can_fail() -> None:
    training = Training("sgd", "cosine")
    moment = training.state()
    training.run(range(1))
    found: list[str] = differences(moment, training.state())
    assert any("momentum" in place or "state" in place for place in found)
    assert isinstance(moment[0]["0.weight"], Tensor)
