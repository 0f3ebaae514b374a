"""What ranks send: nothing in a step, histograms at an update, and never a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from lightning_sparse import MagnitudePruning, RigL, SparsityMonitor
from lightning_sparse.core import layout
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import fit, fit_on_ranks, run_on_ranks, toy
from tests.helpers.sharded import ShardedToy, fit_sharded

MIB = 1 << 20


class Ledger(Callback):
    """Bytes that this package sends, by the step after which it does; stands in for `torch.distributed` there."""

    def __init__(self) -> None:
        self.sent: dict[int, int] = {}
        self.step = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(distributed, name)

    def all_reduce(self, tensor: Tensor, *args: Any) -> None:
        self.count(tensor)
        distributed.all_reduce(tensor, *args)

    def reduce(self, tensor: Tensor, *args: Any) -> None:
        self.count(tensor)
        distributed.reduce(tensor, *args)

    def count(self, tensor: Tensor) -> None:
        self.sent[self.step] = self.sent.get(self.step, 0) + tensor.numel() * tensor.element_size()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step


def sent(rank: int, make: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        method: Sparsifier = make()
        ledger = Ledger()
        monkeypatch.setattr(layout, "distributed", ledger)
        module = ShardedToy().float()
        fit_sharded(rank, 2, module, ledger, method, log_every_n_steps=100)
        return {"sent": ledger.sent, "layers": len(method.shapes)}


def test_rigl_sends_histograms_at_updates_and_nothing_else() -> None:
    for seen in run_on_ranks(sent, lambda: RigL(0.8, every="3 steps", end=0.9, seed=3), timeout=300):
        updates = {step for step in seen["sent"] if step >= 0}
        assert updates == {2, 5, 8}, "an update falls on every third step, and only there something is sent"
        for step in updates:
            assert MIB < seen["sent"][step] <= 2 * MIB * seen["layers"]


def test_a_global_threshold_needs_two_histograms() -> None:
    make = lambda: MagnitudePruning(0.8, start="3 steps", end="6 steps", every="3 steps")  # noqa: E731
    for seen in run_on_ranks(sent, make, timeout=300):
        assert {step for step in seen["sent"] if step >= 0} == {2, 5}
        assert all(number <= 4 * MIB for step, number in seen["sent"].items() if step >= 0)


def test_one_process_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    monkeypatch.setattr(layout, "distributed", ledger)
    fit(toy(), ledger, RigL(0.8, every="2 steps"), SparsityMonitor(report=False, table=False))
    assert ledger.step > 0
    assert ledger.sent == {}


def under_ddp(rank: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        ledger = Ledger()
        monkeypatch.setattr(layout, "distributed", ledger)
        fit_on_ranks(rank, toy(), ledger, RigL(0.8, every="2 steps"), SparsityMonitor(report=False, table=False))
        return {"sent": ledger.sent, "any": torch.tensor(float(rank))}


def test_so_do_ranks_that_hold_all_weights() -> None:
    """Fingerprints are Lightning's to send, as before."""
    for seen in run_on_ranks(under_ddp):
        assert seen["sent"] == {}
