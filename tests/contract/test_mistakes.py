"""The contract goes red: methods that break one promise each, and the sentence they get for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sparse.core import Position, lay_out
from lightning_sparse.families import Pruning
from lightning_sparse.functional import magnitude
from lightning_sparse.loop import Step
from lightning_sparse.testing import CHECKS, Case, check_method, run_check


class Honest(Pruning):
    def score(self, name: str, weight: Tensor) -> Tensor:
        return magnitude(weight)


# ---- 1 target -------------------------------------------------------------------------------------------------------


class KeepsOneMore(Honest):
    def begin(self) -> None:
        super().begin()
        self.goal = {**self.goal, "total": self.goal["total"] - 1}


# ---- 2 zeros --------------------------------------------------------------------------------------------------------


class LetsGradientsPass(Honest):
    """Weights are zero again after every step, but Adam remembers where they went."""

    def silence(self, step: Step) -> None:
        pass


class ProjectsAtTheEndOfTheBatch(LetsGradientsPass):
    """An earlier callback sees what the optimizer has made of dropped weights."""

    def project(self, step: Step) -> None:
        pass

    def batch_end(self, output: Any, batch: Any) -> None:
        self.masks.apply_(self.weights)


class SavesOthers(Honest):
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = {name: value + 1 for name, value in checkpoint["state_dict"].items()}


class DropsNothing(Honest):
    def evolve(self, position: Position) -> None:
        pass

    def conclude(self) -> None:
        pass


# ---- 3 resume -------------------------------------------------------------------------------------------------------


class CountsForItself(Honest):
    """What it has counted is in no checkpoint."""

    calls = 0

    def score(self, name: str, weight: Tensor) -> Tensor:
        self.calls += 1
        return magnitude(weight) * (1 + (torch.arange(weight.numel()).view(weight.shape) + self.calls) % 3)


class NeverRests(Honest):
    def evolve(self, position: Position) -> None:
        super().evolve(position)
        if position.epoch_start:
            self.set_masks({name: self.masks[name].roll(1) for name in self.masks})


# ---- 4 plain files --------------------------------------------------------------------------------------------------


class AddsABuffer(Honest):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        pl_module.register_buffer("mask", torch.ones(1))


class AddsAGroup(Honest):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


# ---- 5 ranks --------------------------------------------------------------------------------------------------------


class DrawsScores(Honest):
    def score(self, name: str, weight: Tensor) -> Tensor:
        return torch.rand_like(weight)


class DrawsWeights(Honest):
    @torch.no_grad()
    def batch_end(self, output: Any, batch: Any) -> None:
        for weight in self.weights.values() if self.at_target else ():  # after that, masks stay equal
            weight.mul_(1 + torch.rand(()) / 100)


# ---- 6 accumulation, precision, layout ------------------------------------------------------------------------------


class PenalizesEveryMicroBatch(Honest):
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for weight in self.weights.values():
            assert weight.grad is not None
            weight.grad += 0.01 * weight.detach()


class CountsInMemory(Honest):
    def score(self, name: str, weight: Tensor) -> Tensor:
        score = torch.empty_like(weight)
        score.as_strided((weight.numel(),), (1,)).copy_(torch.arange(weight.numel()))
        return score / weight.numel()


class SavesMemory(Honest):
    def begin(self) -> None:
        super().begin()
        for weight in self.weights.values():
            weight.data = weight.data.bfloat16()


# ---- 7 good neighbor ------------------------------------------------------------------------------------------------


class IgnoresAverages(Honest):
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self.masks.replace(masks)
        self.masks.apply_(self.weights)


class LeavesAHook(Honest):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        pl_module.register_forward_hook(lambda *_: None)


class CleansUpAtTheEndAlone(Honest):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.handle = pl_module.net[0].register_forward_hook(lambda *_: None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.handle.remove()


class RemembersTheLastFit(Honest):
    def forget(self) -> None:
        pass


class KnowsTheCompiler(Honest):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if pl_module._compiler_ctx is not None:
            batch[0].mul_(0.5)


class SavesWhoItIs(Honest):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "id": id(self)}


# ---- 8 refusals -----------------------------------------------------------------------------------------------------


class RenamesItsArgument(Honest):
    def __init__(self, density: float = 0.1, **options: Any) -> None:
        super().__init__(1 - density, **options)


class ChecksNothing(Honest):
    def check(self, *args: Any) -> None:
        self.window.resolve(args[0])
        self._plan = lay_out(self.quota, self.chosen)


class TakesAllInstead(Honest):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            super().on_fit_start(trainer, pl_module)
        except ValueError:
            self.targets = ["*"]
            super().on_fit_start(trainer, pl_module)


class HidesItsMasks(Honest):
    @property
    def mask_set(self) -> Any:
        return self.masks if len(self.masks) else None


class SkipsSetup(Honest):
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass


class ComparesNothing(Honest):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "config": self.config()})


MISTAKES: list[tuple[type[Honest], str, str]] = [
    (KeepsOneMore, "1-target-sgd", "KeepsOneMore has missed its target: 276 of the 275 promised are kept"),
    (LetsGradientsPass, "2-zeros-adam", "the optimizer's exp_avg of 'net.0.weight' is not zero where dropped"),
    (ProjectsAtTheEndOfTheBatch, "2-zeros-sgd", "is not zero where dropped"),
    (SavesOthers, "2-zeros-adamw", "The full checkpoint of step 3 has entries of"),
    (DropsNothing, "2-zeros-sgd", "DropsNothing has dropped nothing here; make it stronger"),
    (CountsForItself, "3-resume-sgd", "Resumed at step 4, it differs from the uninterrupted run in ['/weights/"),
    (NeverRests, "3-resume-after-the-end", "NeverRests has changed masks of"),
    (AddsABuffer, "4-plain-files-sgd", "The full checkpoint and the bare module differ in ['mask']"),
    (AddsAGroup, "4-plain-files-adam", "The optimizer's groups are [[0, 1, 2, 3, 4, 5, 6, 7], [8]]"),
    (DrawsScores, "5-ranks", "DrawsScores: the ranks hold different masks of 'net."),
    (DrawsWeights, "5-ranks", "The ranks differ in ['/2/weights/net.0.weight'"),
    (PenalizesEveryMicroBatch, "6-micro-batches", "The failure occurred for item ['net.0.bias']"),
    (CountsInMemory, "6-layout-of-memory", "With channels_last, other entries are dropped: ['/0/net.2.weight']"),
    (SavesMemory, "6-bf16", "are not in float32 anymore"),
    (IgnoresAverages, "7-moving-average-first-True", "At validation, ['net.0.weight'"),
    (LetsGradientsPass, "7-clipping", "shows gradients of dropped entries of 'net.0.weight' to clipping"),
    (ProjectsAtTheEndOfTheBatch, "7-manual-optimization", "are not zero where dropped"),
    (KnowsTheCompiler, "7-compiled", "Compiled, the module ends otherwise than the plain one"),
    (LeavesAHook, "7-two-fits", "LeavesAHook has left [\"forward_hooks of ''\"] behind"),
    (RemembersTheLastFit, "7-two-fits", "RemembersTheLastFit has missed its target"),
    (CleansUpAtTheEndAlone, "7-interrupted", "After KeyboardInterrupt, CleansUpAtTheEndAlone has left"),
    (SavesWhoItIs, "7-copies", "A copy of SavesWhoItIs differs in ['/id:"),
    (
        RenamesItsArgument,
        "8-stored-arguments",
        "RenamesItsArgument must store its arguments as given, under their own names",
    ),
    (ChecksNothing, "8-impossible-target", "sparsity=0.999999 of a tiny network is not refused"),
    (TakesAllInstead, "8-unknown-targets", "a pattern that matches nothing is not refused"),
    (HidesItsMasks, "8-second-owner", "a second owner of the same masks is not refused"),
    (SkipsSetup, "8-unfit-company", "ModelPruning beside it is not refused"),
    (ComparesNothing, "8-other-arguments-on-resume", "another argument on resume is not refused"),
]


@pytest.mark.parametrize(("mistake", "check", "sentence"), MISTAKES, ids=[f"{row[0].__name__}-{row[1]}" for row in MISTAKES])
@pytest.mark.filterwarnings("ignore:.*has removed all of")
def test_it_is_noticed(mistake: type[Honest], check: str, sentence: str) -> None:
    if "moving-average" in check and not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    with pytest.raises(AssertionError, match=re.escape(sentence)) as error:
        run_check(check, Case(partial(mistake, 0.9)))
    assert str(error.value).startswith(f"{check}: ")


def test_every_point_has_a_mistake() -> None:
    assert {check[0] for _, check, _ in MISTAKES} == {check[0] for check in CHECKS} == set("12345678")


def exempt(*points: str) -> dict[str, str]:
    return {check: "shown by others" for check in CHECKS if check[0] not in points}


def test_one_call_names_the_first_promise_that_is_broken() -> None:
    check_method(lambda: Honest(0.9), exempt=exempt("1", "8"))
    with pytest.raises(AssertionError, match="^1-target-sgd: KeepsOneMore has missed its target"):
        check_method(lambda: KeepsOneMore(0.9), exempt=exempt("1"))
    with pytest.raises(AssertionError, match="^8-unfit-company: ModelPruning beside it is not refused"):
        check_method(lambda: [SkipsSetup(0.9)], exempt=exempt("8"))


def test_an_error_of_another_kind_is_a_broken_promise_too() -> None:
    class Crashes(Honest):
        def begin(self) -> None:
            raise KeyError("lost")

    with pytest.raises(AssertionError, match="1-target-sgd: KeyError: 'lost'"):
        check_method(lambda: Crashes(0.9))


def test_what_is_no_case_is_refused() -> None:
    made = Honest(0.9)
    with pytest.raises(AssertionError, match="are the same objects; make new ones at every call"):
        check_method(lambda: made)
    with pytest.raises(AssertionError, match=r"\['Timer'\] hold no Sparsifier"):
        check_method(L.pytorch.callbacks.Timer)
    with pytest.raises(ValueError, match=r"exempt=\['9-magic'\] are no checks; choose from \['1-target-sgd'"):
        check_method(lambda: Honest(0.9), exempt={"9-magic": "not here"})
