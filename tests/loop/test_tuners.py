"""Tuners of Lightning train with the callbacks removed, and load a checkpoint: before a run or inside it, nothing stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_sparse import (
    ACDC,
    CKARegularization,
    LpSphere,
    MagnitudePruning,
    QuantizationAware,
    RigL,
    SparseConnectivityLearning,
    Wanda,
)
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import Toy, differences, loader, state_of, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`lr_find` callback"),
]
METHODS: dict[str, Callable[[], list[Sparsifier]]] = {
    "MagnitudePruning": lambda: [MagnitudePruning(0.9, every="1 steps", end=0.6)],
    "RigL": lambda: [RigL(0.9, every="2 steps")],
    "ACDC": lambda: [ACDC(0.8, every=0.2, last_dense=0.2)],
    "SparseConnectivityLearning": lambda: [SparseConnectivityLearning(0.8)],
    "Wanda": lambda: [Wanda(0.8, start=0.0, end=0.8, every="2 steps")],
    "LpSphere": lambda: [LpSphere(sparsity=0.8, p=1.5)],
    "CKARegularization": lambda: [CKARegularization(strength=0.1), MagnitudePruning(0.8, every="2 steps")],
    "QuantizationAware": lambda: [MagnitudePruning(0.8, start=0, end=0), QuantizationAware()],
}


class Tuned(Toy):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__("adam")
        self.lr, self.batch_size = 0.01, 8

    def train_dataloader(self) -> Any:
        return loader(4, self.batch_size)


class Ordered(Tuned):
    """Has the same batches in every epoch: a finder opens the data anew, in the order of the first epoch."""

    def train_dataloader(self) -> Any:
        return DataLoader([*loader()], batch_size=None, generator=torch.Generator())


class Rates(LearningRateFinder):
    """Searches at the start of an epoch, as in Lightning's documentation, and then keeps the rate of the run."""

    def __init__(self, epoch: int) -> None:
        super().__init__(num_training_steps=5, update_attr=False)
        self.epoch = epoch

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


class Sizes(BatchSizeFinder):
    def __init__(self, epoch: int) -> None:
        super().__init__(steps_per_trial=2, max_trials=1, init_val=8)
        self.epoch = epoch

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.scale_batch_size(trainer, pl_module)


def run(methods: list[Sparsifier], *callbacks: L.Callback, **options: Any) -> dict[str, Any]:
    module = Ordered()
    runner = trainer(*callbacks, *methods, max_epochs=5)
    runner.fit(module, val_dataloaders=loader(1), **options)
    return state_of(module, runner, *methods)


@pytest.mark.parametrize("epoch", [0, 2], ids=["which trains", "which stops at once"])
@pytest.mark.parametrize("name", METHODS)
def test_a_search_inside_a_run_leaves_no_trace(name: str, epoch: int, tmp_path: Path) -> None:
    """After the first epoch, Lightning's search makes no step, but it saves and loads a checkpoint."""
    make = METHODS[name]
    expected = run(make())
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    searched = make()
    assert differences(expected, run(searched, Rates(epoch), saves)) == []
    assert all(method.brought is None for method in searched)
    assert differences(expected, run(make(), ckpt_path=str(tmp_path / "step=16.ckpt"))) == []


def test_it_leaves_none_if_the_methods_come_first() -> None:
    make = METHODS["MagnitudePruning"]
    module, methods = Ordered(), make()
    runner = trainer(*methods, Rates(2), max_epochs=5)
    runner.fit(module, val_dataloaders=loader(1))
    assert differences(run(make()), state_of(module, runner, *methods)) == []


def test_a_search_for_a_batch_size_leaves_the_method_where_it_was() -> None:
    method, counted = MagnitudePruning(0.9, every="1 steps", end=0.6), []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            counted.append(trainer.global_step - method.steps)

    module = Tuned()
    trainer(Sizes(2), method, Count(), max_epochs=5).fit(module, val_dataloaders=loader(1))
    assert set(counted) == {0}
    assert method.brought is None
    assert method.at_target
    assert all((module.get_parameter(name)[method.masks.dropped(name)] == 0).all() for name in method.masks)


@pytest.mark.parametrize("name", METHODS)
def test_a_search_that_fails_leaves_nothing_to_the_next_run(name: str) -> None:
    class Failing(Ordered):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.fails and not any(isinstance(one, Sparsifier) for one in self.trainer.callbacks):
                raise MemoryError
            return super().training_step(batch, batch_idx)

    module, methods = Failing(), METHODS[name]()
    start, dice = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(MemoryError):
        trainer(Rates(0), *methods, max_epochs=5).fit(module, val_dataloaders=loader(1))
    module.fails = False
    module.load_state_dict(start)
    torch.set_rng_state(dice)
    runner = trainer(*methods, max_epochs=5)
    runner.fit(module, val_dataloaders=loader(1))
    assert differences(run(METHODS[name]()), state_of(module, runner, *methods)) == []


def test_a_search_before_a_second_run_does_not_bring_back_the_first() -> None:
    """The finder saves and loads at the start of the fit, when the instance still holds its last run."""
    method, kept = MagnitudePruning(0.9, every="1 steps"), []

    class Note(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            kept.append(method.masks.kept)

    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    for _ in range(2):
        trainer(finder, method, Note(), max_epochs=3).fit(Tuned(), val_dataloaders=loader(1))
    assert kept[:12] == kept[12:]
    assert kept[0] == method.masks.total
    assert method.state_dict()["memory"] is not None
