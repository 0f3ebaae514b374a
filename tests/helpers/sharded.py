"""Toys whose weights are sharded, and trainings of them on several ranks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_sparse.testing import Toy, loader, trainer

__all__ = ["ShardedToy", "fit_sharded", "odd_network", "whole_state"]


def odd_network() -> nn.Sequential:
    """Layers of 9, 12 and 5 rows: no number of ranks divides all of them."""
    return nn.Sequential(
        nn.Conv2d(1, 9, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(81, 12),
        nn.ReLU(),
        nn.Linear(12, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )


class ShardedToy(Toy):
    """A toy whose network is cut where the Trainer's strategy has a mesh; the last two layers stay in the root group."""

    def __init__(self, optimizer: str = "sgd", net: nn.Module | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            super().__init__(optimizer, odd_network() if net is None else net)
        self.double()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or any(isinstance(parameter, DTensor) for parameter in self.net.parameters()):
            return
        if mesh["tensor_parallel"].size() > 1:
            plan = {"3": ColwiseParallel(), "5": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            for index in (0, 3):
                fully_shard(self.net[index], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])


def fit_sharded(
    rank: int,
    ranks: int,
    module: pl.LightningModule,
    *callbacks: Callback,
    tensor: int = 1,
    whole: bool = False,
    ckpt_path: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Train on one rank of a group; together the ranks have the batches that `fit` has in one process.

    Ranks that share a layer by tensor parallelism have the same samples.

    Args:
        rank: of this process.
        ranks: how many there are.
        module: a `ShardedToy`.
        callbacks: of the Trainer.
        tensor: ranks of a group of tensor parallelism.
        whole: whether checkpoints are single files.
        ckpt_path: to resume from.
        options: of the Trainer.
    """
    strategy = ModelParallelStrategy(ranks // tensor, tensor, not whole, process_group_backend="gloo")
    runner = trainer(*callbacks, strategy=strategy, devices=ranks, use_distributed_sampler=False, **options)
    data = loader(rank=rank // tensor, world_size=ranks // tensor, batch_size=8 * tensor // ranks)
    runner.fit(module, data, loader(1), ckpt_path=ckpt_path)
    return runner


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with whole tensors; all ranks must call it."""
    state = module.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in state.items()}
