"""Visits the stations of all methods in order, from the first batch of a fit to its end. `sparsifier.py` draws the loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sparse.core import check_moments, lent_gradients
from lightning_sparse.loop.agreement import Agreement
from lightning_sparse.loop.conflicts import check_method, refuse_optimizers, refuse_rivals, refuse_shared_masks
from lightning_sparse.loop.log import Log
from lightning_sparse.loop.method import Method
from lightning_sparse.loop.ownership import Owned, Ownership
from lightning_sparse.loop.replacements import Replacements, clip_only_gradients
from lightning_sparse.loop.run import Run
from lightning_sparse.loop.step import Step

__all__ = ["Loop"]


class Loop:
    """One fit of all methods of a Trainer: hooks, order, agreement of ranks.

    Args:
        run: the running fit.
        methods: in the order of the callbacks.
    """

    def __init__(self, run: Run, methods: Sequence[Method]) -> None:
        self.run, self.methods = run, list(methods)
        """The methods that are visited; profiling code may replace them between two batches."""
        self._everyone = list(methods)
        self.leader = self._everyone[0]
        """The method whose hooks of the Trainer visit the stations of all."""
        self._closed = False
        self._handed_over = self._clips_safely = False
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[int, Optimizer] = {}
        self._several = len(run.optimizers) > 1
        self.ownership = Ownership(methods)
        """Which weights of which method an optimizer moves."""
        self._pending: dict[int, tuple[Owned, list[tuple[Method, Step]]]] = {}
        self._depth: dict[int, int] = {}
        self._trusted: set[int] = set()
        self._agreement = Agreement(run)
        self._seen: tuple[Any, Any] = (None, None)
        self._epoch = -1
        self._log = Log(run)
        self._replacements = Replacements()

    # ---- opening and closing -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Check every method, then start every method, then attach hooks: a refusal leaves everything as it was."""
        self.run.reshard()
        length = self.run.length()
        for method in self.methods:
            method.enter(self.run)
        refuse_shared_masks(self.methods)
        for method in self.methods:
            check_method(method, length)
        refuse_rivals(self.methods)
        for optimizer in self.run.optimizers:
            self._check_moments(optimizer)
        with torch.no_grad():
            for method in self.methods:
                method.begin_or_resume(length)
        self.run.reshard()
        self._hook_optimizers()
        self._wrap_training_step()
        self._wrap_optimizer_step()
        self._log.show_words(self._everyone, self._replacements)
        self._wrap_save()
        self._agreement.compare(self.methods)

    def reopen(self, method: Method) -> None:
        """Resume a method from a state that was loaded in the middle of the fit, as tuners do after their search."""
        self._pending.clear()
        self.run.reshard()
        with lent_gradients(method.weights):
            method.release()
        method.enter(self.run)
        length = self.run.length()
        check_method(method, length)
        with torch.no_grad():
            method.begin_or_resume(length)
        self.run.reshard()

    def _hook_optimizers(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._hooked = {id(optimizer): optimizer for optimizer in self.run.optimizers}
        self._handles = []
        for optimizer in self.run.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._direct_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def close(self) -> None:
        """Remove everything that `open` has attached; safe to call again."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for optimizer in self.run.optimizers:
            self._undo(optimizer)  # interrupted between the two halves of a step
        self._replacements.restore()
        for method in self._everyone:
            with lent_gradients(method.weights):
                method.release()

    # ---- epochs and batches ------------------------------------------------------------------------------------------

    def epoch_start(self) -> None:
        self._epoch = self.run.trainer.current_epoch
        self.run.reshard()
        with torch.no_grad():
            self._evolve(epoch_start=True)
        self.run.reshard()

    def batch_start(self, batch_idx: int) -> None:
        run, trainer = self.run, self.run.trainer
        # Resumed inside an epoch, or from a checkpoint of an epoch's last batch, Lightning continues without announcing the
        # epoch to this loop or to GradientAccumulationScheduler.
        epoch = trainer.current_epoch
        if self._epoch != epoch:
            trainer.accumulate_grad_batches = run.accumulation(epoch)
            if batch_idx == 0:
                self._announce_epoch()
                self.epoch_start()
            self._epoch = epoch
        run.fresh = run.fresh or batch_idx == 0
        run.batch_idx = batch_idx - 1
        for method in self.methods:
            if method.answers(Method.before_batch):  # computing the position takes longer than doing nothing
                with torch.no_grad():
                    run.reshard()
                    method.before_batch(method.position())
                    run.reshard()
        if run.fresh:
            self._agreement.compare(self.methods)
        run.batch_idx, run.fresh, self._handed_over = batch_idx, False, False
        self._depth.clear()

    def _announce_epoch(self) -> None:
        """Lightning has not counted this epoch as started, and would save the state as the end of the previous one."""
        progress: Any = self.run.trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:
            progress.increment_ready()
            progress.increment_started()

    def batch_end(self) -> None:
        if self._pending:
            for optimizer in self.run.optimizers:
                self._undo(optimizer)
        # With several optimizers, only after all have stepped: later losses may hold the weights as they are.
        if self._several and self.run.fresh:
            with torch.no_grad():
                self._evolve()
        for method in self.methods:
            method.batch_end(*self._seen)
        self._seen = (None, None)
        self._log.batch(self.methods, self._everyone)

    def epoch_end(self) -> None:
        self.settle()
        for method in self.methods:
            self._log.numbers(method, method.epoch_end())
        self._agreement.compare(self.methods, live=True)  # after every step it would take too long

    @torch.no_grad()
    def settle(self) -> None:
        for method in self.methods:
            method.settle()
        self.run.reshard()

    def conclude(self) -> None:
        for method in self.methods:
            method.conclude()

    def _evolve(self, epoch_start: bool = False, under_way: int = 0) -> None:
        for method in self.methods:
            if method.evolves:
                method.evolve(method.position(epoch_start, under_way))
        self._agreement.compare(self.methods)

    @property
    def paused(self) -> bool:
        """Whether a tuner searches: it removes the callbacks from the Trainer, and restores a checkpoint afterwards."""
        return self.leader not in self.run.trainer.callbacks  # type: ignore[attr-defined]

    # ---- a step ------------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self._hooked:
            self._replace_optimizers()
        self._undo(optimizer)
        self._count()
        owned = self.ownership.of(optimizer)
        steps = self._steps(optimizer, owned, self.run.gradient_scale(optimizer))
        with torch.no_grad(), _lent(owned):
            for method, step in steps:
                step.add_gradients(method.weight_penalty(step))
            for method, step in steps:
                method.before_step(step)
            for method, step in steps:
                method.silence(step)
        if any(step.replaced for _, step in steps):
            self._withhold_gradients(optimizer)
        self._pending[id(optimizer)] = owned, steps

    def _replace_optimizers(self) -> None:
        """The module has made new optimizers in the middle of the fit."""
        for method in self.methods:
            refuse_optimizers(method, self.run.optimizers)
        for optimizer in self._hooked.values():
            self._undo(optimizer)
        self.ownership = Ownership(self._everyone)
        self._trusted.clear()
        self._several = len(self.run.optimizers) > 1
        self._hook_optimizers()

    def _steps(self, optimizer: Optimizer, owned: Owned, scale: Tensor | None = None) -> list[tuple[Method, Step]]:
        return [(method, Step(optimizer, owned.weights[id(method)], scale)) for method in self.methods]

    def _count(self) -> None:
        """Count a batch that steps as one step, however many optimizers move in it."""
        if not self.run.fresh:
            self.run.fresh = True
            for method in self.methods:
                method.steps += 1

    def _check_moments(self, optimizer: Optimizer) -> None:
        """Once an optimizer has state: check that the state of pruned entries can be cleared."""
        if id(optimizer) not in self._trusted:
            for method in self.methods:
                if method.clears_moments:
                    check_moments(optimizer, self.ownership.of(optimizer).weights[id(method)].values())
            if optimizer.state:
                self._trusted.add(id(optimizer))

    def _withhold_gradients(self, optimizer: Optimizer) -> None:
        """Hide all gradients: without a gradient, no weight, no moment and no counter moves."""
        self.run.unscale(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if not self._clips_safely:
            self._clips_safely = True
            clip_only_gradients(self.run.trainer.precision_plugin, self._replacements)

    def _direct_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step that bypasses Lightning (`use_pl_optimizer=False`): there is no closure and no announcement."""
        if self.paused:
            return
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None and id(optimizer) not in self._pending:
            self.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.paused:
            return
        # An optimizer whose `step` calls that of its base class fires its hooks twice; the outer one is the step.
        depth = self._depth[id(optimizer)] = max(self._depth.get(id(optimizer), 0) - 1, 0)
        if not depth:
            with torch.no_grad():  # cheaper than the decorator
                self._outer_step(optimizer)

    def _outer_step(self, optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and self._paired and bool(found_inf.any()):  # waits for the device, so only if needed
            return  # a fused optimizer was called, but its kernel skipped the step
        self._check_moments(optimizer)
        prepared = self._pending.pop(id(optimizer), None)
        if prepared is not None:
            owned, steps = prepared
            with _lent(owned):
                for method, step in steps:
                    method.after_step(step)
        else:  # bypasses Lightning with a closure: the gradients were never visible
            owned = self.ownership.of(optimizer)
            steps = self._steps(optimizer, owned)
            self._count()
            with _lent(owned):
                for method, step in steps:
                    method.after_unseen_step(step)
        for method, step in steps:
            method.project(step)
        if not self._several:
            self._evolve(under_way=1)

    @property
    def _paired(self) -> bool:
        """Whether a method must know that a step it prepared did not happen."""
        return any(method.prepares_steps for method in self.methods)

    def _undo(self, optimizer: Optimizer) -> None:
        """A step was prepared but never made: the gradient scaler skipped it."""
        prepared = self._pending.pop(id(optimizer), None)
        if prepared is not None:
            owned, steps = prepared
            with torch.no_grad(), _lent(owned):
                for method, step in steps:
                    method.undo_step(step)

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        """The sum of all feature penalties of this batch."""
        terms = [term for method in self.methods if (term := method.feature_penalty()) is not None]
        return torch.stack([term.reshape(()) for term in terms]).sum() if terms else None

    def hand_over_penalty(self) -> Tensor | None:
        """The same for a module that adds it to its loss itself; it is not added again."""
        self._handed_over = True
        return self.penalty()

    def _wrap_training_step(self) -> None:
        """Add feature penalties to the loss where it is computed, so that accumulation, scaling and DDP see one loss."""
        module = self.run.module
        penalized = any(method.answers(Method.feature_penalty) for method in self.methods)
        if penalized and not module.automatic_optimization:
            penalized = False
            if not hasattr(module, "sparsity_penalty"):
                rank_zero_warn(
                    f"{type(module).__name__} optimizes manually, so no callback can change its loss; add "
                    "self.sparsity_penalty() to it (lightning_sparse.SparsityMixin)."
                )
        if not penalized and not any(method.answers(Method.batch_end) for method in self.methods):
            return
        original = module.training_step

        @functools.wraps(original)  # Lightning inspects the signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output: Any = original(*args, **kwargs)
            self._seen = (_detached(output), args[0] if args else kwargs["batch"])
            penalty = self.penalty() if penalized and output is not None and not self._handed_over else None
            if penalty is None:
                return output
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + penalty}
            return output + penalty

        self._replacements.replace(module, "training_step", training_step)

    # ---- what is wrapped ---------------------------------------------------------------------------------------------

    def _wrap_optimizer_step(self) -> None:
        """Notice immediately that a gradient scaler skipped a step: nothing else is called before the batch ends."""
        if not self._paired:
            return
        strategy = self.run.trainer.strategy
        original = strategy.optimizer_step

        def optimizer_step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            result = original(optimizer, *args, **kwargs)
            self._undo(optimizer)
            return result

        self._replacements.replace(strategy, "optimizer_step", optimizer_step)

    def _wrap_save(self) -> None:
        """No callback is called before a weights-only checkpoint is written."""
        original = self.run.trainer.save_checkpoint

        @functools.wraps(original)
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            return original(*args, **kwargs)

        self._replacements.replace(self.run.trainer, "save_checkpoint", save_checkpoint)


def _lent(owned: Owned) -> AbstractContextManager[None]:
    """While methods act, the shards of weights that they see have gradients."""
    return lent_gradients(owned.parts) if owned.parts else nullcontext()


def _detached(output: Any) -> Any:
    """The output of a `training_step`, without its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}
    return output
