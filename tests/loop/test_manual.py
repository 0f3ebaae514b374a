"""Manual optimization, unusual modules and unusual data."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import MagnitudePruning, RandomSparsity
from lightning_sparse.testing import BATCHES, Toy, fit, loader, network, toy, trainer
from tests.helpers.methods import FeaturePenalty, Swap
from tests.helpers.modules import AutomaticMixin


class TwoNets(Toy):
    """Both losses are made before the first step, so the second needs its weights unchanged until its own step."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__(net=nn.ModuleList([network(dropout=0), network(dropout=0)]))

    def configure_optimizers(self) -> Any:
        return tuple(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in self.net)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        losses = [nn.functional.cross_entropy(net(x), y) for net in self.net]
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_losses_made_before_the_steps() -> None:
    method = MagnitudePruning(0.9)
    module = TwoNets()
    fit(module, method)
    assert method.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    weights = dict(module.named_parameters())
    assert not any(weights[name][method.masks.dropped(name)].any() for name in method.masks)


def test_steps_past_lightning_are_silenced_too() -> None:
    class Direct(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    method, penalty = MagnitudePruning(0.9), Swap()
    module = Direct("adam")
    runner = fit(module, method, penalty)
    assert penalty.events == ["before", "after"] * 12
    assert method.steps == 12
    assert method.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    for name in method.masks:
        weight = dict(module.named_parameters())[name]
        assert not runner.optimizers[0].state[weight]["exp_avg"][method.masks.dropped(name)].any()


def test_steps_past_lightning_with_a_closure() -> None:
    class Closed(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    method, module = MagnitudePruning(0.9), Closed("adam")
    runner = fit(module, method)
    assert method.steps == 12
    for name in method.masks:
        weight = dict(module.named_parameters())[name]
        assert not weight[method.masks.dropped(name)].any()
        assert not runner.optimizers[0].state[weight]["exp_avg"][method.masks.dropped(name)].any()


@pytest.mark.parametrize("base_has_been_used", [False, True])
def test_an_optimizer_that_calls_its_base_class_steps_once(base_has_been_used: bool) -> None:
    """Torch hooks the `step` of every class of which an instance has been made; both may fire in one step."""

    class Base(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    class Chatty(Base):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    class Module(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Chatty(self.parameters(), lr=0.01)

    if base_has_been_used:
        Base([nn.Parameter(torch.zeros(1))])
        torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    method = Swap()
    fit(Module(), method, max_epochs=1)
    assert method.events == ["before", "after"] * BATCHES


def test_a_number_of_steps_where_only_every_fourth_batch_steps() -> None:
    class Patient(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            if batch_idx % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

    method = MagnitudePruning(0.9, start=0, end=0.8, schedule="linear")
    full: list[int] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if method.masks.sparsity > 0.899:
                full.append(trainer.global_step)

    fit(Patient(), method, Note(), max_epochs=-1, max_steps=20)
    assert full[0] == 16


def test_data_without_a_length_and_a_number_of_epochs() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(loader())

    method = MagnitudePruning(0.9)
    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    runner = trainer(method)
    runner.fit(toy(), data, loader(1))
    assert method.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(ValueError, match="The data have no length"):
        trainer(MagnitudePruning(0.9), max_epochs=1).fit(toy(), data, loader(1))


def test_a_training_step_without_batch_idx() -> None:
    class Short(Toy):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return self.loss(batch)

    short, usual = Short(net=network(dropout=0)), Toy(net=network(dropout=0))
    usual.load_state_dict(short.state_dict())
    fit(short, FeaturePenalty(0.5))
    fit(usual, FeaturePenalty(0.5))
    assert short.net[0].weight.equal(usual.net[0].weight)


def test_a_module_with_a_part_called_module_beside_swa() -> None:
    class Nested(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.net = self.net, nn.Identity()

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.module(batch[0]), batch[1])

    method = MagnitudePruning(0.5)
    fit(Nested(), method, L.pytorch.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=4)
    assert method.masks.sparsity == 0.5


def test_the_mixin_outside_of_a_fit() -> None:
    module = AutomaticMixin()
    assert float(module.sparsity_penalty()) == 0
    assert module.sparsity_summary().split() == ["layer", "kept", "target", "density"]


def test_a_refusal_of_one_method_leaves_the_others_unbegun() -> None:
    module = toy()
    with torch.no_grad():
        module.net[6].weight[0, 0] = torch.nan
    before = module.net[2].weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        fit(module, RandomSparsity(0.5, targets=["net.2"]), MagnitudePruning(0.5, start=0, end=0, targets=["net.6"]))
    assert module.net[2].weight.equal(before)
