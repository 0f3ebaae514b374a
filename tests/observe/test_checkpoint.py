"""The best checkpoint is one at target sparsity, however good the dense epochs were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sparse import MagnitudePruning, RandomSparsity
from lightning_sparse.observe import SparsityCheckpoint
from lightning_sparse.testing import BATCHES, fit
from tests.helpers.methods import L2Penalty
from tests.helpers.scripted import Scripted


def sparsity_of(path: str | Path) -> float:
    state = torch.load(path, weights_only=True)["state_dict"]
    weights = [value for value in state.values() if value.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def best(folder: Path, **options: Any) -> SparsityCheckpoint:
    return SparsityCheckpoint(dirpath=folder, monitor="score", mode="max", **options)


def pruning() -> MagnitudePruning:
    return MagnitudePruning(0.5, start=0.3, end=0.6, every="1 steps")  # 5 epochs: dense, two of pruning, two at target


def test_the_dense_epoch_is_never_the_best(tmp_path: Path) -> None:
    ours, theirs = best(tmp_path / "a"), ModelCheckpoint(tmp_path / "b", monitor="score", mode="max")
    fit(Scripted(), pruning(), theirs, ours, max_epochs=5)
    assert sparsity_of(theirs.best_model_path) == 0, "what this is about"
    assert sparsity_of(ours.best_model_path) == 0.5
    assert float(ours.best_model_score) == pytest.approx(1 / 3)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_each_phase_has_its_best(tmp_path: Path) -> None:
    phases = {phase: best(tmp_path, phase=phase) for phase in ("dense", "sparsifying", "at target")}
    fit(Scripted(), pruning(), *phases.values(), max_epochs=5)
    sparsities = [sparsity_of(callback.best_model_path) for callback in phases.values()]
    assert sparsities[0] == 0 < sparsities[1] < sparsities[2] == 0.5
    assert [float(callback.best_model_score) for callback in phases.values()] == pytest.approx([1, 1 / 2, 1 / 3])
    assert len({callback.state_key for callback in phases.values()}) == 3


def test_a_metric_of_the_dense_model_never_judges_a_sparse_one(tmp_path: Path) -> None:
    """Saved by steps, with a score that is older than the target."""
    ours = best(tmp_path, every_n_train_steps=1, save_top_k=-1)
    method = MagnitudePruning(0.5, start=0.3, end=0.5, every="1 steps")
    fit(Scripted(), method, ours, max_epochs=3)
    steps = sorted(torch.load(path, weights_only=True)["global_step"] for path in tmp_path.iterdir())
    assert method.window.end * 3 * BATCHES == 6
    assert steps[0] >= 2 * BATCHES, "at target from step 6, validated so after step 8"
    assert float(max(ours.best_k_models.values())) == pytest.approx(1 / 2)


@pytest.mark.parametrize("last", [True, "link"])
def test_all_that_is_written_is_at_target(last: Any, tmp_path: Path) -> None:
    ours = best(tmp_path, save_top_k=3, save_last=last)
    fit(Scripted(), pruning(), ours, max_epochs=5)
    assert {sparsity_of(path) for path in tmp_path.iterdir()} == {0.5}
    assert (tmp_path / "last.ckpt").exists()
    assert len(ours.best_k_models) == 3


def test_every_method_must_be_at_target(tmp_path: Path) -> None:
    late = MagnitudePruning(0.5, targets=["net.8"], start=0.7, end=0.7)
    ours = best(tmp_path, save_top_k=-1)
    fit(Scripted(), RandomSparsity(0.5, targets=["!net.8"]), late, L2Penalty(1e-3), ours, max_epochs=5)
    assert sorted(float(score) for score in ours.best_k_models.values()) == pytest.approx([1 / 5, 1 / 4])


def test_a_resumed_run_knows_its_best(tmp_path: Path) -> None:
    def callbacks() -> tuple[SparsityCheckpoint, ModelCheckpoint]:
        return best(tmp_path / "best"), ModelCheckpoint(tmp_path / "all", "{epoch}", save_top_k=-1)

    ours, each = callbacks()
    fit(Scripted(), pruning(), ours, each, max_epochs=5)
    again, each = callbacks()
    resumed = Scripted()
    resumed.validations = 4
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(resumed, pruning(), again, each, max_epochs=5, ckpt_path=tmp_path / "all" / "epoch=3.ckpt")
    assert again.best_model_path == ours.best_model_path
    assert again.best_model_score == ours.best_model_score
    early, each = callbacks()
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(Scripted(), pruning(), early, each, max_epochs=5, ckpt_path=tmp_path / "all" / "epoch=0.ckpt")
    assert sparsity_of(early.best_model_path) == 0.5, "resumed from a dense epoch"


def test_without_validation_the_weights_decide(tmp_path: Path) -> None:
    ours = SparsityCheckpoint(dirpath=tmp_path, save_top_k=-1)
    fit(Scripted(), pruning(), ours, max_epochs=5, limit_val_batches=0)
    assert len(list(tmp_path.iterdir())) == 3
    assert {sparsity_of(path) for path in tmp_path.iterdir()} == {0.5}


class Early(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


def test_a_target_that_is_never_reached_is_said(tmp_path: Path) -> None:
    nothing = "SparsityCheckpoint has saved nothing: the run was not 'at target' when a checkpoint was due; train longer"
    with (
        pytest.warns(UserWarning, match=nothing),
        pytest.warns(UserWarning, match="training stopped before the schedule did"),
    ):
        fit(Scripted(), MagnitudePruning(0.5), best(tmp_path), Early())
    assert not list(tmp_path.iterdir())


def test_without_a_promise_it_is_a_plain_checkpoint(tmp_path: Path) -> None:
    ours = best(tmp_path)
    with pytest.warns(
        UserWarning, match="no method in this Trainer promises a sparsity, so every checkpoint counts as 'at t"
    ):
        fit(Scripted(), L2Penalty(1e-3), ours)
    assert float(ours.best_model_score) == 1
