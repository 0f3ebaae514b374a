"""One fit of all methods of a Trainer: hooks, order, position, agreement of ranks. `base.py` draws the loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_sparse.core import Position, RunLength
from lightning_sparse.loop.phase import phase_of

if TYPE_CHECKING:
    from lightning_sparse.loop.sparsifier import Sparsifier

__all__ = ["Stations", "Step"]


@dataclass(frozen=True)
class Step:
    """One step of one optimizer, as a method sees it.

    Args:
        optimizer: that is about to move, or has moved.
        weights: those of the method's weights that this optimizer owns.
        gradient_scale: the factor that gradients carry now, where the optimizer itself unscales them (fused optimizers
            in 16-bit mixed precision), else None.
    """

    optimizer: Optimizer
    weights: Mapping[str, nn.Parameter]
    gradient_scale: Tensor | None = None

    def learning_rate(self, name: str) -> float | Tensor:
        """The current learning rate of one weight."""
        weight = self.weights[name]
        for group in self.optimizer.param_groups:
            if any(parameter is weight for parameter in group["params"]):
                return group["lr"]  # type: ignore[no-any-return]
        raise KeyError(name)


class Stations:
    """Visits the stations of all methods in order, from the first batch of a fit to its end.

    Args:
        trainer: of the fit.
        module: that is trained.
        methods: in the order of the callbacks.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, methods: list[Sparsifier]) -> None:
        self.trainer, self.module, self.methods = trainer, module, methods
        self.handed_over = False
        self._closed = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._owned: dict[int, dict[int, dict[str, nn.Parameter]]] = {}
        self._pending: dict[int, list[Step]] = {}
        self._depth: dict[int, int] = {}
        self._unscaled: set[int] = set()
        self._stepped = True  # no gradients wait
        self._batch_idx = 0
        self._epoch = -1
        self._logged = -1
        self._phase: str | None = None
        self._replaced: list[tuple[Any, str, Any, bool]] = []

    # ---- opening and closing -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Check every method, then start every method, then hook in: a refusal leaves all as it was."""
        run = self.run_length()
        _refuse_shared_weights(self.methods)
        for method in self.methods:
            if method._saved is not None:
                method._check_saved(method._saved)
            begun = method._run(run)
            method.check(begun, _share(run, begun, by_steps=self.trainer.max_steps != -1))
        for optimizer in self.trainer.optimizers:
            owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._owned[id(optimizer)] = {
                id(method): {name: weight for name, weight in method.weights.items() if id(weight) in owned}
                for method in self.methods
            }
        with torch.no_grad():
            for method in self.methods:
                method._start(run)
        for optimizer in self.trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._direct_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._wrap_training_step()
        self._wrap_optimizer_step()
        self._wrap_progress_bar()
        self.check_ranks()

    def close(self) -> None:
        """Take everything away that `open` has attached; safe to call again."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for optimizer in self.trainer.optimizers:
            self._undo(optimizer)  # interrupted between the two halves of a step
        while self._replaced:
            owner, name, original, was_its_own = self._replaced.pop()
            setattr(owner, name, original) if was_its_own else delattr(owner, name)
        for method in self.methods:
            method.release()

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def epoch_start(self) -> None:
        self._epoch = self.trainer.current_epoch
        with torch.no_grad():
            self._evolve(epoch_start=True)

    def batch_start(self, batch_idx: int) -> None:
        # Resumed inside an epoch, or from a checkpoint of an epoch's last batch, Lightning goes on without announcing the
        # epoch; neither we nor GradientAccumulationScheduler have been told.
        epoch = self.trainer.current_epoch
        if self._epoch != epoch:
            self.trainer.accumulate_grad_batches = self.accumulation(epoch)
            if batch_idx == 0:
                self._announce_epoch()
                self.epoch_start()
            self._epoch = epoch
        if self._stepped or batch_idx == 0:
            self._batch_idx = batch_idx - 1
            with torch.no_grad():
                for method in self.methods:
                    method.before_batch(self.position(method))
            self.check_ranks()
        self._batch_idx, self._stepped, self.handed_over = batch_idx, False, False
        self._depth.clear()

    def _announce_epoch(self) -> None:
        """Lightning has not counted this epoch as begun, and would take what is saved in it for the end of the last one."""
        progress: Any = self.trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:
            progress.increment_ready()
            progress.increment_started()

    def before_step(self, optimizer: Optimizer) -> None:
        self._undo(optimizer)
        self._count()
        self._unscaled.discard(id(optimizer))
        steps = list(self._steps(optimizer, self._gradient_scale(optimizer)))
        with torch.no_grad():
            for method, step in steps:
                self._add_gradients(step, method.weight_penalty(step))
            for method, step in steps:
                method.before_step(step)
            for method, step in steps:
                method.silence(step)
            if any(method.replaces_step(step) for method, step in steps):
                self._withhold_gradients(optimizer)
        self._pending[id(optimizer)] = [step for _, step in steps]

    def _count(self) -> None:
        """A batch that steps is one step, however many optimizers move in it."""
        if not self._stepped:
            self._stepped = True
            for method in self.methods:
                method.steps += 1

    def _direct_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step past Lightning (`use_pl_optimizer=False`): there is no closure, and nobody has announced it."""
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None and id(optimizer) not in self._pending:
            self.before_step(optimizer)

    @property
    def _paired(self) -> bool:
        """Whether a method must know that a step which it prepared did not happen."""
        return any(method.prepares_steps for method in self.methods)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # An optimizer whose `step` calls that of its base class fires its hooks twice; the outer one is the step.
        depth = self._depth[id(optimizer)] = max(self._depth.get(id(optimizer), 0) - 1, 0)
        if depth:
            return
        found_inf = getattr(optimizer, "found_inf", None) if self._paired else None
        if found_inf is not None and bool(found_inf.any()):  # waits for the device, so only where somebody must know
            return  # a fused optimizer was called, but its kernel skipped the step
        prepared = self._pending.pop(id(optimizer), None)
        steps = list(self._steps(optimizer))
        self._count()
        for method, step in steps:
            if prepared is not None:
                method.after_step(step)
            else:  # past Lightning and with a closure: nobody could see the gradients
                method.after_unseen_step(step)
        for method, step in steps:
            method.project(step)
        if len(self.trainer.optimizers) == 1:
            self._evolve(under_way=1)

    def batch_end(self) -> None:
        for optimizer in self.trainer.optimizers:
            self._undo(optimizer)
        # With several optimizers not before all have stepped: the losses of those to come may hold the weights as they are.
        if len(self.trainer.optimizers) > 1 and self._stepped:
            with torch.no_grad():
                self._evolve()
        for method in self.methods:
            method.batch_end()
        self._log()

    def _log(self) -> None:
        if self._batch_idx == 0:
            for method in self.methods:
                numbers = {f"{method.label}/{key}": value for key, value in method.numbers().items()}
                self.module.log_dict(numbers, on_step=False, on_epoch=True, batch_size=1)
        masks = [masks for method in self.methods if (masks := method.mask_set) is not None]
        if any(mask.live for mask in masks) and not self.time_to_count:
            return
        kept = sum(mask.kept for mask in masks)
        # Lightning keeps showing and logging a value until the epoch ends, and a call costs half a millisecond.
        if masks and (self._batch_idx == 0 or kept != self._logged):
            sparsity = 1 - kept / sum(mask.total for mask in masks)
            self.module.log("sparsity", sparsity, prog_bar=True, batch_size=1)
            self._logged, self._phase = kept, phase_of(self.methods)

    @property
    def time_to_count(self) -> bool:
        """Whether to count masks that move with every step: as often as Lightning logs, for it waits for the device."""
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self._batch_idx == 0 or self.trainer.global_step % max(interval, 1) == 0

    def _undo(self, optimizer: Optimizer) -> None:
        """A step was prepared and never made: the gradient scaler has skipped it."""
        steps = self._pending.pop(id(optimizer), None)
        if steps is not None:
            with torch.no_grad():
                for method, step in zip(self.methods, steps, strict=True):
                    method.undo_step(step)

    def _evolve(self, epoch_start: bool = False, under_way: int = 0) -> None:
        for method in self.methods:
            method.evolve(self.position(method, epoch_start, under_way))
        self.check_ranks()

    # ---- where the run is --------------------------------------------------------------------------------------------

    def run_length(self) -> RunLength:
        """Epochs and steps of the whole run, as far as they can be known before it starts."""
        trainer = self.trainer
        max_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
        max_steps = None if trainer.max_steps == -1 else trainer.max_steps
        batches = trainer.num_training_batches
        unlimited = max_epochs is None and max_steps is None
        whole_epochs = None if max_epochs is None else float(max_epochs)
        if unlimited or batches == float("inf") or batches == 0:
            return RunLength(whole_epochs, max_steps, within_epochs=False)
        if not self.module.automatic_optimization:  # who steps by hand, steps as often as they like
            return RunLength(whole_epochs, max_steps)
        epochs = steps = 0
        while (max_epochs is None or epochs < max_epochs) and (max_steps is None or steps < max_steps):
            in_epoch = -(-int(batches) // self.accumulation(epochs))
            if max_steps is not None and steps + in_epoch > max_steps:
                return RunLength(epochs + (max_steps - steps) / in_epoch, max_steps)
            epochs, steps = epochs + 1, steps + in_epoch
        return RunLength(float(epochs), steps)

    def accumulation(self, epoch: int) -> int:
        """Batches per optimizer step in an epoch."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                return callback.get_accumulate_grad_batches(epoch)
        return self.trainer.accumulate_grad_batches

    def position(self, method: Sparsifier, epoch_start: bool = False, under_way: int = 0) -> Position:
        """Where the run is now: before an epoch's first batch, or after the step of the current batch.

        Args:
            method: whose run.
            epoch_start: whether it is the moment before the first batch.
            under_way: steps that are made but not yet counted by Lightning.
        """
        trainer = self.trainer
        epoch, length = trainer.current_epoch, RunLength(**method._length)
        fraction = 0.0
        if length.epochs:
            batches = trainer.num_training_batches
            inside = 0.0 if epoch_start or batches == float("inf") else (self._batch_idx + 1) / batches
            fraction = (epoch + inside) / length.epochs
        if length.steps and trainer.max_steps != -1:
            fraction = max(fraction, (trainer.global_step + under_way) / length.steps)
        return Position(min(fraction, 1.0), epoch, method.steps, epoch_start)

    @property
    def ends_with_next_step(self) -> bool:
        """Whether no step follows the one that the current batch begins to gather gradients for; False if not known."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        if trainer.max_epochs in (None, -1) or batches == float("inf") or not self.module.automatic_optimization:
            return False
        begun = self._batch_idx + 1
        return (
            trainer.current_epoch + 1 == trainer.max_epochs and begun + self.accumulation(trainer.current_epoch) >= batches
        )

    # ---- gradients and penalties -------------------------------------------------------------------------------------

    def _steps(self, optimizer: Optimizer, scale: Tensor | None = None) -> Iterator[tuple[Sparsifier, Step]]:
        for method in self.methods:
            yield method, Step(optimizer, self._owned[id(optimizer)][id(method)], scale)

    def _gradient_scale(self, optimizer: Optimizer) -> Tensor | None:
        if self._scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return None
        scale: Tensor = self._scaler.scale(torch.ones((), device=self.module.device))
        return scale

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @staticmethod
    def _add_gradients(step: Step, gradients: Iterable[tuple[str, Tensor]]) -> None:
        for name, gradient in gradients:
            weight = step.weights[name]
            if step.gradient_scale is not None:
                gradient = gradient * step.gradient_scale
            grad = weight.grad
            if grad is None:
                weight.grad = gradient.to(weight.dtype).clone()
            else:
                grad.add_(gradient)

    def _withhold_gradients(self, optimizer: Optimizer) -> None:
        """No weight, no moment and no counter moves where there is no gradient."""
        self.unscale(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def penalty(self) -> Tensor | None:
        """The sum of all feature penalties of this batch; asked for once, it is not added again."""
        terms = [term for method in self.methods if (term := method.feature_penalty()) is not None]
        return torch.stack([term.reshape(()) for term in terms]).sum() if terms else None

    def _wrap_training_step(self) -> None:
        """Add feature penalties to the loss where it is made, so that accumulation, scaling and DDP see one loss."""
        watchers = [method for method in self.methods if method.watches]
        penalized = any(method.penalizes_features for method in self.methods)
        if penalized and not self.module.automatic_optimization:
            penalized = False
            if not hasattr(self.module, "sparsity_penalty"):
                rank_zero_warn(
                    f"{type(self.module).__name__} optimizes manually, so no callback can reach its loss; add "
                    "self.sparsity_penalty() to it (lightning_sparse.SparsityMixin)."
                )
        if not watchers and not penalized:
            return
        original = self.module.training_step

        @functools.wraps(original)  # Lightning asks for the signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output: Any = original(*args, **kwargs)
            for method in watchers:
                method.watch(output, args[0] if args else kwargs["batch"])
            penalty = self.penalty() if penalized and output is not None and not self.handed_over else None
            if penalty is None:
                return output
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] + penalty}
            return output + penalty

        self._replace(self.module, "training_step", training_step)

    def _wrap_optimizer_step(self) -> None:
        """Learn at once that a gradient scaler has skipped a step: nothing else is called before the batch ends."""
        if not self._paired:
            return
        original = self.trainer.strategy.optimizer_step

        def optimizer_step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            result = original(optimizer, *args, **kwargs)
            self._undo(optimizer)
            return result

        self._replace(self.trainer.strategy, "optimizer_step", optimizer_step)

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Until `close`, a function of one object, not of its class."""
        self._replaced.append((owner, name, getattr(owner, name), name in vars(owner)))
        setattr(owner, name, function)

    def _wrap_progress_bar(self) -> None:
        """Show words: what is logged can only be a number, and stays on the bar when its name is no longer used."""
        bar: Any = self.trainer.progress_bar_callback
        if bar is None or "get_metrics" in vars(bar):
            return
        original = bar.get_metrics

        def get_metrics(*args: Any) -> dict[str, Any]:
            phase = {} if self._phase is None else {"phase": self._phase}
            words = {key: value for method in self.methods for key, value in method.headline().items()}
            return {**original(*args), **phase, **words}

        self._replace(bar, "get_metrics", get_metrics)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide gradients by their scale now, and look for infinities, where a fused optimizer would do so in its step.

        For methods that hide gradients from it: what is hidden would not be searched. At station `silence`, when nobody
        reads scaled gradients any more; only the first call does it, for a scaler allows one.
        """
        if id(optimizer) not in self._unscaled and self._gradient_scale(optimizer) is not None:
            self._unscaled.add(id(optimizer))
            self._scaler.unscale_(optimizer)

    # ---- copies of the model -----------------------------------------------------------------------------------------

    def averages(self) -> Iterator[dict[str, nn.Parameter]]:
        """The weights of moving averages (`EMAWeightAveraging`, `StochasticWeightAveraging`), by the module's names.

        An entry that is pruned must leave the average too: there it would fade but never become zero. Lightning keeps
        the averaged model in a private attribute and offers no hook, so this is the one place that reads it.
        """
        for model in self._average_models():
            yield dict((model.module if isinstance(model, AveragedModel) else model).named_parameters())

    def restart_averages(self) -> None:
        """Let moving averages begin again from the module as it is now."""
        for model in self._average_models():
            if isinstance(model, AveragedModel):
                model.n_averaged.zero_()
                model = model.module
            for copies, originals in (
                (model.named_parameters(), dict(self.module.named_parameters())),
                (model.named_buffers(), dict(self.module.named_buffers())),
            ):
                for name, tensor in copies:
                    tensor.data.copy_(originals[name])

    def _average_models(self) -> Iterator[nn.Module]:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            model = getattr(callback, "_average_model", None)
            if isinstance(model, nn.Module):
                yield model

    # ---- ranks -------------------------------------------------------------------------------------------------------

    def check_ranks(self) -> None:
        """After a change of masks: every rank must hold the same ones.

        Raises:
            RuntimeError: naming the first weight whose masks differ.
        """
        for method in self.methods:
            masks = method.mask_set
            if masks is None or not masks.changed:
                continue
            masks.changed = False
            if self.trainer.world_size > 1:
                mine = masks.fingerprint().to(self.trainer.strategy.root_device)
                everyone = self.trainer.strategy.all_gather(mine)
                wrong = (everyone != everyone[0]).any(0).nonzero().flatten().tolist()
                if wrong:
                    raise RuntimeError(
                        f"{method.label}: the ranks hold different masks of '{list(masks)[wrong[0]]}'; a score or a random "
                        "choice was made from data of one rank only."
                    )


def _share(run: RunLength, begun: RunLength, by_steps: bool) -> float:
    """How much of the run as it was begun is over when this fit ends; counted as positions are."""
    shares = [run.epochs / begun.epochs] if run.epochs and begun.epochs else []
    if run.steps and begun.steps and (by_steps or not shares):
        shares.append(run.steps / begun.steps)
    return min(1.0, max(shares, default=1.0))


def _refuse_shared_weights(methods: list[Sparsifier]) -> None:
    owner: dict[int, Sparsifier] = {}
    for method in methods:
        if method.mask_set is None:
            continue
        for name, weight in method.weights.items():
            if id(weight) in owner:
                raise ValueError(
                    f"{owner[id(weight)].label} and {method.label} both own masks of '{name}'; give each its own targets, "
                    "or keep one of them."
                )
            owner[id(weight)] = method
