"""The queue: in order, told to wait or to end, and never at a loss for more than a step then."""

import os
import signal
from dataclasses import replace

import lightning as L
import pytest
import torch

from benchmarks import accuracy, queue, trainers
from benchmarks.accuracy import METHODS, Comparison, Setting
from benchmarks.record import Measurements, Options
from benchmarks.suites import SUITES
from lightning_sparse.data import Digits, FashionMNIST
from lightning_sparse.models import LeNet300

DIGITS = Setting(Digits, LeNet300, 12, 64, 0.05)
TOY = Comparison("toy", DIGITS, ("dense", "gradual"), (0.5, 0.9), (0,))


@pytest.fixture
def made(monkeypatch):
    """Runs of a toy are instant; the list of those that were made."""
    made = []

    def train(setting, seed, method, sparsity, **how):
        made.append((seed, method, sparsity))
        return {"test": 0.5}

    monkeypatch.setattr(accuracy, "train", train)
    return made


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_training_that_is_held_leaves_its_state_and_goes_on_from_that_step(monkeypatch, tmp_path):
    stop, half, held = tmp_path / "stop", tmp_path / "half.ckpt", []

    class Stopper(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 31 and not held:
                stop.touch()

    def hold(seconds):
        held.append(torch.load(half, weights_only=False)["global_step"])
        if len(held) == 2:
            raise RuntimeError("killed while it waits")

    how = (DIGITS, "gradual", 0.9, 0, "", 3)
    whole = accuracy.train(*how)
    monkeypatch.setattr(trainers, "sleep", hold)
    monkeypatch.setitem(METHODS, "gradual", lambda s, make=METHODS["gradual"]: [*make(s), Stopper()])
    with pytest.raises(RuntimeError, match="killed while it waits"):
        accuracy.train(*how, checkpoint=half, stop=stop)
    assert held == [32, 32], "the step it was in is finished"
    stop.unlink()
    assert accuracy.train(*how, checkpoint=half, stop=stop) | {"seconds": 0} == whole | {"seconds": 0}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("held", [False, True])
def test_a_training_that_is_asked_to_end_leaves_its_state_even_while_it_waits(held, monkeypatch, tmp_path):
    stop, half, asked = tmp_path / "stop", tmp_path / "half.ckpt", []

    def ask(*_):
        if len(asked) == 3:
            raise RuntimeError("it waits for ever")
        asked.append(None if asked else os.kill(os.getpid(), signal.SIGTERM))

    class Asker(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 31 and not asked:
                stop.touch() if held else ask()

    how = (DIGITS, "gradual", 0.9, 0, "", 3)
    whole = accuracy.train(*how)
    monkeypatch.setattr(trainers, "sleep", ask)
    monkeypatch.setitem(METHODS, "gradual", lambda s, make=METHODS["gradual"]: [*make(s), Asker()])
    with pytest.raises(SystemExit):
        accuracy.train(*how, checkpoint=half, stop=stop)
    assert torch.load(half, weights_only=False)["global_step"] == 32, "the step it was in is finished"
    stop.unlink(missing_ok=True)
    assert accuracy.train(*how, checkpoint=half, stop=stop) | {"seconds": 0} == whole | {"seconds": 0}


def test_the_queue_does_what_is_missing_in_order_and_tells_what_it_cannot_do(made, monkeypatch, tmp_path, capsys):
    absent = Comparison("absent", replace(DIGITS, data=FashionMNIST), ("dense",), ())
    other = replace(TOY, name="other", sparsities=(0.5,))
    options = Options(data=str(tmp_path), out=tmp_path, work=tmp_path / "work")
    other.write(options, {"seed": 0, "method": "dense", "sparsity": 0.0}, {"test": 1.0})
    suites = [TOY, absent, other]
    train = accuracy.train

    def failing(setting, seed, method, sparsity, **how):
        if sparsity == 0.9:
            raise ValueError("it diverged")
        return train(setting, seed, method, sparsity, **how)

    monkeypatch.setattr(accuracy, "train", failing)
    assert queue.run(options, suites) == 1
    assert made == [(0, "dense", 0.0), (0, "gradual", 0.5), (0, "gradual", 0.5)]
    said = capsys.readouterr().out
    assert "absent is left out: FashionMNIST is not in root=" in said
    assert "ValueError: it diverged" in said
    monkeypatch.setattr(accuracy, "train", train)
    assert queue.run(options, suites) == 0
    assert made[3:] == [(0, "gradual", 0.9)], "only that is missing"


def test_queues_side_by_side_never_run_the_same_part(made, tmp_path):
    options = Options(out=tmp_path / "results", work=tmp_path / "states")
    with queue.reserved(options, TOY, 1) as mine:
        assert mine
        queue.run(options, [TOY])
        assert made == [(0, "dense", 0.0), (0, "gradual", 0.9)], "another process is busy with the second"
    parts = queue.waiting(options, [TOY])
    assert [place for _, place in parts] == [1]
    key, train = list(TOY.parts(options))[1]
    TOY.write(options, key, train())
    with queue.reserved(options, TOY, 1) as mine:
        assert not mine, "another process has finished it since this one looked"
    assert not list((tmp_path / "states").glob("*.lock"))


def test_the_queue_waits_between_trainings_too(made, monkeypatch, tmp_path):
    stop, waits = tmp_path / "stop", []
    stop.touch()
    monkeypatch.setattr(trainers, "sleep", lambda seconds: (waits.append(len(made)), stop.unlink()))
    queue.run(Options(out=tmp_path, stop=stop), [TOY])
    assert waits == [0], "before the first one begins"
    assert len(made) == 3


def test_the_queue_has_every_training_and_nothing_that_takes_times(capsys, tmp_path):
    assert {suite.name for suite in queue.QUEUE} == {s.name for s in SUITES.values() if not isinstance(s, Measurements)}
    with pytest.raises(SystemExit):
        queue.main(["cost-updates"])
    assert "no suite 'cost-updates'; choose from desk-lenet300, " in capsys.readouterr().err
    queue.main(["--list", "--out", str(tmp_path), "desk-cka", "desk-growth"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["desk-cka", "0", "of", "18", "parts", "are", "there"],
        ["desk-growth", "0", "of", "9", "parts", "are", "there"],
    ]
