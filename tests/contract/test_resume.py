"""Exact resume in the settings that people train in, and for methods that act at other stations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import MagnitudePruning, RandomSparsity, RigL
from lightning_sparse.core import find_targets
from lightning_sparse.testing import (
    BATCHES,
    Manual,
    Toy,
    differences,
    fit,
    loader,
    method_of,
    state_of,
    toy,
    trainer,
    zeros_hold,
)
from tests.helpers.methods import FeaturePenalty, L2Penalty, UnitNorm

OLD = tuple(map(int, L.__version__.split(".")[:2])) < (2, 6)


def ema() -> list[L.Callback]:
    if not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    return [L.pytorch.callbacks.EMAWeightAveraging(decay=0.9)]


SETTINGS: dict[str, tuple[Callable[[], list[L.Callback]], dict[str, Any]]] = {
    "accumulation": (list, {"accumulate_grad_batches": 2}),
    "accumulation schedule": (lambda: [GradientAccumulationScheduler({0: 1, 1: 2})], {}),
    "steps": (list, {"max_steps": 10, "max_epochs": -1}),
    "average": (ema, {}),
    "clipping": (list, {"gradient_clip_val": 0.1}),
    "validation inside epochs": (list, {"val_check_interval": 2}),
    "bf16": (list, {"precision": "bf16-mixed"}),
}
METHODS: dict[str, Callable[[], L.Callback]] = {
    "magnitude": lambda: MagnitudePruning(0.9, start=0.1, end=1.0),
    "epochs": lambda: MagnitudePruning(0.9, start=0, end=1, every="1 epoch", schedule="linear"),
    "rigl": lambda: RigL(0.9, every="2 steps"),
    "steps": lambda: MagnitudePruning(0.9, start=0, end=1, every="3 steps", schedule="linear"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_resume(setting: str, method: str, tmp_path: Path) -> None:
    extra, options = SETTINGS[setting]
    make = METHODS[method]
    first = [make(), *extra()]
    module = toy("adamw")
    files = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    runner = fit(module, *first, files, **options)
    expected = state_of(module, runner, method_of(first))
    stops = sorted({1, BATCHES // 2 + 1, BATCHES, runner.global_step - 2})
    for step in stops[(list(SETTINGS).index(setting) + list(METHODS).index(method)) % 2 :: 2]:
        torch.manual_seed(step)
        again = [make(), *extra()]
        module = toy("adamw", seed=step)
        resumed = fit(module, *again, ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert resumed.global_step == runner.global_step
        found = differences(expected, state_of(module, resumed, method_of(again)))
        assert found == [], f"resumed at step {step}"


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_resume_with_two_optimizers(tmp_path: Path) -> None:
    first = MagnitudePruning(0.9)
    module = Manual()
    module.load_state_dict(toy().state_dict())
    runner = fit(module, first, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    expected = state_of(module, runner, first)
    steps = sorted(int(file.stem.split("=")[1]) for file in tmp_path.glob("*.ckpt"))
    for step in (steps[1], steps[len(steps) // 2]):
        again, other = MagnitudePruning(0.9), Manual()
        fit(other, again, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert differences(expected["weights"], dict(other.state_dict())) == []
        assert differences(expected["memory"], [again.memorize()]) == []


@pytest.mark.parametrize("make", [lambda: L2Penalty(0.1), lambda: FeaturePenalty(0.1), UnitNorm])
def test_methods_without_masks_resume(make: Callable[[], L.Callback], tmp_path: Path) -> None:
    module = toy()
    fit(module, make(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    for step in (2, BATCHES, BATCHES + 1):
        torch.manual_seed(step)
        other = toy(seed=step)
        fit(other, make(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert differences(dict(module.state_dict()), dict(other.state_dict())) == []


@pytest.mark.skipif(OLD, reason="before 2.6, Lightning opens loaders in another order when it resumes")
@pytest.mark.parametrize("ordinary", ["validation", "training"])
def test_ordinary_loaders(ordinary: str, tmp_path: Path) -> None:
    """They draw from the global generators when they are opened; exact from the end of an epoch on."""
    images, labels = torch.rand(32, 1, 8, 8), torch.randint(0, 4, (32,))

    def run(module: Toy, *callbacks: L.Callback, ckpt_path: Any = None) -> None:
        plain = DataLoader(TensorDataset(images, labels), 8, shuffle=ordinary == "training")
        train, val = (plain, loader(1)) if ordinary == "training" else (loader(), plain)
        trainer(*callbacks).fit(module, train, val, ckpt_path=ckpt_path)

    module = toy()
    run(module, MagnitudePruning(0.9), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    for epoch in (0, 1):
        torch.manual_seed(100 + epoch)
        other = toy(seed=3)
        run(other, MagnitudePruning(0.9), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert differences(dict(module.state_dict()), dict(other.state_dict())) == []


def test_a_longer_run_keeps_the_schedule_it_was_begun_with(tmp_path: Path) -> None:
    first = MagnitudePruning(0.9, start=0, end=1)
    fit(toy(), first, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1))
    again = MagnitudePruning(0.9, start=0, end=1)
    seen: list[int] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(again.masks.kept)

    fit(toy(), again, Note(), ckpt_path=tmp_path / "step=5.ckpt", max_epochs=6)
    assert seen[3 * BATCHES - 5 - 1] == first.masks.kept  # at the step at which the first run ended
    assert set(seen[3 * BATCHES - 5 :]) == {first.masks.kept}


def test_a_run_that_became_too_short_for_its_schedule(tmp_path: Path) -> None:
    fit(
        toy(),
        MagnitudePruning(0.9),
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1),
        max_epochs=10,
    )
    with pytest.raises(ValueError, match=r"ends its schedule at 80% of the run .* but training now ends at 30% of that"):
        fit(toy(), MagnitudePruning(0.9), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=3)


@pytest.mark.parametrize("change", [{"batch_size": 16}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 3}])
def test_another_batch_size_is_no_shorter_run(change: dict[str, Any], tmp_path: Path) -> None:
    fit(toy(), MagnitudePruning(0.9), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    again = MagnitudePruning(0.9)
    batch_size = change.pop("batch_size", 8)
    fit(toy(), again, ckpt_path=tmp_path / "epoch=0.ckpt", batch_size=batch_size, **change)
    assert again.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_a_checkpoint_of_a_version_with_fewer_arguments() -> None:
    method = MagnitudePruning(0.9)
    fit(toy(), method)
    saved = method.state_dict()
    del saved["config"]["structure"]
    method.chosen = find_targets(toy())
    method.brought = saved
    method.check_brought()
    del saved["config"]["sparsity"]
    with pytest.raises(ValueError, match=r"sparsity=0.9 \(checkpoint: None\)"):
        method.check_brought()


@pytest.mark.filterwarnings("ignore:.*starts in the middle")
def test_a_checkpoint_of_another_run_brings_no_stale_masks(tmp_path: Path) -> None:
    fit(toy(), ModelCheckpoint(tmp_path, "dense"), max_epochs=1)
    method = MagnitudePruning(0.9)
    fit(toy(), method)
    seen: list[float] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen.append(method.masks.sparsity)
            assert zeros_hold(method, pl_module)

    fit(toy(), method, Note(), ckpt_path=tmp_path / "dense.ckpt", max_epochs=5)
    assert seen[0] < 0.5


@pytest.mark.filterwarnings("ignore:.*starts in the middle")
def test_the_same_trainer_with_other_weights_is_projected() -> None:
    method = MagnitudePruning(0.9)
    module = toy()
    runner = fit(module, method)
    module.load_state_dict(toy(seed=5).state_dict())
    holds: list[bool] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            holds.append(zeros_hold(method, pl_module))

    runner.callbacks.append(Note())  # type: ignore[attr-defined]
    runner.fit_loop.max_epochs = 4
    runner.fit(module, loader(), loader(1))
    assert holds == [True] * BATCHES


def test_a_finished_run_that_is_loaded_and_saved_again_loses_nothing(tmp_path: Path) -> None:
    method = MagnitudePruning(0.9)
    fit(toy(), method, ModelCheckpoint(tmp_path, "last"))
    again = MagnitudePruning(0.9)
    runner = fit(toy(), again, ckpt_path=tmp_path / "last.ckpt")
    assert differences(method.state_dict(), again.state_dict()) == []
    runner.save_checkpoint(tmp_path / "copy.ckpt")
    saved = torch.load(tmp_path / "copy.ckpt", weights_only=True)
    assert differences(method.state_dict(), saved["callbacks"][method.state_key]) == []


def test_numbers_of_numpy_do_not_spoil_the_checkpoint(tmp_path: Path) -> None:
    method = RandomSparsity(np.float64(0.5), seed=np.int64(3))  # type: ignore[arg-type]
    fit(toy(), method, ModelCheckpoint(tmp_path, "last"))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"][method.state_key]["config"]["sparsity"] == 0.5


def test_arguments_that_are_not_stored_are_noticed_at_once() -> None:
    class Forgetful(L2Penalty):
        def __init__(self, color: str, **options: Any) -> None:
            super().__init__(0.1, **options)

    with pytest.raises(ValueError, match=r"Forgetful must store its arguments under their own names; \['color'\] are not"):
        fit(toy(), Forgetful("red"))
    assert set(L2Penalty(0.5, targets=["net.0"]).config()) == {"strength", "targets"}


@pytest.mark.gpu
def test_resume_on_a_gpu(tmp_path: Path) -> None:
    on_gpu: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "precision": "16-mixed"}
    first, module = MagnitudePruning(0.9), toy("adamw")
    torch.use_deterministic_algorithms(True, warn_only=True)
    fit(module, first, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1), **on_gpu)
    again, other = MagnitudePruning(0.9), toy("adamw", seed=1)
    fit(other, again, ckpt_path=tmp_path / "step=5.ckpt", **on_gpu)
    assert differences(first.memorize(), again.memorize()) == []
    for name, value in module.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_the_comparison_sees_a_single_bit() -> None:
    state = {"a": [torch.ones(2), {"b": 1}]}
    other = copy.deepcopy(state)
    other["a"][0][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))  # type: ignore[index]
    assert differences(state, state) == []
    assert differences(state, other) == ["/a/0"]
