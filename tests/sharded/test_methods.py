"""Every method that works on shards, on two ranks: as one process does it, at every step, stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_sparse import (
    SET,
    SNIP,
    STR,
    CKARegularization,
    Distillation,
    GraNet,
    HyperSparse,
    KeepSparsity,
    LotteryTicket,
    LpSphere,
    MagnitudePruning,
    MovementPruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SparseGPT,
    SynFlow,
    TrainableThreshold,
    Wanda,
    WeightPenalty,
)
from lightning_sparse.core import local, owner_of
from lightning_sparse.functional import n_m_mask
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import fit, run_on_ranks
from tests.helpers.oracles import slow_cka
from tests.helpers.sharded import ShardedToy, fit_sharded, whole_state

METHODS: dict[str, Callable[[], Sparsifier]] = {
    "magnitude": lambda: MagnitudePruning(0.8, start=0.1, end=0.9, every="1 steps"),
    "channels": lambda: MagnitudePruning(0.5, start=0.1, end=0.9, structure="channel", allocation="uniform"),
    "layers": lambda: MagnitudePruning(0.8, start=0.1, end=0.9, allocation="erk", layer_sparsity={"net.7": 0.2}),
    "random": lambda: RandomSparsity(0.8, seed=3, rescale=True),
    "set": lambda: SET(0.8, every="1 epochs", end=1.0, seed=3),
    "rigl": lambda: RigL(0.8, every="2 steps", seed=3),
    # Without net.3: outputs that one sample alone moves have the same scores there, but for rounding.
    "rigl per output": lambda: RigL(0.8, every="2 steps", seed=3, growth_per_output=True, targets=["*", "!net.3"]),
    "rigl 2:4": lambda: RigL(structure="2:4", every="2 steps", seed=3, targets=["net.5", "net.7"]),
    "granet": lambda: GraNet(0.8, every="2 steps", seed=3, track_explored=True),
    "l1": lambda: WeightPenalty(0.8, strength=1e-3),
    "hoyer": lambda: WeightPenalty(0.8, strength=1e-3, penalty="hoyer"),
    "group lasso": lambda: WeightPenalty(strength=1e-2, penalty="group_lasso", proximal=True, end=1.0),
    "lottery": lambda: LotteryTicket(0.8, rounds=2, rewind_to="1 steps"),
    "hypersparse": lambda: HyperSparse(0.8, pretrain="1 epochs", regularize="1 epochs", strength=1e-3),
    "scl": lambda: SparseConnectivityLearning(0.8),
    "sphere": lambda: LpSphere(0.5, p=1.3, mode="feedback", every="1 steps", seed=3),
    "sphere, official": lambda: LpSphere(0.5, p=1.3, every="1 steps", seed=3),
    "str": lambda: STR(strength=1e-2, initial_threshold=0.02),
    "threshold": lambda: TrainableThreshold(strength=1e-2),
    "keep": lambda: KeepSparsity(min_sparsity=0.2),
    "movement": lambda: MovementPruning(0.8, every="2 steps"),
    "movement 2:4": lambda: MovementPruning(structure="2:4", score="fisher", every="2 steps", targets=["net.5", "net.7"]),
    "wanda": lambda: Wanda(0.8, batches=2),
    "wanda by layer": lambda: Wanda(0.8, batches=2, compare="layer", allocation="global", relative=True),
    "wanda later": lambda: Wanda(0.8, batches=2, end=0.7, every="2 steps"),
    "teacher": lambda: Distillation(teacher(), features=["0", "5"]),
    "snip": lambda: SNIP(0.8, batches=2),
    "synflow": lambda: SynFlow(0.8, iterations=5),
}


def teacher() -> nn.Module:
    """Another network of the same layers, the same on all ranks."""
    net = ShardedToy().net
    for parameter in net.parameters():
        parameter.data.mul_(1.5)
    return net


def made(name: str, optimizer: str) -> ShardedToy:
    """What is trained; for who keeps zeros, with some: a pattern in one layer, and hardly any in another."""
    module = ShardedToy(optimizer)
    if name == "keep":
        for index in (0, 5):
            weight = module.net[index].weight.data
            weight[weight.abs() < weight.abs().median()] = 0
        module.net[7].weight.data[~n_m_mask(module.net[7].weight.abs(), 2, 4)] = 0
        module.net[3].weight.data[0, :3] = 0
    return module


class Zeros(Callback):
    """After every step, and in validation, dropped entries of this rank's part are zero."""

    def __init__(self, method: Sparsifier) -> None:
        self.method, self.looks = method, 0

    def look(self) -> None:
        masks = self.method.mask_set
        for name, weight in self.method.weights.items() if masks is not None else ():
            assert masks is not None
            assert not weight.detach()[masks.dropped(name)].any(), name
            self.looks += 1

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.look()
        for name, weight in self.method.weights.items() if self.method.clears_moments else ():
            dropped = self.method.masks.dropped(name)  # type: ignore[attr-defined]
            for optimizer in trainer.optimizers:
                for moment in optimizer.state[owner_of(weight)].values():
                    if moment.shape == owner_of(weight).shape:
                        assert not local(moment)[dropped].any(), f"a dropped entry of '{name}' is remembered"

    def on_validation_batch_end(self, *args: Any) -> None:
        self.look()


def masks_of(method: Sparsifier) -> dict[str, Tensor]:
    masks = method.mask_set
    if masks is None:
        return {}
    layouts = masks.layouts
    return {name: layouts[name].gather(masks[name]) if name in layouts else masks[name] for name in masks}


TWO_BY_TWO = ["magnitude", "rigl", "str", "keep", "movement"]


def trained(rank: int, ranks: int, name: str, folder: Path, optimizer: str, tensor: int = 1) -> dict[str, Any]:
    """A run, and the same stopped in the middle of an epoch and resumed from a distributed checkpoint."""
    method, module = METHODS[name](), made(name, optimizer)
    zeros = Zeros(method)
    files = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
    fit_sharded(rank, ranks, module, zeros, method, files, tensor=tensor)
    seen = {"weights": whole_state(module), "masks": masks_of(method), "looks": zeros.looks}
    seen["counts"] = {} if method.mask_set is None else dict(method.mask_set.counts)
    again, resumed = METHODS[name](), made(name, optimizer)
    torch.rand(1 + rank)
    fit_sharded(rank, ranks, resumed, again, tensor=tensor, ckpt_path=folder / "step=7.ckpt")
    return {**seen, "resumed": whole_state(resumed), "resumed masks": masks_of(again)}


def assert_same_training(seen: list[dict[str, Any]], module: pl.LightningModule, method: Sparsifier) -> None:
    masks, first = masks_of(method), seen[0]
    assert first["masks"].keys() == masks.keys()
    for name, mask in masks.items():
        assert first["masks"][name].equal(mask), name
        assert first["resumed masks"][name].equal(mask), name
    for found in seen:
        assert found["counts"] == ({} if method.mask_set is None else method.mask_set.counts)
        assert found["looks"] or not masks
        for name, value in module.state_dict().items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-9, atol=1e-12, msg=name)
            assert found["resumed"][name].equal(found["weights"][name]), name


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_train_as_one_process(name: str, tmp_path: Path) -> None:
    optimizer = "adamw" if len(name) % 2 else "sgd"
    seen = run_on_ranks(trained, 2, name, tmp_path, optimizer, timeout=300)
    method, module = METHODS[name](), made(name, optimizer)
    fit(module, method)
    assert_same_training(seen, module, method)


@pytest.mark.parametrize("name", TWO_BY_TWO)
def test_so_do_two_by_two(name: str, tmp_path: Path) -> None:
    """FSDP2 over tensor parallelism."""
    seen = run_on_ranks(trained, 4, name, tmp_path, "adamw", 2, timeout=300, ranks=4)
    method, module = METHODS[name](), made(name, "adamw")
    fit(module, method)
    assert_same_training(seen, module, method)


def similar(rank: int) -> dict[str, Tensor]:
    module = ShardedToy()
    fit_sharded(rank, 2, module, CKARegularization(strength=0.05, every_n_batches=1))
    return whole_state(module)


class Written(ShardedToy):
    """The mean of the terms of two ranks, each from its own samples, as under DDP."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        halves = [batch[0][rank::2].double() for rank in (0, 1)]
        terms = [2 * slow_cka(self.net[:5](half), self.net[:7](half)) for half in halves]
        return self.loss(batch) + 0.05 * (terms[0] + terms[1]) / 2


def test_similarity_is_that_of_the_samples_of_each_rank() -> None:
    module = Written()
    fit(module)
    for found in run_on_ranks(similar, timeout=300):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def told(rank: int) -> list[str]:
    said: list[str] = []
    for method in (Distillation(), SparseGPT(0.5), MovementPruning(0.5, allocation="owl")):
        with pytest.raises(ValueError, match=".") as error:
            fit_sharded(rank, 2, ShardedToy(), method)
        said.append(str(error.value))
    return said


def test_what_needs_whole_weights_is_refused_on_all_ranks() -> None:
    for said in run_on_ranks(told, timeout=300):
        assert "teacher='start' needs a copy of the network, but its weights are sharded; pass a module instead" in said[0]
        assert "SparseGPT does not support strategy=ModelParallelStrategy, which shards weights" in said[1]
        assert "allocation='owl' looks for outliers in whole layers" in said[2]


def found(rank: int) -> str:
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sparse.methods.keep_sparsity.rank_zero_info", lines.append)
        fit_sharded(rank, 2, made("keep", "sgd"), KeepSparsity(min_sparsity=0.2))
    return lines[0]


def test_the_table_of_zeros_counts_whole_weights() -> None:
    rows = [" ".join(line.split()) for line in run_on_ranks(found, timeout=300)[0].splitlines()]
    assert rows[2:] == [
        "net.0.weight 40 of 81 49.38%",
        "net.3.weight 3 of 972 0.31% left dense: zeros by chance",
        "net.5.weight 47 of 96 48.96%",
        "net.7.weight 20 of 40 50.00% 2:4",
    ]
