"""The cost of masks when two processes each hold half of every weight: `python -m benchmarks cost-sharded`.

Linear layers are trained in whole Lightning runs under FSDP2, dense and with each method, each run in its own processes. The
bytes sent are counted. The time of a step and of an update is measured inside the run, in the stations of the method. Freed
memory is returned to the system at once, so the peak is the memory needed at one time, not what the allocator of the C
library keeps.
"""

from __future__ import annotations

import ctypes
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from benchmarks.record import Options, Parts
from lightning_sparse import MagnitudePruning, RigL
from lightning_sparse.core import layout
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import run_on_ranks, trainer

STEPS = 9
SIZES = {25_165_824: (6, 2048), 100_663_296: (6, 4096), 402_653_184: (24, 4096)}
"""Number of layers and their width, by the number of weights."""

M_MMAP_THRESHOLD = -3
"""Option of glibc: allocations larger than this threshold are always returned to the system when freed."""

METHODS: dict[str, Callable[[], list[Sparsifier]]] = {
    "dense": list,
    "RigL": lambda: [RigL(0.9, every="3 steps", end="8 steps", allocation="uniform", seed=0)],
    "global threshold": lambda: [MagnitudePruning(0.9, start="2 steps", end="8 steps", every="3 steps")],
}


class Stack(pl.LightningModule):
    """Linear layers, each sharded by its rows as soon as it is created."""

    def __init__(self, layers: int, width: int, policy: MixedPrecisionPolicy | None = None, compiles: bool = False) -> None:
        super().__init__()
        self.layers, self.width, self.policy, self.compiles = layers, width, policy or MixedPrecisionPolicy(), compiles
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            mesh, made = self.device_mesh["data_parallel"], []
            for seed in range(self.layers):
                torch.manual_seed(seed)
                layer = nn.Linear(self.width, self.width, bias=False)
                if self.compiles:
                    layer.compile()
                made.append(fully_shard(layer, mesh=mesh, mp_policy=self.policy))
            self.net = fully_shard(nn.Sequential(*made), mesh=mesh, mp_policy=self.policy)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class Ledger(Callback):
    """Count the bytes that this package sends, in place of `torch.distributed`, and time the stations of a method."""

    def __init__(self) -> None:
        self.sent: dict[int, int] = {}
        self.seconds: dict[str, list[float]] = {"step": [], "update": []}
        self.step, self.mine = -1, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(distributed, name)

    def all_reduce(self, tensor: Tensor, *args: Any) -> None:
        self.sent[self.step] = self.sent.get(self.step, 0) + tensor.numel() * tensor.element_size()
        distributed.all_reduce(tensor, *args)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Sparsifier):
                for station in ("before_step", "silence", "project", "evolve"):
                    setattr(callback, station, self.timed(getattr(callback, station)))

    def timed(self, station: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = station(*args)
            self.mine += time.perf_counter() - start
            return result

        return run

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.step, self.mine = trainer.global_step, 0.0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seconds["update" if self.sent.get(self.step) else "step"].append(self.mine)


def trained(rank: int, layers: int, width: int, name: str) -> dict[str, Any]:
    """Train on one rank and return its measurements."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    ledger = Ledger()
    layout.distributed = ledger  # type: ignore[assignment] # this process ends with the run
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    runner = trainer(ledger, *METHODS[name](), strategy=strategy, devices=2, max_epochs=1, log_every_n_steps=100)
    runner.fit(Stack(layers, width), DataLoader(torch.randn(4 * STEPS * 2, width), batch_size=4))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    updates = [number for step, number in ledger.sent.items() if step >= 0]
    return {**ledger.seconds, "sent": updates, "peak": peak}


def on_one_device(options: Options) -> dict[str, Any]:
    """Check what cannot be tested on a CPU: NCCL, a bfloat16 policy and a compiled block, all with sharded weights.

    The result is the final sparsity of each run.
    """
    kind = "gpu" if options.device == "cuda" else "cpu"
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found: dict[str, Any] = {}
    for name in list(METHODS)[1:]:
        for way, policy, compiles in (("float32", None, False), ("bfloat16", half, False), ("compiled", None, True)):
            method = METHODS[name]()[0]
            module = Stack(4, 64 if options.quick else 1024, policy, compiles and not options.quick)
            strategy = ModelParallelStrategy(1, 1)
            runner = trainer(method, strategy=strategy, devices=1, accelerator=kind, max_epochs=1, log_every_n_steps=100)
            runner.fit(module, DataLoader(torch.randn(4 * STEPS, module.width), batch_size=4))
            zeros = sum(int((layout.local(p) == 0).sum()) for p in module.parameters())
            size = sum(p.numel() for p in module.parameters())
            found[f"{name}, {way}"] = {"masks": method.mask_set.sparsity, "zeros": zeros / size}
    found["backend"] = distributed.get_backend()
    distributed.destroy_process_group()
    return found


def measured(weights: int) -> dict[str, Any]:
    """Results of the slower rank: ms per step for masks, seconds per update, MiB sent, and GiB beyond dense training."""
    layers, width = SIZES[weights]
    seen = {name: run_on_ranks(trained, layers, width, name, timeout=1800) for name in METHODS}
    dense = max(rank["peak"] for rank in seen.pop("dense"))
    found: dict[str, Any] = {"dense": {"peak in GiB": dense}}
    for name, ranks in seen.items():
        found[name] = {
            "masks of a step, in ms": 1e3 * max(statistics.median(rank["step"][1:]) for rank in ranks),
            "update in s": max(statistics.median(rank["update"]) for rank in ranks),
            "updates": len(ranks[0]["update"]),
            "MiB sent at an update": max(ranks[0]["sent"]) / (1 << 20),
            "MiB sent per layer": max(ranks[0]["sent"]) / (1 << 20) / layers,
            "GiB beyond dense": max(rank["peak"] for rank in ranks) - dense,
        }
    return found


def parts(options: Options) -> Parts:
    SIZES.setdefault(98_304, (6, 128))
    for weights in [98_304] if options.quick else [size for size in sorted(SIZES) if size > 1_000_000]:
        yield (f"two ranks, {weights:,} weights",), partial(measured, weights)
