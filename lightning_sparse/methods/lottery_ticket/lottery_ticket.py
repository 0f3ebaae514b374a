"""The lottery ticket: iterative magnitude pruning with rewinding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, final

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.core import (
    AllocationName,
    BudgetName,
    Position,
    Remembered,
    RunLength,
    StructureName,
    check_choice,
    refuse_shorter_run,
)
from lightning_sparse.families import Budgeted
from lightning_sparse.functional import exponential, magnitude
from lightning_sparse.loop import Shards
from lightning_sparse.loop.privates import average_models
from lightning_sparse.methods.lottery_ticket.rounds import Rounds
from lightning_sparse.methods.lottery_ticket.snapshot import Snapshot, restart_average

__all__ = ["LotteryTicket"]

REWINDS = ("weights", "learning rate")


@final
class LotteryTicket(Budgeted):
    r"""Train, remove the smallest weights, return the others to where they were early on, and train again; several times.

    All rounds run in one fit. After round i the sparsity is $1 - (1 - s)^{i / rounds}$: every round removes the same share
    of what is left. A round returns weights, buffers such as those of BatchNorm, the optimizer and the learning rate
    schedulers to the step they had at `rewind_to`; the data go on. So write the learning rate schedule for one round, that
    is from the beginning to the end of the first. What depends on the number of the epoch or the step without a scheduler
    is not returned. The progress bar shows the round; 0 is the dense one.

    At station `before_batch`, when validation and checkpoints have seen the trained ticket: one selection over all weights
    per round. The moment to return to takes the memory of the model, and of the optimizer's moments if it is not the
    beginning, on the CPU and in checkpoints.

    Sources: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", https://arxiv.org/abs/1803.03635 (to the beginning);
    Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", https://arxiv.org/abs/1912.05671 (to
    step k); Renda, Frankle and Carbin 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning",
    https://arxiv.org/abs/2003.02389 (the learning rate alone).

    Args:
        sparsity: the fraction removed in the end, in [0, 1); may be left out for `structure='n:m'`.
        rounds: how many times is pruned; the network is trained once more than that. 1 is one-shot. None is the fewest that
            remove at most a fifth of what is left each.
        every: length of a training: a fraction of the run, `'n epochs'` or `'n steps'`; the last one takes what remains of
            the run. None shares the run out evenly.
        rewind_to: the moment to return to, counted from the beginning of the run: 0 is the initialization; a fraction of
            the run, `'n epochs'` or `'n steps'`.
        rewind: `weights` returns all; `learning rate` returns the learning rate and its schedulers, while weights and
            moments go on from where they are.
        save_to: a folder for every round's ticket: `round=i-ticket.ckpt`, the weights that the round begins with, and
            `round=i-trained.ckpt`, those it ends with; both load into the plain model. None saves nothing.
        allocation: how sparsity is shared: `global` (scores of all layers compete), `uniform`, `uniform+`, `er`, `erk`,
            `erk+`, `owl` (more where scores have outliers).
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (the same,
            in all layers that additions couple, with biases and norms, so that they can leave the network), `heads` (of
            attention, which can leave too), `fan_in` (as many weights in every output), `block:RxC` (outputs by inputs),
            `n:m` or `transposable n:m` (both ways).
        layer_sparsity: layers with a sparsity of their own, glob -> sparsity, counted in the total.
        max_layer_sparsity: the largest share that a layer loses where layers compete, in (0, 1].
        budget: what sparsity counts: `units` (weights, or channels), or, with `coupled` or `heads`, the `macs` or the
            `parameters` of the whole network, to within one channel.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.

    Raises:
        ValueError: if the rounds do not fit into the run, or it begins after the moment to return to.

    Example:
        >>> LotteryTicket(sparsity=0.9, rewind_to="2 epochs").trainings.count
        11
    """

    shards: ClassVar[Shards] = "any"

    round = Remembered(int)
    """Which training this is; 0 is the dense one."""
    moment = Remembered(Snapshot)
    """What rounds return to."""

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        rounds: int | None = None,
        every: float | str | None = None,
        rewind_to: float | str = 0.0,
        rewind: Literal["weights", "learning rate"] = "weights",
        save_to: str | None = None,
        allocation: AllocationName = "global",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        budget: BudgetName = "units",
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            max_layer_sparsity=max_layer_sparsity,
            budget=budget,
            targets=targets,
            name=name,
        )
        self.rounds, self.every, self.rewind_to, self.rewind, self.save_to = rounds, every, rewind_to, rewind, save_to
        check_choice("rewind", rewind, REWINDS)
        fewest = max(1, math.ceil(math.log(1 - self.quota.sparsity) / math.log(0.8) - 1e-9))
        self.trainings = Rounds(fewest if rounds is None else rounds, every, rewind_to)

    def check(self, run: RunLength, until: float = 1.0) -> None:
        super().check(run, until)
        self.trainings.resolve(run)
        refuse_shorter_run(f"{self.label} begins its last round", self.trainings.end, until)

    @property
    def at_target(self) -> bool:
        return self.round == self.trainings.count

    def begin(self) -> None:
        super().begin()
        step = self.run.trainer.global_step
        if step and self.trainings.start and self.trainings.passed_start(self.position(epoch_start=True)):
            raise ValueError(
                f"{self.label}: rewind_to={self.rewind_to!r} lies before step {step}, at which this run begins, so it will "
                "never come; rewind_to=0 returns to where the run begins."
            )

    def before_batch(self, position: Position) -> None:
        run = self.run
        if not run.fresh:
            return
        schedulers = [config.scheduler for config in run.trainer.lr_scheduler_configs]
        if not self.moment and self.trainings.reached_start(position):
            self.moment.take(run.module, run.optimizers, schedulers)
            self._save("ticket")
        due = self.trainings.count if run.ends_with_next_step else self.trainings.due(position)
        if due <= self.round:
            return
        self._save("trained")
        self.round = due
        sparsity = exponential(due / self.trainings.count, 0.0, self.quota.sparsity)
        self.prune(sparsity, lambda name, weight: magnitude(weight))
        if self.rewind == "weights":
            self.moment.restore_weights(run.module)
        self.moment.restore_optimizers(run.optimizers, schedulers, moments=self.rewind == "weights")
        self.clean()  # the moment to return to was dense
        if self.rewind == "weights":
            for average in average_models(run.trainer):
                restart_average(average, run.module)
        self._save("ticket")

    def _save(self, what: str) -> None:
        if self.save_to is not None:
            file = Path(self.save_to) / f"round={self.round}-{what}.ckpt"
            self.run.trainer.save_checkpoint(file, weights_only=True)

    def headline(self) -> Mapping[str, float | str]:
        return {"round": f"{self.round} of {self.trainings.count}"}

    def numbers(self) -> Mapping[str, float | Tensor]:
        return {"round": float(self.round)}

    def conclude(self) -> None:
        self._save("trained")
        if self.round < self.trainings.count:
            rank_zero_warn(
                f"{self.label} ends in round {self.round} of {self.trainings.count} at sparsity {self.masks.sparsity:.4f}, "
                f"not {self.quota.sparsity}: training stopped early. Train on, or take fewer rounds."
            )
