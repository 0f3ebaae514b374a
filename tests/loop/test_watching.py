"""Stations that only look: what training_step returned, when schedulers have moved, what is shown and logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import BATCHES, Toy, fit, loader, trainer
from tests.helpers.methods import FeaturePenalty


class Dictionary(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.loss(batch), "extra": 1}


class Noting(Sparsifier):
    """Exercises the stations that only look."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[float] = []
        self.rates: list[float] = []

    def batch_end(self, output: Any, batch: Any) -> None:
        assert len(batch) == 2
        assert not output["loss"].requires_grad
        self.losses.append(output["loss"].item())
        self.rates.append(self.run.optimizers[0].param_groups[0]["lr"])

    def headline(self) -> dict[str, str]:
        return {"round": f"{1 + self.run.trainer.current_epoch} of 2"}

    def numbers(self) -> dict[str, float]:
        return {"batches": float(len(self.rates))}


class Scheduled(Dictionary):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("with_penalty", [False, True])
def test_methods_may_look(with_penalty: bool) -> None:
    class Kept(Scheduled):
        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            if torch.is_grad_enabled():
                kept.append(loss.item())
            return loss

        def on_train_batch_end(self, *args: Any) -> None:
            bars.append(self.trainer.progress_bar_callback.get_metrics(self.trainer, self))

    kept: list[float] = []
    bars: list[dict[str, Any]] = []
    method = Noting()
    bar = TQDMProgressBar()
    runner = trainer(method, *[FeaturePenalty(0.5)] * with_penalty, bar, max_epochs=2, enable_progress_bar=True)
    runner.fit(Kept(), loader(), loader(1))
    assert method.losses == kept  # of the loss alone
    assert method.rates == [0.5 * 0.5 ** (step + 1) for step in range(2 * BATCHES)]
    assert [shown["round"] for shown in bars] == ["1 of 2"] * BATCHES + ["2 of 2"] * BATCHES
    assert "get_metrics" not in vars(bar)
    assert runner.callback_metrics["Noting/batches"] == BATCHES + 1
    assert "round" not in runner.logged_metrics


def test_methods_may_look_at_manual_optimization() -> None:
    class ByHand(Dictionary):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch).detach()}

    method, module = Noting(), ByHand()
    fit(module, method, max_epochs=1)
    assert len(method.losses) == BATCHES
    assert "training_step" not in vars(module)
