"""Penalties on weights: as gradients, as proximal steps, and what the prune leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sparse import MagnitudePruning, WeightPenalty
from lightning_sparse.functional import exact_count
from lightning_sparse.testing import BATCHES, Toy, fit, toy
from tests.helpers.modules import double

RATE = 0.05


class Plain(Toy):
    """SGD without momentum and weight decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Still(Plain):
    """A loss that pulls at nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * self.loss(batch)


def matrices(module: Toy) -> list[Tensor]:
    return [p for p in module.parameters() if p.ndim > 1]


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda w: w.abs().sum(),
    "l2": lambda w: w.square().sum() / 2,
    "group_lasso": lambda w: w.flatten(1).shape[1] ** 0.5 * w.flatten(1).norm(dim=1).sum(),
    "hoyer": lambda w: w.abs().sum() ** 2 / w.square().sum(),
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_equals_the_one_written_into_the_loss(kind: str, accumulate: int) -> None:
    class Written(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) + 0.01 * sum(WRITTEN[kind](w) for w in matrices(self))

    reference, module, plain = double(Written), double(Toy), double(Toy)
    fit(reference, accumulate_grad_batches=accumulate)
    fit(module, WeightPenalty(penalty=kind, strength=0.01, end=1.0), accumulate_grad_batches=accumulate)
    fit(plain, accumulate_grad_batches=accumulate)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.allclose(plain.net[0].weight, reference.net[0].weight, rtol=1e-3), "the penalty does nothing here"


def test_a_proximal_step_uses_the_learning_rate_of_the_step() -> None:
    """Without a loss, n steps at a rate that halves are one soft threshold by the sum of all rates."""

    class Halving(Still):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = double(Halving)
    before = [w.detach().clone() for w in matrices(module)]
    fit(module, WeightPenalty(strength=0.3, proximal=True, end=1.0), max_epochs=1)
    reach = 0.3 * RATE * (1 + 1 / 2 + 1 / 4 + 1 / 8)
    for old, new in zip(before, matrices(module), strict=True):
        torch.testing.assert_close(new.detach(), old.sign() * (old.abs() - reach).clamp(min=0), rtol=1e-9, atol=1e-12)
        assert 0 < int((new == 0).count_nonzero()) < new.numel()


def test_group_lasso_removes_whole_channels() -> None:
    module = double(Still)
    norms = module.net[2].weight.detach().flatten(1).norm(dim=1)
    boundary = float(norms.sort().values[3:5].mean())
    strength = boundary / (RATE * 3 * BATCHES * 72**0.5)
    fit(module, WeightPenalty(penalty="group_lasso", strength=strength, proximal=True, end=1.0, targets=["net.2"]))
    alive = module.net[2].weight.detach().flatten(1).any(1)
    assert alive.tolist() == (norms > boundary).tolist()
    assert int(alive.count_nonzero()) == 4


def test_the_penalty_ends_with_the_prune() -> None:
    """Without a loss the trajectory is known: four steps of the sign, then nothing but the prune."""
    module = double(Still)
    before = torch.cat([w.detach().flatten() for w in matrices(module)])
    method = WeightPenalty(0.5, strength=1e-3, end="4 steps")
    fit(module, method)
    after = torch.cat([w.detach().flatten() for w in matrices(module)])
    expected = before - 4 * RATE * 1e-3 * before.sign()
    kept = after != 0
    assert int(kept.count_nonzero()) == len(after) - exact_count(0.5, len(after))
    torch.testing.assert_close(after[kept], expected[kept], rtol=1e-9, atol=1e-12)
    assert expected[~kept].abs().max() <= expected[kept].abs().min()


class Note(L.Callback):
    """Whether the penalty pulls at the next step."""

    def __init__(self, method: WeightPenalty, stop: int = -1) -> None:
        self.method, self.stop = method, stop
        self.pulls: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.pulls.append(self.method.pulls)
        trainer.should_stop = len(self.pulls) == self.stop


@pytest.mark.parametrize(
    ("options", "pulling"),
    [({"end": 1.0}, 12), ({}, 9), ({"end": "4 steps"}, 3), ({"sparsity": 0.5}, 9), ({"sparsity": 0.5, "end": 1}, 11)],
)
def test_when_the_penalty_ends(options: dict[str, Any], pulling: int) -> None:
    """The step that reaches the end is the last one with the penalty; 0.8 of twelve is reached by the tenth."""
    note = Note(WeightPenalty(**options))
    fit(toy(), note.method, note)
    assert note.pulls == [True] * pulling + [False] * (12 - pulling)


def test_without_a_prune_the_length_of_the_run_may_be_unknown() -> None:
    module, note = toy(), Note(WeightPenalty(strength=1.0, proximal=True, end=1.0), stop=6)
    fit(module, note.method, note, max_epochs=-1)
    assert note.pulls == [True] * 6
    assert any(not w.all() for w in matrices(module))


def test_beside_gradual_pruning() -> None:
    """Without a sparsity of its own it owns no masks and shares weights with any method."""
    module, method = toy(), MagnitudePruning(0.9)
    fit(module, WeightPenalty(penalty="hoyer", strength=0.01), method)
    assert sum(int(w.count_nonzero()) for w in matrices(module)) == method.masks.kept == method.goal["total"]
