"""Points 6 and 7: gradient accumulation, precision and memory layout; other callbacks and other kinds of modules."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing.case import Case, Inapplicable, recorded, require
from lightning_sparse.testing.state import Watcher, differences, left_behind, masks_of, nonzero, off_target
from lightning_sparse.testing.toys import BATCH, BATCHES, EPOCHS, Manual, Toy, fit, loader, network, toy, trainer

__all__ = [
    "adds_up_micro_batches",
    "clips_without_dropped_gradients",
    "follows_an_accumulation_schedule",
    "goes_on_with_the_same_trainer",
    "is_copied_and_pickled",
    "is_interrupted_without_a_trace",
    "is_trained_twice",
    "lives_beside_a_moving_average",
    "lives_beside_stochastic_weight_averaging",
    "reads_any_layout_of_memory",
    "serves_compiled_modules",
    "serves_manual_optimization",
    "serves_tied_weights_of_a_model_built_late",
    "survives_an_infinity",
    "trains_in_bf16",
]


def _sound(methods: Sequence[Sparsifier], module: nn.Module, targets: bool = True) -> None:
    """Require that zeros hold and targets are met."""
    for method in methods:
        require(not nonzero(method, module), f"{method.label}: {nonzero(method, module)} are not zero where dropped.")
        wrong = off_target(method) if targets else []
        require(not wrong, f"{method.label} has missed its target: {'; '.join(wrong)}.")


def _watch(methods: Sequence[Sparsifier]) -> Watcher:
    """Return a callback that requires zeros to hold whenever it looks."""

    def look(moment: str, module: pl.LightningModule) -> None:
        for method in methods:
            require(not nonzero(method, module), f"At {moment}, {nonzero(method, module)} are not zero where dropped.")

    return Watcher(look)


# ---- 6 accumulation, precision, memory layout ------------------------------------------------------------------------


@dataclass(frozen=True)
class _End:
    """The result of a training run in float64 without random numbers."""

    weights: dict[str, Tensor]
    masks: list[dict[str, Tensor]]


def _train(case: Case, change: Callable[[Toy], Any] = lambda module: module, **options: Any) -> _End:
    torch.manual_seed(0)
    callbacks, methods = case.fresh()
    module = toy(net=network(dropout=0)).double()
    fit(change(module), *callbacks, **options)
    return _End(module.state_dict(), [masks_of(method) for method in methods])


_plain = functools.lru_cache(maxsize=1)(_train)


def adds_up_micro_batches(case: Case) -> None:
    """Accumulating four micro-batches gives the same result as one large batch."""
    end = _train(case, batch_size=BATCH // 4, accumulate_grad_batches=4)
    torch.testing.assert_close(end.weights, _plain(case).weights, rtol=1e-9, atol=1e-12)


def reads_any_layout_of_memory(case: Case) -> None:
    """A module in `channels_last` ends with the same weights and masks as one in the default memory format."""

    def last(module: Toy) -> Toy:
        module.net.to(memory_format=torch.channels_last)
        return module

    end, plain = _train(case, last), _plain(case)
    name = [name for name, weight in end.weights.items() if weight.ndim == 4][-1]
    is_last = end.weights[name].is_contiguous(memory_format=torch.channels_last)
    require(is_last, f"'{name}' has left the channels_last layout.")
    wrong = differences(plain.masks, end.masks)
    require(not wrong, f"With channels_last, other entries are dropped: {wrong[:4]}.")
    torch.testing.assert_close(end.weights, plain.weights, rtol=1e-9, atol=1e-9)


def trains_in_bf16(case: Case) -> None:
    """With `bf16-mixed`, parameters stay in float32, zeros hold and targets are met."""
    callbacks, methods = case.fresh()
    module = toy("adamw")
    fit(module, *callbacks, precision="bf16-mixed")
    wrong = [name for name, parameter in module.named_parameters() if parameter.dtype != torch.float32]
    require(not wrong, f"{wrong} are not in float32 anymore.")
    _sound(methods, module)


def survives_an_infinity(case: Case, fused: bool) -> None:
    """With `16-mixed`, a step that the gradient scaler skips because of an infinite loss changes nothing."""
    if not torch.cuda.is_available():
        raise Inapplicable("needs a CUDA device")

    class Planted(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            return loss * torch.inf if self.trainer.global_step == 2 else loss

        def configure_optimizers(self) -> Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=fused)

    callbacks, methods = case.fresh()
    module = Planted()
    fit(module, *callbacks, precision="16-mixed", accelerator="gpu", devices=1)
    wrong = [name for name, parameter in module.named_parameters() if not parameter.isfinite().all()]
    require(not wrong, f"{wrong} are not finite after a step that was skipped.")
    _sound(methods, module)


# ---- 7 beside other callbacks ----------------------------------------------------------------------------------------


def lives_beside_a_moving_average(case: Case, first: bool) -> None:
    """With `EMAWeightAveraging`, in either order, zeros hold in the module, in its average and in the checkpoint."""
    average = getattr(lightning_callbacks, "EMAWeightAveraging", None)
    if average is None:
        raise Inapplicable("this Lightning has no EMAWeightAveraging")
    callbacks, methods = case.fresh()
    module = toy()
    order = [average(decay=0.9), *callbacks] if first else [*callbacks, average(decay=0.9)]
    with tempfile.TemporaryDirectory() as folder:
        fit(module, *order, _watch(methods), ModelCheckpoint(folder, "last"))
        saved = torch.load(Path(folder, "last.ckpt"), weights_only=True)["state_dict"]
    _sound(methods, module, targets=False)
    for method in methods:
        wrong = [name for name, mask in masks_of(method).items() if saved[name][~mask].any()]
        require(not wrong, f"{method.label}: {wrong} are not zero in the checkpoint of the moving average.")


def lives_beside_stochastic_weight_averaging(case: Case) -> None:
    """Zeros hold in the average that `StochasticWeightAveraging` copies into the module at the end."""
    callbacks, methods = case.fresh()
    module = toy()
    fit(module, *callbacks, StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=4)
    _sound(methods, module, targets=False)


def follows_an_accumulation_schedule(case: Case) -> None:
    """With `GradientAccumulationScheduler` and clipping, targets are met, and the optimizer's actual steps are counted."""
    callbacks, methods = case.fresh()
    module = toy()
    fit(module, *callbacks, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), gradient_clip_val=0.1)
    _sound(methods, module)
    made = BATCHES + BATCHES // 2 + BATCHES // 4
    for method in methods:
        require(method.steps == made, f"{method.label} has counted {method.steps} steps of {made}.")


def clips_without_dropped_gradients(case: Case) -> None:
    """Gradients of removed entries do not count in gradient clipping."""
    callbacks, methods = case.fresh()
    looks = []

    class Clipped(Toy):
        def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
            looks.append(optimizer)
            for method in methods:
                for name, mask in masks_of(method).items():
                    gradient = method.weights[name].grad
                    if gradient is not None and not method.dropped_learn:
                        seen = bool(gradient[~mask].any())
                        require(not seen, f"{method.label} shows gradients of dropped entries of '{name}' to clipping.")

    fit(Clipped(), *callbacks)
    require(len(looks) == EPOCHS * BATCHES, f"Gradients were clipped {len(looks)} times, not once per step.")


# ---- 7 in other modules ----------------------------------------------------------------------------------------------


@contextmanager
def _emptied_layers_allowed() -> Iterator[None]:
    """Ignore the warning about an emptied layer, which can happen in a tiny network."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has removed all of")
        yield


def serves_manual_optimization(case: Case) -> None:
    """Zeros and targets hold with manual optimization: two optimizers, stepped at different rates."""
    callbacks, methods = case.fresh()
    module = Manual()
    with _emptied_layers_allowed():
        fit(module, _watch(methods), *callbacks)
    _sound(methods, module)


class _Tied(Toy):
    """A module with one weight shared by two layers, built in `configure_model`."""

    def __init__(self) -> None:
        super().__init__(net=nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            *layers, last = network()
            width: Any = last.in_features
            extra, twin = nn.Linear(width, width), nn.Linear(width, width)
            twin.weight = extra.weight
            self.net = nn.Sequential(*layers, extra, twin, last)


def serves_tied_weights_of_a_model_built_late(case: Case) -> None:
    """A weight that two layers share has one mask, even if the model is built in `configure_model`."""
    callbacks, methods = case.fresh()
    module = _Tied()
    with _emptied_layers_allowed():
        fit(module, *callbacks)
    _sound(methods, module)
    first, second = (f"net.{len(module.net) - place}.weight" for place in (3, 2))
    for method in methods:
        require(second not in masks_of(method), f"{method.label} has a second mask for the shared '{first}'.")


def serves_compiled_modules(case: Case) -> None:
    """A module under `torch.compile` ends bit for bit like the plain one."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()  # else torch stops compiling after a few modules of one class
    end = _train(case, lambda module: torch.compile(module, backend=backend), limit_val_batches=0)
    require(bool(graphs), "Nothing was compiled.")
    wrong = differences(_plain(case).weights, end.weights)
    require(not wrong, f"Compiled, the module ends otherwise than the plain one: {wrong[:4]}.")


# ---- 7 repeated fits -------------------------------------------------------------------------------------------------


def is_trained_twice(case: Case) -> None:
    """One instance can train two modules one after the other, and leaves nothing behind."""
    callbacks, methods = case.fresh()
    for seed in (0, 1):
        module = toy(seed=seed)
        runner = fit(module, *callbacks)
        _sound(methods, module)
        for method in methods:
            require(method.steps == EPOCHS * BATCHES, f"{method.label} has counted {method.steps} steps in fit {seed + 1}.")
            wrong = left_behind(method, module, runner)
            require(not wrong, f"{method.label} has left {wrong} behind.")


def goes_on_with_the_same_trainer(case: Case) -> None:
    """A Trainer that fits again with more epochs continues the run, and the masks stay."""
    callbacks, methods = case.fresh()
    module = toy()
    runner = fit(module, *callbacks)
    before = [masks_of(method) for method in methods]
    runner.fit_loop.max_epochs = EPOCHS + 2
    runner.fit(module, loader(), loader(1))
    require(runner.current_epoch == EPOCHS + 2, f"The second fit has ended after epoch {runner.current_epoch}.")
    _sound(methods, module, targets=False)
    for method, masks in zip(methods, before, strict=True):
        # Masks may change if removed entries keep their values and no count was promised.
        if method.goal["total"] is not None or not method.dropped_live_on:
            wrong = differences(masks, masks_of(method))
            require(not wrong, f"{method.label} has changed masks of {wrong} when the same Trainer went on.")


def is_interrupted_without_a_trace(case: Case) -> None:
    """After Ctrl-C or an exception nothing is left behind, and the same instance can train another module."""

    class Broken(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == BATCHES + 1:
                raise error
            return self.loss(batch)

    callbacks, methods = case.fresh()
    for error in (KeyboardInterrupt, RuntimeError):
        module = Broken()
        runner = trainer(*callbacks)
        with suppress(error, SystemExit):  # Lightning exits after Ctrl-C
            runner.fit(module, loader(), loader(1))
        require(runner.interrupted, f"The fit has gone on after {error.__name__}.")
        for method in methods:
            wrong = left_behind(method, module, runner)
            require(not wrong, f"After {error.__name__}, {method.label} has left {wrong} behind.")
    repaired = toy()
    fit(repaired, *callbacks)
    _sound(methods, repaired)


def is_copied_and_pickled(case: Case) -> None:
    """A copy or pickle of a trained method has the same state."""
    for method in recorded(case, "sgd").methods:
        for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
            wrong = differences(method.state_dict(), twin.state_dict())
            require(not wrong, f"A copy of {method.label} differs in {wrong[:4]}.")
