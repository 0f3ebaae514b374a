"""Point 5: two processes of a gloo group end bit for bit the same, whatever random numbers each of them draws."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed

from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing.case import Case, Inapplicable, quiet, require
from lightning_sparse.testing.state import differences, masks_of, off_target
from lightning_sparse.testing.toys import BATCHES, EPOCHS, Toy, loader, trainer, with_architecture

__all__ = ["agrees_on_all_ranks", "fit_on_ranks", "run_on_ranks"]

RANKS = 2


def run_on_ranks(function: Callable[..., Any], *args: Any, timeout: float = 120.0, ranks: int = RANKS) -> list[Any]:
    """Call `function(rank, *args)` in several new processes that form a gloo group.

    The processes are forked, so the function and its arguments may be anything, including closures and classes from test
    modules. With an accelerator, torch does not allow forking; the processes are then spawned, and the function and its
    arguments must be importable by name.

    Args:
        function: the function to call; its result must load with `weights_only=True`.
        args: arguments for it.
        timeout: seconds until the processes are killed.
        ranks: number of processes.

    Returns:
        The result of each rank.

    Raises:
        AssertionError: if a rank fails, with its traceback, or if the ranks do not finish in time.
    """
    forks = not torch.accelerator.is_available()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(folder, rank, ranks, function, args)) for rank in range(ranks)]
        try:
            with warnings.catch_warnings():
                # A fork of a process with threads may wait forever for a lock; these children compute on one thread.
                warnings.filterwarnings("ignore", ".*use of fork\\(\\) may lead to deadlocks")
                for process in processes:
                    process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if forks:
                raise
            raise Inapplicable(f"beside an accelerator the callbacks must be importable by name ({error})") from error
        try:
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        require(not failures, "\n".join(["A rank has failed.", *failures]))
        wanting = [rank for rank in range(ranks) if not Path(folder, f"{rank}.pt").exists()]
        codes = [process.exitcode for process in processes]
        require(not wanting, f"Ranks {wanting} did not end within {timeout:g} s, or died (exit codes {codes}).")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _rank(folder: str, rank: int, ranks: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run the function in one of the processes; write its result, or its traceback, to a file."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo may ask a name server for this machine's address
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", f"file://{folder}/group", timedelta(seconds=60), rank=rank, world_size=ranks)
        with quiet():
            warnings.simplefilter("ignore")  # Lightning's, about two processes; other checks see the rest
            result = function(rank, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # do not wait for the process group


def fit_on_ranks(
    rank: int, module: pl.LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any
) -> pl.Trainer:
    """Do what `fit` does on one rank of a group; each rank has its own share of the data."""
    strategy = DDPStrategy(process_group_backend="gloo")
    runner = trainer(*callbacks, strategy=strategy, devices=RANKS, **options)
    runner.fit(module, loader(rank=rank, world_size=RANKS), loader(1), ckpt_path=ckpt_path)
    return runner


class _Restless(Toy):
    """A toy that draws a different amount of random numbers on every rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.rand(1 + 3 * self.global_rank)
        return self.loss(batch)


class _Recorder(Callback):
    """Records weights and masks at the end of every epoch."""

    def __init__(self, methods: list[Sparsifier]) -> None:
        self.methods = methods
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        masks = [masks_of(method) for method in self.methods]
        self.seen.append({"weights": weights, "masks": masks})


def _train_and_resume(rank: int, case: Case, folder: str) -> dict[str, Any]:
    """Train and resume without a seed, with different random numbers drawn on every rank."""
    torch.seed()
    torch.rand(1 + 5 * rank)
    with with_architecture(case.network):
        module, resumed = _Restless(), _Restless()
    callbacks, methods = case.fresh()
    recorder = _Recorder(methods)
    files = ModelCheckpoint(folder, "{step}", every_n_train_steps=BATCHES // 2 + 1, save_top_k=-1)
    fit_on_ranks(rank, module, *callbacks, recorder, files, accumulate_grad_batches=2)
    missed = [sentence for method in methods for sentence in off_target(method)]
    torch.rand(1 + rank)
    path = Path(folder, f"step={BATCHES // 2 + 1}.ckpt")
    fit_on_ranks(rank, resumed, *case.callbacks(), ckpt_path=path, accumulate_grad_batches=2)
    return {"epochs": recorder.seen, "resumed": dict(resumed.state_dict()), "missed": missed}


def agrees_on_all_ranks(case: Case) -> None:
    """Without a seed, two ranks have the same weights and masks at every epoch, meet the target and resume exactly."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = run_on_ranks(_train_and_resume, case, folder)
    require(len(first["epochs"]) == EPOCHS, f"{len(first['epochs'])} epochs were seen.")
    wrong = differences(first["epochs"], second["epochs"])
    require(not wrong, f"The ranks differ in {wrong[:4]} (epoch/part/name).")
    require(not first["missed"], f"On two ranks the target is missed: {first['missed']}.")
    for rank, seen in enumerate((first, second)):
        wrong = differences(seen["epochs"][-1]["weights"], seen["resumed"])
        require(not wrong, f"Rank {rank}, stopped and resumed, differs from the uninterrupted run in {wrong[:4]}.")
