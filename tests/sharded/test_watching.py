"""The monitor and the checkpoint callback see all ranks; metrics read whole masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_sparse import STR, MagnitudePruning, SparsityCheckpoint, SparsityMonitor
from lightning_sparse.export import whole_weights
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import fit, run_on_ranks
from tests.helpers.sharded import ShardedToy, fit_sharded

READINGS = ("sparsity", "zeros", "dead_outputs", "parameters", "layers", "churn", "phase")


def method_of(kind: str) -> Sparsifier:
    if kind == "live":
        return STR(strength=1e-2, initial_threshold=0.02)
    return MagnitudePruning(0.8, start=0.1, end=0.6, every="1 steps", allocation="erk")


def rows_of(monitor: SparsityMonitor) -> list[dict[str, Any]]:
    return [{key: row[key] for key in READINGS if key in row} for row in monitor.history.rows]


def watched(rank: int, kind: str, folder: Path, tensor: int) -> dict[str, Any]:
    monitor = SparsityMonitor()
    best = SparsityCheckpoint(monitor="val_loss", dirpath=folder / "best")
    module, logger = ShardedToy(), CSVLogger(folder)
    fit_sharded(rank, 2, module, method_of(kind), monitor, best, tensor=tensor, logger=logger, log_every_n_steps=1)
    return {"rows": rows_of(monitor), "best": best.best_model_path, "page": str(next(folder.rglob("report.html"), ""))}


def test_two_ranks_read_what_one_process_reads(tmp_path: Path) -> None:
    for kind in ("masks", "live"):
        alone = SparsityMonitor(report=False)
        fit(ShardedToy(), method_of(kind), alone, logger=CSVLogger(tmp_path / f"{kind} alone"), log_every_n_steps=1)
        for tensor in (1, 2):
            folder = tmp_path / f"{kind}{tensor}"
            first, second = run_on_ranks(watched, kind, folder, tensor, timeout=300)
            assert first["rows"] == second["rows"] == rows_of(alone)
            assert "layers" in first["rows"][0]
            assert first["page"], "no report was written"
            if kind == "masks" and tensor == 1:
                weights = whole_weights(first["best"])
                kept = sum(int(w.count_nonzero()) for name, w in weights.items() if w.ndim > 1)
                assert kept == round(0.2 * sum(w.numel() for w in weights.values() if w.ndim > 1))


def test_the_report_draws_whole_masks(tmp_path: Path) -> None:
    """Pictures are those of all ranks: 9 rows of the first layer, though no rank holds more than 5."""

    def drawn(rank: int) -> dict[str, Tensor]:
        method = MagnitudePruning(0.8, start=0.1, end=0.6, every="1 steps", allocation="erk")
        fit_sharded(rank, 2, ShardedToy(), method)
        return {name: layout.gather(method.masks[name]) for name, layout in method.masks.layouts.items()}

    first, _ = run_on_ranks(drawn)
    alone = MagnitudePruning(0.8, start=0.1, end=0.6, every="1 steps", allocation="erk")
    fit(ShardedToy(), alone)
    assert first["net.0.weight"].shape == torch.Size([9, 1, 3, 3])
    assert all(first[name].equal(alone.masks[name]) for name in alone.masks)
