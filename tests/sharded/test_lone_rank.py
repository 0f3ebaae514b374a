"""A rank that fails alone, under Lightning's own launcher: the run ends, and says why."""

from __future__ import annotations

import subprocess
import sys

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_sparse import MagnitudePruning
from lightning_sparse.testing import loader, trainer
from tests.helpers.sharded import ShardedToy

REASON = "the second rank has lost its data"


class Failing(MagnitudePruning):
    def score(self, name: str, weight: Tensor) -> Tensor:
        if self.steps == 3 and torch.distributed.get_rank() == 1:
            raise OSError(REASON)
        return super().score(name, weight)


def train() -> None:
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    runner = trainer(Failing(0.5, start=0.0, end=0.9, every="1 steps"), strategy=strategy, devices=2)
    runner.fit(ShardedToy(), loader())


def test_the_run_ends_with_its_reason() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded.test_lone_rank"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert f"OSError: {REASON}" in done.stderr


if __name__ == "__main__":
    train()
