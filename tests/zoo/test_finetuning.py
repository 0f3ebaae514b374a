"""Beside Lightning's `BackboneFinetuning`: what is frozen at the start stays dense, and all else is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import MagnitudePruning
from lightning_sparse.testing import differences, loader, state_of, trainer


class Tuned(L.LightningModule):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Thawed(BackboneFinetuning):
    """Thaws again what a resume after the thaw finds frozen; Lightning gives it back to the optimizer, but no more."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if len(trainer.optimizers[0].param_groups) > 1:
            assert isinstance(pl_module, Tuned)
            self.make_trainable(pl_module.backbone)


def fit(
    ckpt_path: Any = None, folder: Path | None = None, kind: type[BackboneFinetuning] = BackboneFinetuning
) -> tuple[Tuned, MagnitudePruning, L.Trainer]:
    """Four epochs; the backbone is thawed in the third."""
    module, method = Tuned(), MagnitudePruning(0.9)
    tuning = kind(unfreeze_backbone_at_epoch=2, backbone_initial_lr=1e-3, verbose=False)
    files = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
    runner = trainer(tuning, method, *files, max_epochs=4)
    runner.fit(module, loader(), ckpt_path=ckpt_path)
    return module, method, runner


def zeros(*weights: Tensor) -> int:
    return sum(int((weight == 0).count_nonzero()) for weight in weights)


def test_what_is_thawed_later_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module, method, _ = fit()
    assert "MagnitudePruning leaves out frozen weights (2 tensors, 1,280 entries)" in caplog.text
    before = Tuned()
    for name in ("1.weight", "3.weight"):
        learned = module.backbone.get_parameter(name)
        assert learned.requires_grad
        assert not learned.equal(before.backbone.get_parameter(name))
        assert zeros(learned) == 0
    assert zeros(module.head[0].weight, module.head[2].weight) == round(0.9 * 320)
    assert [*method.shapes] == ["head.0.weight", "head.2.weight"]
    assert method.left_frozen == ["backbone.1.weight", "backbone.3.weight"]


@pytest.mark.parametrize(("step", "kind"), [(3, BackboneFinetuning), (6, BackboneFinetuning), (10, Thawed), (13, Thawed)])
def test_resume_before_and_after_the_thaw(step: int, kind: type[BackboneFinetuning], tmp_path: Path) -> None:
    module, method, runner = fit(folder=tmp_path, kind=kind)
    resumed, again, other = fit(tmp_path / f"step={step}.ckpt", kind=kind)
    assert other.global_step == runner.global_step == 16
    assert again.left_frozen == method.left_frozen
    assert differences(state_of(module, runner, method), state_of(resumed, other, again)) == []


def test_lightning_alone_leaves_the_backbone_frozen_after_a_resume(tmp_path: Path) -> None:
    """Which is not ours to mend: what we promise of the head holds."""
    fit(folder=tmp_path)
    resumed, method, _ = fit(tmp_path / "step=10.ckpt")
    assert zeros(resumed.backbone[1].weight, resumed.backbone[3].weight) == 0
    assert zeros(resumed.head[0].weight, resumed.head[2].weight) == round(0.9 * 320)
    assert method.left_frozen == ["backbone.1.weight", "backbone.3.weight"]
