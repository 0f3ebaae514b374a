"""Under `torch.compile`, zeros hold with every backend, and what eager graphs compute is what the plain module does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import HyperSparse, MagnitudePruning, RigL, SparseGPT, Wanda
from lightning_sparse.families import Masked
from lightning_sparse.testing import Toy, fit, toy

METHODS: dict[str, Callable[[], Masked]] = {
    "MagnitudePruning": lambda: MagnitudePruning(0.75, start=0, end=0.6, every="2 steps"),
    "RigL": lambda: RigL(0.75, every="3 steps"),
    "HyperSparse": lambda: HyperSparse(0.75),
}


class Zeros(L.Callback):
    """Looks at what the forward pass is about to see."""

    def __init__(self, method: Masked) -> None:
        self.method = method
        self.seen = 0

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, weight in self.method.weights.items():
            dropped = self.method.masks.dropped(name)
            assert not weight[dropped].any(), name
            self.seen += int(dropped.sum())


def train(name: str, backend: str | None) -> dict[str, Tensor]:
    torch.compiler.reset()  # else torch gives up compiling after some modules of one class
    method = METHODS[name]()
    torch.manual_seed(0)  # of the network, and of the masks that RigL begins with
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    module: Toy = toy("adamw", net=net)
    zeros = Zeros(method)
    runs: Any = module if backend is None else torch.compile(module, backend=backend)
    fit(runs, method, zeros, limit_val_batches=0)
    assert zeros.seen > 0
    assert method.at_target
    for weight in method.masks:
        assert not module.get_parameter(weight)[method.masks.dropped(weight)].any()
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(name: str, backend: str) -> None:
    plain, compiled = train(name, None), train(name, backend)
    for key, value in plain.items():
        if backend == "eager":
            assert compiled[key].equal(value), key
        else:
            torch.testing.assert_close(compiled[key], value)


@pytest.mark.parametrize("make", [Wanda, SparseGPT])
def test_inputs_are_seen_in_a_part_that_has_run_compiled(make: Callable[..., Masked]) -> None:
    """In the sanity check of a Trainer, before anything listens."""
    torch.compiler.reset()
    method, module = make(0.5), toy()
    module.net = torch.compile(module.net, backend="eager")
    fit(module, method, num_sanity_val_steps=2)
    assert method.masks.kept == method.masks.total / 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_by_inductor() -> None:
    """One method: where nothing is cached, it takes half a minute to compile what all graphs share."""
    plain, compiled = train("RigL", None), train("RigL", "inductor")
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)
