"""Onto another number of ranks, into one process and out of it; whole weights for the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_sparse import HyperSparse, LotteryTicket, MagnitudePruning, RigL, SparseConnectivityLearning
from lightning_sparse.export import export_ladder, whole_weights
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import fit, run_on_ranks
from tests.helpers.sharded import ShardedToy, fit_sharded, whole_state

METHODS: dict[str, Callable[[], Sparsifier]] = {
    "rigl": lambda: RigL(0.8, every="2 steps", seed=3),
    "lottery": lambda: LotteryTicket(0.8, rounds=2, rewind_to="1 steps"),
    "hypersparse": lambda: HyperSparse(0.8, pretrain="1 epochs", regularize="1 epochs", strength=1e-3),
    "scl": lambda: SparseConnectivityLearning(0.8),
}
"""A mask and random growth; a snapshot; copies and a score; variables and what is hidden."""

STEP = 5


def files(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=STEP, save_top_k=-1)


def saved(rank: int, name: str, folder: Path, whole: bool) -> dict[str, Tensor]:
    module = ShardedToy("adamw")
    fit_sharded(rank, 2, module, METHODS[name](), files(folder), whole=whole)
    return whole_state(module)


def resumed(rank: int, ranks: int, name: str, path: Path) -> dict[str, Tensor]:
    module = ShardedToy("adamw")
    fit_sharded(rank, ranks, module, METHODS[name](), ckpt_path=path)
    return whole_state(module)


def assert_close(found: dict[str, Tensor], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_a_whole_checkpoint_goes_anywhere(name: str, tmp_path: Path) -> None:
    expected = run_on_ranks(saved, name, tmp_path, True, timeout=300)[0]
    path = tmp_path / f"step={STEP}.ckpt"
    alone = ShardedToy("adamw")
    fit(alone, METHODS[name](), ckpt_path=path)
    assert_close(dict(alone.state_dict()), expected)
    assert_close(run_on_ranks(resumed, 4, name, path, ranks=4, timeout=300)[0], expected)


@pytest.mark.parametrize("name", METHODS)
def test_from_one_process_to_two(name: str, tmp_path: Path) -> None:
    module = ShardedToy("adamw")
    fit(module, METHODS[name](), files(tmp_path))
    assert_close(run_on_ranks(resumed, 2, name, tmp_path / f"step={STEP}.ckpt", timeout=300)[0], dict(module.state_dict()))


def test_a_distributed_checkpoint_goes_onto_four_ranks_and_into_the_plain_model(tmp_path: Path) -> None:
    expected = run_on_ranks(saved, "rigl", tmp_path, False, timeout=300)[0]
    path = tmp_path / f"step={STEP}.ckpt"
    assert_close(run_on_ranks(resumed, 4, "rigl", path, ranks=4, timeout=300)[0], expected)

    plain = ShardedToy()
    weights = whole_weights(path)
    plain.load_state_dict(weights, strict=True)
    sparsity = 1 - sum(int(w.count_nonzero()) for n, w in weights.items() if "weight" in n) / 1186
    assert sparsity >= 0.8 - 1e-3
    fit(ShardedToy("adamw"), METHODS["rigl"](), files(tmp_path / "alone"))
    assert_close(weights, whole_weights(tmp_path / "alone" / f"step={STEP}.ckpt"))
    report = export_ladder(plain.float(), torch.rand(2, 1, 8, 8), tmp_path / "out", network="net", rungs=["plain"], rounds=0)
    assert list(report.rungs) == ["dense", "plain"]

    with pytest.raises(ValueError, match=r"step=5.ckpt' is a distributed checkpoint, which Lightning cannot load"):
        fit(ShardedToy("adamw"), METHODS["rigl"](), ckpt_path=path)


def test_whole_weights_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a file nor the folder of a distributed checkpoint"):
        whole_weights(tmp_path)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has no state_dict; give a checkpoint that Lightning has saved"):
        whole_weights(tmp_path / "other.pt")


def refused(rank: int) -> list[str]:
    module = ShardedToy()
    fit_sharded(rank, 2, module, MagnitudePruning(0.5), max_steps=1)
    assert any(isinstance(parameter, DTensor) for parameter in module.parameters())
    try:
        export_ladder(module, torch.rand(1, 1, 8, 8), "nowhere")
    except ValueError as error:
        return [str(error)]
    return []


def test_a_sharded_module_is_not_exported() -> None:
    for said in run_on_ranks(refused):
        assert "is sharded, and an export needs whole weights" in said[0]
