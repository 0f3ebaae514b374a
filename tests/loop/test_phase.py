"""Where a run is: dense, sparsifying, at target; and what bars and loggers are told of it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse import SNIP, HyperSparse, LotteryTicket, MagnitudePruning, RigL, WeightPenalty
from lightning_sparse.functional import PENALTIES
from lightning_sparse.loop.phase import phase_of
from lightning_sparse.loop.sparsifier import sparsifiers
from lightning_sparse.testing import Watcher, fit, toy
from tests.helpers.methods import L2Penalty


class Phases(L.Callback):
    """Notes the phase after every batch, and what is zero then."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []
        self.zeros: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(phase_of(sparsifiers(trainer)))
        self.zeros.append(sum(int((p == 0).sum()) for p in pl_module.parameters() if p.ndim > 1))


@pytest.mark.parametrize("structure", ["unstructured", "channel"])
def test_phases_follow_the_zeros(structure: str) -> None:
    phases = Phases()
    fit(toy(), MagnitudePruning(0.3, start=0.3, end=0.7, every="1 steps", schedule="linear", structure=structure), phases)
    expected = ["dense" if n == 0 else "at target" if n == phases.zeros[-1] else "sparsifying" for n in phases.zeros]
    assert phases.seen == expected
    assert set(expected) == {"dense", "sparsifying", "at target"}


def test_all_promises_must_be_kept() -> None:
    phases = Phases()
    early = MagnitudePruning(0.5, start=0.2, end=0.2, targets=["net.6"], name="early")
    fit(toy(), early, MagnitudePruning(0.5, start=0.8, end=0.8, targets=["net.8"]), L2Penalty(1e-3), phases)
    assert list(dict.fromkeys(phases.seen)) == ["dense", "sparsifying", "at target"]


def test_methods_without_a_promise_have_no_phase() -> None:
    phases = Phases()
    fit(toy(), WeightPenalty(), phases)
    assert set(phases.seen) == {None}


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (lambda: RigL(0.5), "at target"),
        (lambda: SNIP(0.5), "at target"),
        (lambda: LotteryTicket(0.5, rounds=2), "dense"),
        (lambda: HyperSparse(0.5), "dense"),
    ],
)
def test_where_a_run_begins(method: Any, first: str) -> None:
    phases = Phases()
    fit(toy(), method(), phases, max_epochs=6)
    assert (phases.seen[0], phases.seen[-1]) == (first, "at target")


def test_the_bar_shows_the_phase_and_a_method_may_have_a_better_word() -> None:
    shown: list[dict[str, Any]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            bar = trainer.progress_bar_callback
            assert bar is not None
            shown.append(bar.get_metrics(trainer, pl_module))

    fit(toy(), Look(), MagnitudePruning(0.5, start=0.5, end=0.5), enable_progress_bar=True)
    assert [bar.get("phase") for bar in shown][1:] == ["dense"] * 5 + ["at target"] * 6
    assert shown[-1]["sparsity"] == pytest.approx(0.5)
    shown.clear()
    fit(toy(), Look(), HyperSparse(0.5), enable_progress_bar=True, max_epochs=6)
    assert shown[-1]["phase"].startswith("finetune")


@pytest.mark.parametrize("kind", ["l1", "group_lasso"])
def test_the_penalty_is_logged_while_it_pulls(kind: str) -> None:
    method = WeightPenalty(0.5, penalty=kind, strength=0.1)
    seen: list[float | None] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            value = method.numbers().get("penalty")
            seen.append(None if value is None else float(value))
            if value is not None:
                weights = [t.weight.detach() for t in method.chosen]
                expected = 0.1 * sum(float(PENALTIES[kind].value(w, 0)) for w in weights)
                assert float(value) == pytest.approx(expected)

    fit(toy(), method, Look())
    assert torch.isfinite(torch.tensor(seen[0]))
    assert seen[-1] is None


def test_sparsity_is_on_the_progress_bar() -> None:
    method = MagnitudePruning(0.75)
    runner = fit(toy(), method)
    assert float(runner.progress_bar_metrics["sparsity"]) == pytest.approx(method.masks.sparsity)


def test_loggers_get_the_sparsity_of_every_logged_step(tmp_path: Any) -> None:
    method = MagnitudePruning(0.75)
    kept: list[int] = []
    note = Watcher(lambda moment, module: kept.append(method.masks.kept) if moment == "batch end" else None)
    logger = CSVLogger(tmp_path)
    fit(toy(), method, note, logger=logger, log_every_n_steps=2)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    logged = {}
    for row in rows[1:]:
        cells = dict(zip(header, row.split(","), strict=True))
        if cells["sparsity/actual"]:
            logged[int(cells["step"])] = float(cells["sparsity/actual"])
    expected = {step: 1 - kept[step] / method.masks.total for step in range(1, 12, 2)}
    assert logged == pytest.approx(expected)
