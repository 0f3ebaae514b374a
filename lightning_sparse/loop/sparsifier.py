"""The loop of sparse training, and the stations at which a method may act.

    on_train_start                 choose the weights; check everything; begin, or continue from the checkpoint;
                                   hook every optimizer
    for each epoch
        on_train_epoch_start       evolve             TOPOLOGY by epoch: scores -> masks
        for each batch
            on_train_batch_start   before_batch       TOPOLOGY by rounds: unseen by validation, checkpoints, schedulers
            training_step          feature_penalty    + penalty(features)             in the graph
            backward
            on_before_optimizer_step
                                   weight_penalty     grad += d penalty / d weight    closed form, no graph
                                   before_step        dense gradients may be read here
                                   silence            gradients of pruned entries become zero, or all: the step is replaced
            optimizer.step()
            step post-hook         after_step         the other half of before_step
                                   project            PROJECTION: weight <- project(weight)
                                   evolve             TOPOLOGY by step: new masks, and weights adjusted to them
            (a step that did not happen: undo_step instead)
            on_train_batch_end     batch_end          what training_step returned; learning rate schedulers have moved too
                                   numbers            logged, once per epoch (headline: on the progress bar, after the phase)
        (validation, checkpoints:  settle             repair what was written since the last step)
        validation, checkpoints    see exactly the weights that the next forward pass will see
        on_train_epoch_end         epoch_end          counts of the epoch, logged
    on_train_end                   conclude
    on_fit_end / exception         release            hooks removed; nothing left behind

Each station is visited for all methods of the Trainer before the next one begins, so the result does not depend on the order
of the callbacks: a penalty listed after a mask cannot revive a pruned entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.loop.arguments import arguments
from lightning_sparse.loop.conflicts import refuse_optimizers
from lightning_sparse.loop.loop import Loop
from lightning_sparse.loop.method import Method
from lightning_sparse.loop.rng import collect_rng, restore_rng
from lightning_sparse.loop.run import Run

__all__ = ["Sparsifier", "sparsifiers"]

RNG_KEY = "lightning_sparse_rng"


class Sparsifier(Method, Callback):
    """A method as a Lightning callback. The first one of a Trainer runs the loop for all of them.

    Args:
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class, in checkpoints and messages.
    """

    def __init__(self, *, targets: str | Sequence[str] = ("*",), name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.loop: Loop | None = None
        """The loop that visits the stations, in a running fit."""
        self._rng: dict[str, Tensor] | None = None
        self._fresh = False

    def _leads(self, trainer: pl.Trainer) -> bool:
        return sparsifiers(trainer)[0] is self

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return type(self).__name__ + (f"[{self.name}]" if self.name else "")

    def state_dict(self) -> dict[str, Any]:
        if self.brought is not None:  # loaded, and training has not begun
            return dict(self.brought)
        begun = self.shapes and not self._fresh
        return {"config": self.config(), "memory": self.memorize(self.layouts) if begun else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.brought = state_dict if state_dict.get("memory") else None
        if self.loop is not None and self.brought is not None:
            self.loop.reopen(self)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._leads(trainer):
            checkpoint[RNG_KEY] = collect_rng(trainer)
        if self.running and trainer.world_size > 1:
            # Every rank resumes from the file of the first one: each takes its shard of what was gathered.
            for name in self.averaged():
                mean = trainer.strategy.reduce(getattr(self, name).clone(), reduce_op="sum") / trainer.world_size
                checkpoint["callbacks"][self.state_key]["memory"][name] = mean.cpu()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint.get(RNG_KEY)
        if self.loop is not None and self.loop.leader is self:
            self._continue_rng(trainer)
        if self.state_key not in checkpoint.get("callbacks", {}):
            self.forget()  # the loaded weights belong to a run without this method

    def _continue_rng(self, trainer: pl.Trainer) -> None:
        if self._rng is not None:
            restore_rng(trainer, self._rng)
            self._rng = None

    # ---- the Trainer's hooks -----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.brought = self._rng = None
        self._fresh = False
        if stage == "fit":
            if self.loop is not None:  # the last fit ended in a tuner's search, where no callback hears of an error
                self._leave()
            missing = [name for name in arguments(type(self)) if not hasattr(self, name)]
            if missing:
                raise ValueError(f"{type(self).__name__} must store its arguments under their own names; {missing} are not.")
            _refuse_trainer(self, trainer)
            self._fresh = trainer.global_step == 0  # what is remembered is of the last fit; a tuner may save before this one

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.choose(pl_module, goes_on=trainer.global_step > 0)
        refuse_optimizers(self, trainer.optimizers)
        if self._leads(trainer):
            self._continue_rng(trainer)  # now, because loaders draw the order of the next epoch when they are opened

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leads(trainer):
            methods = sparsifiers(trainer)
            loop = Loop(Run(trainer, pl_module), methods)
            for method in methods:
                method.loop = loop
            loop.open()
        self._fresh = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop is not None and self.loop.leader is self:
            self.loop.epoch_start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.loop is not None and self.loop.leader is self:
            self.loop.batch_start(batch_idx)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        if self.loop is not None and self.loop.leader is self:
            self.loop.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.loop is not None and self.loop.leader is self:
            self.loop.batch_end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop is not None and self.loop.leader is self:
            self.loop.settle()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop is not None and self.loop.leader is self:
            self.loop.epoch_end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop is not None and self.loop.leader is self:
            self.loop.conclude()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        empty = self.loop is None and 0 in (trainer.num_training_batches, trainer.limit_train_batches)
        self._leave()
        if empty:
            raise ValueError(
                f"{self.label} has nothing to train on: the training set yields no batches; check the data and "
                "limit_train_batches."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave()
        if isinstance(exception, IsADirectoryError):
            _explain_folder(trainer, exception)

    def _leave(self) -> None:
        if self.loop is not None:
            self.loop.close()
            self.loop = None
        self._fresh = False
        self.leave()


def sparsifiers(trainer: pl.Trainer) -> list[Sparsifier]:
    """The methods of a Trainer, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Sparsifier)]  # type: ignore[attr-defined]


def _refuse_trainer(method: Method, trainer: pl.Trainer) -> None:
    strategy = trainer.strategy
    kind = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{method.label} does not support strategy={kind}, which flattens weights into pieces without rows; use "
            "ModelParallelStrategy with fully_shard, 'ddp', or a single device."
        )
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"{method.label}: accumulate_grad_batches={trainer.accumulate_grad_batches} must be a number >= 1.")
    for name, value in (("max_epochs", trainer.max_epochs), ("max_steps", trainer.max_steps)):
        if value == 0:
            raise ValueError(f"{method.label}: {name}=0 trains nothing; give a number >= 1.")
    if isinstance(strategy, ModelParallelStrategy):
        if method.shards == "none":
            raise ValueError(
                f"{method.label} does not support strategy={kind}, which shards weights, because it needs whole "
                "weights; use 'ddp' or a single device."
            )
        if method.shards == "data" and strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"{method.label} does not support tensor parallelism, where a rank sees only some features of a layer; use "
                "ModelParallelStrategy(tensor_parallel_size=1)."
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"{method.label} cannot share a Trainer with ModelPruning, which renames weights; keep one of them."
            )


def _explain_folder(trainer: pl.Trainer, error: IsADirectoryError) -> None:
    """Explain Lightning's error about a distributed checkpoint; no hook is called before Lightning loads one."""
    if trainer.ckpt_path is not None and (Path(trainer.ckpt_path) / ".metadata").is_file():
        raise ValueError(
            f"ckpt_path='{trainer.ckpt_path}' is a distributed checkpoint, which Lightning cannot load with strategy="
            f"{type(trainer.strategy).__name__}; resume with ModelParallelStrategy, on any number of devices. To continue "
            f"in "
            "one process, first resume with save_distributed_checkpoint=False, which writes a single file; for the "
            "weights alone use lightning_sparse.export.whole_weights."
        ) from error
