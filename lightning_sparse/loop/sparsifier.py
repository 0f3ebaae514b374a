"""The loop of sparse training, and the stations at which a method may act.

    on_train_start                 choose the weights; check everything; begin, or continue from the checkpoint;
                                   hook every optimizer
    for each epoch
        on_train_epoch_start       evolve             TOPOLOGY by epoch: scores -> masks
        for each batch
            on_train_batch_start   before_batch       TOPOLOGY by rounds: unseen by validation, checkpoints, schedulers
            training_step          watch              what it returned
                                   feature_penalty    + penalty(features)             in the graph
            backward
            on_before_optimizer_step
                                   weight_penalty     grad += d penalty / d weight    closed form, no graph
                                   before_step        dense gradients may be read here
                                   silence            gradients of pruned entries become zero
                                   replaces_step      whether the optimizer is to find no gradients at all
            optimizer.step()
            step post-hook         after_step         the other half of before_step
                                   project            PROJECTION: weight <- project(weight)
                                   evolve             TOPOLOGY by step: new masks, and weights brought in line
            (a step that did not happen: undo_step instead)
            on_train_batch_end     batch_end          learning rate schedulers have moved too
                                   numbers            logged, once per epoch (headline: on the progress bar, after the phase)
        validation, checkpoints    see exactly the weights that the next forward pass will see
    on_train_end                   conclude
    on_fit_end / exception         release            hooks removed; nothing left behind

Each station is visited for all methods of the Trainer before the next one begins, so the result does not depend on
the order of the callbacks: a penalty listed after a mask cannot wake a pruned entry.
"""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_sparse.core import (
    LayerRow,
    MaskSet,
    Memory,
    Position,
    Remembered,
    RunLength,
    Target,
    find_targets,
    summarize,
)
from lightning_sparse.loop.loop import Stations, Step
from lightning_sparse.loop.rng import collect_rng, restore_rng

__all__ = ["Sparsifier", "Step", "sparsifiers"]

RNG_KEY = "lightning_sparse_rng"


class Sparsifier(Memory, Callback, ABC):
    """Base of every method: overrides the stations it needs and leaves the rest.

    Args:
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart, in checkpoints and messages.
    """

    steps = Remembered(int)
    """Batches so far that ended in an optimizer step."""
    goal = Remembered[dict[str, Any]](lambda: {"total": None, "layers": {}})
    """How many weights a method promises to keep, in all and per layer; None and missing where it promises nothing."""
    _length = Remembered[dict[str, Any]](lambda: RunLength(None, None)._asdict())
    _shapes = Remembered[dict[str, list[int]]](dict)

    def __init__(self, *, targets: str | Sequence[str] = ("*",), name: str | None = None) -> None:
        self.targets = [targets] if isinstance(targets, str) else list(targets or ["*"])
        self.name = name
        self.chosen: list[Target] = []
        self._saved: dict[str, Any] | None = None
        self._rng: dict[str, Tensor] | None = None
        self._stations: Stations | None = None

    # ---- what a method may answer ------------------------------------------------------------------------------------

    def check(self, run: RunLength, until: float = 1.0) -> None:
        """Refuse with a ValueError what cannot work; the weights are chosen, nothing has been touched.

        Args:
            run: the length that fractions of the run refer to.
            until: how much of it is over when this fit ends; less than 1 if a run is resumed to be shorter.
        """

    def begin(self) -> None:
        """A fresh start: make what is remembered, project for the first time."""

    def resume(self) -> None:
        """What was remembered is back; make what is derived from it."""

    def evolve(self, position: Position) -> None:
        """Topology: called at the start of every epoch and right after every step."""

    def before_batch(self, position: Position) -> None:
        """Topology: right before a batch to which no gradients of earlier ones are added.

        For changes that belong to what comes and not to what was: validation, checkpoints and learning rate schedulers that
        follow the last step are over.
        """

    def watch(self, output: Any, batch: Any) -> None:
        """What `training_step` returned for a batch, before any penalty is added; keep no graph alive."""

    def feature_penalty(self) -> Tensor | None:
        """A differentiable term for this batch, from features that the method's own hooks have seen."""
        return None

    @property
    def watches(self) -> bool:
        """Whether `watch` is implemented."""
        return type(self).watch is not Sparsifier.watch

    @property
    def penalizes_features(self) -> bool:
        """Whether `feature_penalty` is implemented."""
        return type(self).feature_penalty is not Sparsifier.feature_penalty

    def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
        """Gradients of a penalty on the weights, in closed form, by name; one at a time where memory counts."""
        return ()

    def before_step(self, step: Step) -> None:
        """Right before the optimizer moves; all gradients are complete."""

    def silence(self, step: Step) -> None:
        """Remove the gradients that the optimizer must not see."""

    def replaces_step(self, step: Step) -> bool:
        """Whether the method has taken this step for itself: the optimizer then finds no gradients, and nothing moves."""
        return False

    def after_step(self, step: Step) -> None:
        """Right after the optimizer has moved."""

    def after_unseen_step(self, step: Step) -> None:
        """The optimizer has moved without `before_step`: a manual step past Lightning, with a closure."""

    def undo_step(self, step: Step) -> None:
        """The step that `before_step` prepared did not happen; leave no trace."""

    def project(self, step: Step) -> None:
        """Put the weights back where they belong."""

    def batch_end(self) -> None:
        """The batch is over; learning rate schedulers that move by steps have moved."""

    def headline(self) -> Mapping[str, float | str]:
        """What the progress bar shows besides the sparsity: a phase, a round. Asked whenever the bar is drawn."""
        return {}

    def numbers(self) -> Mapping[str, float | Tensor]:
        """What the logger shows of this method, under its label. Asked once per epoch."""
        return {}

    def conclude(self) -> None:
        """Training has ended, hooks are still in place."""

    def release(self) -> None:
        """Remove whatever the method has attached to the model; called after success and failure alike."""

    # ---- what a method may use ---------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights this method works on, by name; empty outside training."""
        return {target.name: target.weight for target in self.chosen}

    @property
    def stations(self) -> Stations:
        """The running fit: trainer, module, optimizers, position."""
        if self._stations is None:
            raise RuntimeError(f"{self.label} is not in a running fit.")
        return self._stations

    @property
    def mask_set(self) -> MaskSet | None:
        """The masks this method owns, if it owns any."""
        return None

    @property
    def dropped_live_on(self) -> bool:
        """Whether dropped entries live on out of sight, with moments in the optimizer, and may return after any step."""
        return False

    @property
    def dropped_learn(self) -> bool:
        """Whether the optimizer sees gradients of dropped entries, by which they may return."""
        return False

    @property
    def at_target(self) -> bool | None:
        """Whether no more is kept than `goal` says, in all and in each layer; None for a method that promises nothing."""
        masks, total, layers = self.mask_set, self.goal["total"], self.goal["layers"]
        if masks is None or (total is None and not layers):
            return None
        counts = masks.counts
        in_all = total is None or sum(counts.values()) <= total
        return in_all and all(counts[name] <= kept for name, kept in layers.items())

    def summary(self) -> list[LayerRow]:
        """One row per masked layer: what is kept, of how many, and what is to be kept; the sum last."""
        return [] if self.mask_set is None else summarize(self.mask_set, self.goal["total"], self.goal["layers"])

    @property
    def prepares_steps(self) -> bool:
        """Whether `before_step` and `after_step` are a pair here."""
        return type(self).after_step is not Sparsifier.after_step or type(self).undo_step is not Sparsifier.undo_step

    @property
    def label(self) -> str:
        """How messages call this callback."""
        return type(self).__name__ + (f"(name='{self.name}')" if self.name else "")

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return type(self).__name__ + (f"[{self.name}]" if self.name else "")

    def config(self) -> dict[str, Any]:
        """The arguments this callback was made with, as plain values."""
        return {name: _plain(getattr(self, name)) for name in _arguments(type(self)) if name != "name"}

    def state_dict(self) -> dict[str, Any]:
        if self._saved is not None:  # loaded, and training has not begun
            return self._saved
        return {"config": self.config(), "memory": self.memorize() if self._shapes else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict if state_dict.get("memory") else None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._leads(trainer):
            checkpoint[RNG_KEY] = collect_rng(trainer)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint.get(RNG_KEY)
        if self.state_key not in checkpoint.get("callbacks", {}):
            self.forget()  # the weights that come are those of a run that knows nothing of this one

    def _check_saved(self, saved: Mapping[str, Any]) -> None:
        """A resumed run goes on as it was configured, or not at all."""
        mine = self.config()
        defaults = {name: _plain(value) for name, value in _arguments(type(self)).items()}
        theirs = {**{name: defaults[name] for name in mine}, **saved["config"]}  # of a version that knew fewer arguments
        drift = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if drift:
            changes = ", ".join(f"{key}={mine.get(key)!r} (checkpoint: {theirs.get(key)!r})" for key in drift)
            raise ValueError(
                f"{self.label} resumes with {changes}; restore the checkpoint's values, or start anew from its weights."
            )
        shapes = {target.name: list(target.weight.shape) for target in self.chosen}
        if shapes != saved["memory"]["_shapes"]:
            different = sorted(set(map(str, shapes.items())) ^ set(map(str, saved["memory"]["_shapes"].items())))
            raise ValueError(f"{self.label} resumes with other weights than the checkpoint's: {', '.join(different[:4])}.")

    # ---- the Trainer's hooks: the first method of the Trainer runs the stations for all ------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._saved = self._rng = None
        if stage == "fit":
            missing = [name for name in _arguments(type(self)) if not hasattr(self, name)]
            if missing:
                raise ValueError(f"{type(self).__name__} must store its arguments under their own names; {missing} are not.")
            _refuse_trainer(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.chosen = find_targets(pl_module, self.targets)
        _refuse_optimizers(self, trainer.optimizers)
        if self._leads(trainer) and self._rng is not None:
            # Now, because loaders draw the order of the epoch to come when they are opened.
            restore_rng(trainer, self._rng)
            self._rng = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leads(trainer):
            stations = Stations(trainer, pl_module, sparsifiers(trainer))
            for method in stations.methods:
                method._stations = stations
            stations.open()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leads(trainer):
            self.stations.epoch_start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._leads(trainer):
            self.stations.batch_start(batch_idx)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if self._leads(trainer):
            self.stations.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._leads(trainer):
            self.stations.batch_end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.conclude()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._saved is not None:  # the run was over before it began; keep what it knew
            self.recall(self._saved["memory"])
            self._saved = None
        if self._stations is not None:
            self._stations.close()
            self._stations = None
        self.chosen = []

    def _leads(self, trainer: pl.Trainer) -> bool:
        return sparsifiers(trainer)[0] is self

    def _start(self, run: RunLength) -> None:
        """Begin, continue, or resume; everything has been checked."""
        if self._saved is not None:
            self.recall(self._saved["memory"])
            self._saved = None
            self.place(self.weights, self.stations.module.device)
            self.resume()
        elif self._continues():
            self.resume()
        else:
            if self.stations.trainer.global_step > 0:
                rank_zero_warn(
                    f"{self.label} begins in the middle of a run: the checkpoint, or the fit before, knows nothing of it."
                )
            self.forget()
            self._length = run._asdict()
            self._shapes = {target.name: list(target.weight.shape) for target in self.chosen}
            self.begin()

    def _continues(self) -> bool:
        """Whether this fit goes on with the run that this instance has been through."""
        shapes = {target.name: list(target.weight.shape) for target in self.chosen}
        trainer = self.stations.trainer
        return trainer.global_step > 0 and self.steps > 0 and shapes == self._shapes

    def _run(self, run: RunLength) -> RunLength:
        """The length that fractions of the run refer to: that of the run as it was begun."""
        if self._saved is not None:
            return RunLength(**self._saved["memory"]["_length"])
        return RunLength(**self._length) if self._continues() else run


def sparsifiers(trainer: pl.Trainer) -> list[Sparsifier]:
    """The methods of a Trainer, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Sparsifier)]  # type: ignore[attr-defined]


def _arguments(cls: type) -> dict[str, Any]:
    """All arguments that a method is made with, those it hands on to its base included, and their defaults."""
    names: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            names.update({p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)})
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    names.pop("self", None)
    return names


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor) and hasattr(value, "item"):
        return value.item()  # a number of NumPy, which would keep the checkpoint from loading with weights_only
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value


def _refuse_trainer(method: Sparsifier, trainer: pl.Trainer) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{method.label} does not support strategy={type(strategy).__name__}, which cuts weights into shards; "
            "use 'ddp' or a single device."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"{method.label} cannot share a Trainer with ModelPruning, which renames weights; keep one of them."
            )


def _refuse_optimizers(method: Sparsifier, optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{method.label} does not work with LBFGS, which moves the weights several times per step; use a "
                "first-order optimizer such as SGD or AdamW."
            )
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for target in method.chosen:
        if id(target.weight) not in owned:
            raise ValueError(
                f"{method.label}: no optimizer updates '{target.name}'; return it from configure_optimizers or exclude it "
                f"with targets=['!{target.name}']."
            )
