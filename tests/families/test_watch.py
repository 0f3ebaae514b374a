"""The second pass over the weights goes where it is nothing, and comes back where it is something."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sparse import MagnitudePruning, RandomSparsity, RigL
from lightning_sparse.core import MaskSet, Mold, Target
from lightning_sparse.families import Masked
from lightning_sparse.families.watch import Watch
from lightning_sparse.loop import Step
from lightning_sparse.loop.ownership import Ownership
from lightning_sparse.testing import Toy, fit, loader, network, trainer
from lightning_sparse.testing.state import nonzero

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda ps: torch.optim.Adam(ps, 1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, 1e-2),
    "nadam": lambda ps: torch.optim.NAdam(ps, 1e-2),
    "radam": lambda ps: torch.optim.RAdam(ps, 1e-2),
    "adamax": lambda ps: torch.optim.Adamax(ps, 1e-2),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 1e-2),
    "adadelta": lambda ps: torch.optim.Adadelta(ps),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 1e-2, momentum=0.9, centered=True),
    "rprop": lambda ps: torch.optim.Rprop(ps, 1e-2),
}


class Noisy(torch.optim.SGD):
    """Moves every entry, from some step on."""

    def __init__(self, *args: Any, after: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.after, self.steps = after, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        if self.steps > self.after:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.add_(0.01)
        return loss


class Model(Toy):
    def __init__(self, make: Any) -> None:
        super().__init__(net=network(dropout=0))
        self.make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())  # type: ignore[no-any-return]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What masks are pressed on, call by call."""
    seen: list[str] = []
    for what in ("gradients", "weights"):
        original = getattr(Mold, f"press_{what}")

        def press(self: Mold, what: str = what, original: Any = original) -> None:
            seen.append(what)
            original(self)

        monkeypatch.setattr(Mold, f"press_{what}", press)
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_pass_per_step(name: str, passes: list[str]) -> None:
    method, module = MagnitudePruning(0.9, start=0.0, end=0.3, every="1 epochs"), Model(OPTIMIZERS[name])
    fit(module, method, max_epochs=4)
    assert passes == ["gradients"] * method.steps
    assert not method.watch.moved
    assert nonzero(method, module) == []


class Witness(L.Callback):
    """Looks wherever somebody may look."""

    def __init__(self, method: Masked) -> None:
        self.method, self.sights = method, dict[str, list[str]]()

    def look(self, moment: str, module: L.LightningModule) -> None:
        self.sights.setdefault(moment, []).extend(nonzero(self.method, module))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.look("validation", pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look("epoch end", pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.look("batch end", pl_module)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("make", [MagnitudePruning, RigL])
def test_an_optimizer_that_moves_everything(make: Any, after: int, caplog: pytest.LogCaptureFixture) -> None:
    method, module = make(0.8), Model(lambda ps: Noisy(ps, lr=0.01, after=after))
    witness = Witness(method)
    with caplog.at_level("INFO"):
        fit(module, method, witness, max_epochs=3)
    assert method.watch.moved
    assert caplog.text.count("moves pruned entries of 'net.") == 1
    assert {moment: sights for moment, sights in witness.sights.items() if moment != "batch end"} == {
        "validation": [],
        "epoch end": [],
    }
    if after == 0:
        assert witness.sights["batch end"] == []
        assert "Noisy (or something else that writes to the weights) moves pruned" in caplog.text


def test_later_noise_is_found_by_the_sample_before_the_epoch_ends(caplog: pytest.LogCaptureFixture) -> None:
    method, module = MagnitudePruning(0.8, start=0.0, end=0.0), Model(lambda ps: Noisy(ps, lr=0.01, after=2))
    witness = Witness(method)
    fit(module, method, witness, max_epochs=1, log_every_n_steps=1)
    assert len(witness.sights["batch end"]) == 0


class Writer(L.Callback):
    """Writes to all weights once, after a batch."""

    def __init__(self, secretly: bool) -> None:
        self.secretly = secretly

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 5:
            for weight in pl_module.parameters():
                (weight.data if self.secretly else weight).add_(0.1)


@pytest.mark.parametrize("secretly", [False, True])
def test_what_others_write_is_put_right(secretly: bool) -> None:
    method, module = MagnitudePruning(0.8, start=0.0, end=0.0), Model(OPTIMIZERS["sgd"])
    seen: list[list[str]] = []

    class After(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            if trainer.global_step > 5:
                seen.append(nonzero(method, pl_module))

    witness = Witness(method)
    fit(module, method, After(), witness, Writer(secretly), max_epochs=3)
    assert witness.sights["validation"] == witness.sights["epoch end"] == []
    if not secretly:
        assert all(sights == [] for sights in seen), "tensors tell that somebody has written"
    assert nonzero(method, module) == []


def test_a_checkpoint_of_the_weights_alone_is_clean(tmp_path: Any) -> None:
    method, module = MagnitudePruning(0.8, start=0.0, end=0.0), Model(lambda ps: Noisy(ps, lr=0.01, after=5))
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_weights_only=True, save_top_k=-1)
    trainer(method, keep, max_epochs=2, enable_checkpointing=True).fit(module, loader(), loader())
    for file in tmp_path.glob("*.ckpt"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(bool((state[name][method.masks.dropped(name)] == 0).all()) for name in method.masks)
    assert len([*tmp_path.glob("*.ckpt")]) == 2


def test_new_parameter_groups_are_looked_at(passes: list[str]) -> None:
    method, module = MagnitudePruning(0.8, start=0.0, end=0.0), Model(OPTIMIZERS["sgd"])
    looks: list[str] = []
    original = MaskSet.astray

    class Grow(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})

    class Counting(MagnitudePruning):
        def project(self, step: Any) -> None:
            before = len(looks)
            super().project(step)
            counts.append(len(looks) - before)

    def astray(self: MaskSet, tensors: Any) -> str | None:
        looks.append("all" if len(tensors) > 1 else "one")
        return original(self, tensors)

    counts: list[int] = []
    method = Counting(0.8, start=0.0, end=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskSet, "astray", astray)
        fit(module, method, Grow(), max_epochs=1, log_every_n_steps=100)
    assert counts == [1, 0, 1, 0]


def test_not_a_number_is_not_zero() -> None:
    masks = MaskSet({"w": torch.ones(2)})
    masks.replace({"w": torch.tensor([True, False])})
    for value in (torch.nan, -0.0, 1e-45, torch.inf):
        assert masks.astray({"w": torch.tensor([1.0, value])}) == "w"
    assert masks.astray({"w": torch.tensor([torch.nan, 0.0])}) is None


class Closing(Toy):
    """Steps through Lightning at first, then past it, where nobody sees the gradients."""

    def __init__(self) -> None:
        super().__init__(net=network(dropout=0))
        self.automatic_optimization = False

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = super(Closing, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        seen = self.current_epoch == batch_idx == 0
        optimizer = self.optimizers(use_pl_optimizer=seen)
        if seen:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)


def test_steps_that_nobody_announces() -> None:
    method = MagnitudePruning(0.8, start=0.0, end=0.0)
    witness = Witness(method)
    fit(Closing(), method, witness, max_epochs=2, log_every_n_steps=100)
    assert witness.sights["batch end"] == []


def test_weights_that_join_an_optimizer_are_watched_too() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer, watch = torch.optim.SGD([first, second], 0.1), Watch()
    watch.note(Step(optimizer, {"first": first}))
    both = Step(optimizer, {"first": first, "second": second})
    watch.note(both)
    assert not watch.written(both)
    with torch.no_grad():
        second.add_(1)
    assert watch.written(both)


def test_groups_that_change_are_checked_anew() -> None:
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [first, second]}, {"params": []}], 0.1)
    method, watch = RandomSparsity(0.5), Watch()
    method.chosen = [Target("first", first), Target("second", second)]
    ownership = Ownership([method])

    def step() -> Step:
        return Step(optimizer, ownership.of(optimizer).weights[id(method)])

    watch.trust(step(), 1)
    assert watch.trusts(step(), 1)
    assert not watch.trusts(step(), 2), "the masks have changed"
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    assert not watch.trusts(step(), 1)
