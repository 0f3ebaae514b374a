"""One of two processes of the distributed contract; started by test_ddp.py, writes what it saw."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_sparse import SNIP, CKARegularization, GraSP, MagnitudePruning, SparsityCheckpoint, SparsityMonitor
from lightning_sparse.families import Pruning
from lightning_sparse.loop import Sparsifier
from tests.toys import BATCHES, OVERLAYS, FeaturePenalty, L2Penalty, Toy, loader, method_of, overlay, toy, trainer

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Restless(Toy):
    """Uses the global generators differently on every rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.rand(1 + 3 * RANK)
        return self.loss(batch)


class Recorder(L.Callback):
    """Keeps weights and masks at the end of every epoch."""

    def __init__(self, method: Sparsifier) -> None:
        self.method = method
        self.seen: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        masks = self.method.mask_set
        self.seen.append(
            {
                "weights": {name: value.clone() for name, value in pl_module.state_dict().items()},
                "masks": {} if masks is None else {name: masks[name] for name in masks},
            }
        )


class LocalScore(Pruning):
    """A mistake on purpose: every rank scores by its own random numbers."""

    def score(self, name: str, weight: Tensor) -> Tensor:
        return torch.rand_like(weight)


def run(module: L.LightningModule, callbacks: list[L.Callback], ckpt_path: Any = None, **options: Any) -> L.Trainer:
    strategy = DDPStrategy(process_group_backend="gloo")
    runner = trainer(*callbacks, strategy=strategy, devices=2, **options)
    runner.fit(module, loader(rank=RANK, world_size=2), loader(1), ckpt_path=ckpt_path)
    return runner


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for path in OVERLAYS:
        torch.seed()  # no seed, and different numbers consumed on every rank
        torch.rand(1 + 5 * RANK)
        callbacks = overlay(path)
        method = method_of(callbacks)
        recorder = Recorder(method)
        module = Restless()
        files = ModelCheckpoint(folder / path.stem, "{step}", every_n_train_steps=1, save_top_k=-1)
        run(module, [*callbacks, recorder, files], accumulate_grad_batches=2)
        resumed = Restless()
        again = overlay(path)
        torch.rand(1 + RANK)
        run(resumed, again, ckpt_path=folder / path.stem / f"step={BATCHES // 2 + 1}.ckpt", accumulate_grad_batches=2)
        results[path.stem] = {
            "epochs": recorder.seen,
            "resumed": dict(resumed.state_dict()),
            "kept": method.mask_set.kept if method.mask_set else None,
            "goal": method.goal["total"],
        }
    try:
        run(toy(), [LocalScore(0.5)])
        results["local score"] = "was not noticed"
    except RuntimeError as error:
        results["local score"] = str(error)
    penalties = {"weights": L2Penalty(0.5), "features": FeaturePenalty(0.5)}
    for name, penalty in {**penalties, "similarity": CKARegularization(strength=0.05, every_n_batches=1)}.items():
        module = toy()
        module.net[5] = torch.nn.Identity()
        run(module, [penalty], accumulate_grad_batches=2)
        results[name] = dict(module.state_dict())
    for method in (SNIP(0.8), GraSP(0.8)):
        module = toy()
        module.net[5] = torch.nn.Identity()
        run(module.double(), [method], max_steps=1)
        results[method.label] = {name: method.masks[name] for name in method.masks}
    monitor = SparsityMonitor(table=False)
    best = SparsityCheckpoint(dirpath=folder / "best", monitor="val_loss")
    watched = [MagnitudePruning(0.5, start=0.3, end=0.6), monitor, best]
    run(toy(), watched, logger=CSVLogger(folder, version=0), log_every_n_steps=1, default_root_dir=folder)
    results["watched"] = {"best": best.best_model_path, "sparsity": monitor.history.column("sparsity")}
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
