"""A metric that is asked for and never logged ends a run before its first step, or as soon as it can be known."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest

from lightning_sparse import MagnitudePruning
from lightning_sparse.observe import SparsityCheckpoint, SparsityMonitor
from lightning_sparse.testing import BATCHES, Toy, fit


class Logging(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"train/size": 1.0})
        return loss


class AtTheEnd(Logging):
    def on_train_epoch_end(self) -> None:
        self.log("late", 1.0)


class Elsewhere(L.Callback):
    """One of the user's, which may log anything."""


def train(module: Toy, metric: str, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    monitor = SparsityMonitor(metric, table=False, report=False)
    return fit(module, MagnitudePruning(0.5), monitor, *callbacks, **{"num_sanity_val_steps": 2, **options})


@pytest.mark.parametrize("metric", ["val_loss", "train/loss", "train/loss_epoch", "train/size", "MagnitudePruning/x"])
def test_what_is_logged_is_accepted(metric: str) -> None:
    assert train(Logging(), metric).global_step > 0


def test_what_is_logged_late_is_accepted_too() -> None:
    assert train(AtTheEnd(), "late").global_step > 0


@pytest.mark.parametrize(
    ("module", "metric", "sentence"),
    [
        (Toy(), "nope", r"SparsityMonitor: metric='nope' is not logged; choose from \['val_loss'\]\."),
        (Logging(), "val_lost", r"metric='val_lost' is not logged; did you mean 'val_loss'\?"),
        (Logging(), "train/los", r"metric='train/los' is not logged; did you mean 'train/loss'\?"),
    ],
)
def test_what_nobody_logs_is_refused_before_the_first_step(module: Toy, metric: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        train(module, metric)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("module", "callbacks", "options"),
    [(AtTheEnd(), [], {}), (Toy(), [Elsewhere()], {}), (Toy(), [], {"num_sanity_val_steps": 0})],
    ids=["the module", "a callback", "no validation before training"],
)
def test_where_others_may_log_it_is_refused_after_an_epoch(module: Toy, callbacks: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="metric='nope' is not logged"):
        train(module, "nope", *callbacks, **options)
    assert module.trainer.global_step == BATCHES


@pytest.mark.parametrize(("module", "steps"), [(Toy(), 0), (AtTheEnd(), BATCHES)], ids=["at once", "after an epoch"])
def test_what_a_checkpoint_monitors_must_be_logged(module: Toy, steps: int) -> None:
    checkpoint = SparsityCheckpoint(monitor="val/accuracy")
    with pytest.raises(ValueError, match=r"SparsityCheckpoint: monitor='val/accuracy' is not logged; choose from \["):
        fit(module, MagnitudePruning(0.5), checkpoint, num_sanity_val_steps=2, enable_checkpointing=True)
    assert module.trainer.global_step == steps


def test_the_only_epoch_stays() -> None:
    with pytest.warns(UserWarning, match="metric='nope' is not logged"):
        assert train(AtTheEnd(), "nope", max_epochs=1).global_step == BATCHES
