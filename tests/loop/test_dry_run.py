"""Trying something on the training set by oneself: what comes out is right, and nobody notices."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sparse.loop.dry_run import dry_run, loss_of, record_calls, refuse_unrepeatable_data, size_of, training_outputs
from lightning_sparse.testing import BATCHES, Toy, loader, toy, trainer
from tests.helpers.data import DATA, Talkative, run


class Try(L.Callback):
    """Goes through the training set in the second epoch, in train mode, and leaves the copy changed."""

    def __init__(self, inside: bool = False) -> None:
        self.inside = inside
        self.outputs: list[Any] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1 and not self.inside:
            self.go_through(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 2 and self.inside:
            self.go_through(trainer, pl_module)

    def go_through(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with dry_run(trainer, pl_module) as twin:
            self.outputs = list(training_outputs(trainer, twin))
            loss_of(self.outputs[0][1]).backward()  # type: ignore[union-attr]
            assert all(parameter.grad is not None for parameter in twin.parameters())
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("inside", "precision"), [(False, "32-true"), (False, "bf16-mixed"), (True, "32-true")])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*is multi-threaded, use of fork")
def test_nobody_notices(data: str, inside: bool, precision: str) -> None:
    plain, watched = Talkative(), Talkative()
    watched.load_state_dict(plain.state_dict())
    spy = Try(inside)
    expected = run(plain, DATA[data], precision=precision)
    found = run(watched, DATA[data], spy, precision=precision)
    assert len(spy.outputs) == BATCHES
    assert all(output["epoch"] == 1 and output["trainer"] == 2 for _, output in spy.outputs)
    assert expected["logged"] == found["logged"]
    assert expected["random"] == found["random"]
    assert all(expected["weights"][name].equal(value) for name, value in found["weights"].items())


def test_the_batches_are_those_of_the_epoch_that_begins() -> None:
    seen: list[Tensor] = []

    class Seeing(Talkative):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.training and torch.is_grad_enabled() and self.current_epoch == 1:
                seen.append(batch[1])
            return super().training_step(batch, batch_idx)

    spy = Try()
    run(Seeing(), loader, spy)
    tried, trained = seen[:BATCHES], seen[BATCHES:]
    assert all(a.equal(b) for a, b in zip(tried, trained, strict=True))


def test_a_pass_of_its_own() -> None:
    class Counting(DataLoader[Any]):
        opened = 0

        def __iter__(self) -> Any:
            self.opened += 1
            return super().__iter__()

    data = Counting(TensorDataset(torch.rand(32, 1, 8, 8), torch.randint(0, 4, (32,))), 8)
    run(Talkative(), data, Try())
    assert data.opened == 2  # once per epoch


def test_limits_and_several_loaders() -> None:
    class Several(Talkative):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch["a"] is not None
            assert batch["b"] is not None
            return super().training_step(batch["a"], batch_idx)

    spy = Try()
    run(Talkative(), loader, spy, limit_train_batches=2)
    assert len(spy.outputs) == 2
    spy = Try()
    run(Several(), CombinedLoader({"a": loader(), "b": loader(2)}, "min_size"), spy)
    assert len(spy.outputs) == 2


def test_manual_optimization_moves_nothing() -> None:
    class ByHand(Toy):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            loss = self.loss(batch)
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            scheduler.step()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    class Look(Try):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before = copy.deepcopy(
                [trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]
            )
            with dry_run(trainer, pl_module) as twin:
                self.outputs = list(training_outputs(trainer, twin))
            after = [trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]
            assert str(before) == str(after)

    spy, module, twin = Look(), ByHand(), ByHand()
    module.net[5], twin.net[5] = nn.Identity(), nn.Identity()
    twin.load_state_dict(module.state_dict())
    expected, found = run(module, loader), run(twin, loader, spy)
    assert all(loss_of(output) is not None for _, output in spy.outputs)
    assert all(expected["weights"][name].equal(value) for name, value in found["weights"].items())


def test_a_compiled_module_is_copied_without_its_compilation() -> None:
    spy, module = Try(), toy()
    run(torch.compile(module, backend="eager"), loader, spy)  # type: ignore[arg-type]
    assert len(spy.outputs) == BATCHES
    assert any(parameter.any() for parameter in module.parameters())


def test_hooks_that_lead_to_callbacks_do_not_copy_them() -> None:
    class Hooked(Try):
        copies = 0

        def hook(self, *args: Any) -> None:
            pass

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.net[1].register_forward_hook(self.hook)  # type: ignore[operator,index,union-attr]

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    spy = Hooked()
    run(Talkative(), loader, spy)
    assert len(spy.outputs) == BATCHES


class Once(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return torch.rand(1, 8, 8), 0


class Refuse(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        refuse_unrepeatable_data(trainer, pl_module, "Method")


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Once can be read only once; use a loader that restarts"):
        trainer(Refuse(), max_steps=2).fit(toy(), DataLoader(Once(), 8), loader(1))

    class Uncopyable(Talkative):
        def __init__(self) -> None:
            super().__init__()
            self.generator = (i for i in range(3))

    with pytest.raises(ValueError, match=r"Uncopyable cannot be copied with copy.deepcopy"):
        run(Uncopyable(), loader, Try())

    class Fetching(Toy):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(ValueError, match=r"which training_step\(dataloader_iter\) does not allow"):
        trainer(Refuse()).fit(Fetching(), loader(), loader(1))


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.rand(5, 2), 5),
        ((torch.rand(4, 2), torch.rand(3)), 4),
        ({"name": "x", "x": [torch.rand(7)]}, 7),
        (3, 1),
        ((), 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_size_of(batch: Any, size: int) -> None:
    assert size_of(batch) == size


def test_calls_are_those_of_the_largest_parts() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    x = torch.ones(5, 2)

    def run() -> None:
        net[1](torch.zeros(1, 3))
        net(input=x)
        net(torch.zeros(5, 2))
        x.zero_()

    (call,) = record_calls(net, ["1", "0", "", "1.0"], run)
    assert call.network == ""
    assert call.kwargs["input"].equal(torch.ones(5, 2)), "the first call, as it was"
    assert [call.network for call in record_calls(net, ["1.0", "1"], run)] == ["1"]
    assert not net._forward_pre_hooks
