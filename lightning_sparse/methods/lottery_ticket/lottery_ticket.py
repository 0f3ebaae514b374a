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
    r"""Train, remove the smallest weights, rewind the others to an early point, and train again, for several rounds.

    All rounds run in one fit. After round i the sparsity is $1 - (1 - s)^{i / rounds}$: every round removes the same
    fraction of what is left. A round rewinds weights, buffers such as those of BatchNorm, the optimizer and the learning
    rate schedulers to their state at `rewind_to`; the data continues. Therefore write the learning rate schedule for one
    round, that is, from the beginning to the end of the first one. Anything that depends on the epoch or step number without
    a scheduler is not rewound. The progress bar shows the round; 0 is the dense one.

    Runs at station `before_batch`, after validation and checkpoints have seen the trained ticket. Costs one selection over
    all weights per round. The snapshot takes the memory of the model, plus that of the optimizer's moments if it is not
    taken at the beginning, on the CPU and in checkpoints.

    Sources: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", https://arxiv.org/abs/1803.03635 (rewinding to the
    beginning); Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
    https://arxiv.org/abs/1912.05671 (to step k); Renda, Frankle and Carbin 2020, "Comparing Rewinding and Fine-tuning in
    Neural Network Pruning", https://arxiv.org/abs/2003.02389 (the learning rate only).

    Args:
        sparsity: the final fraction removed, in [0, 1); optional with `structure='n:m'`.
        rounds: number of pruning rounds; the network is trained once more than that. 1 is one-shot. None is the smallest
            number of rounds such that each removes at most a fifth of what is left.
        every: length of one training: a fraction of the run, `'n epochs'` or `'n steps'`; the last one takes the rest of the
            run. None divides the run evenly.
        rewind_to: the point to rewind to, counted from the beginning of the run: 0 is the initialization; a fraction of the
            run, `'n epochs'` or `'n steps'`.
        rewind: `weights` rewinds everything; `learning rate` rewinds the learning rate and its schedulers, while weights and
            moments continue from where they are.
        save_to: folder for every round's ticket: `round=i-ticket.ckpt`, the weights at the start of the round, and
            `round=i-trained.ckpt`, those at its end; both load into the plain model. None saves nothing.
        allocation: how sparsity is distributed over the layers: `global` (scores of all layers compete), `uniform`,
            `uniform+`, `er`, `erk`, `erk+`, `owl` (layers with more outliers among their scores keep more).
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (channels
            across all layers that additions tie together, with biases and norms, so that they can be cut out of the
            network), `heads` (whole attention heads, which can be cut out too), `fan_in` (the same number of weights in
            every output), `block:RxC` (outputs by inputs), `n:m` or `transposable n:m` (in both directions).
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        max_layer_sparsity: the largest fraction that one layer may lose where layers compete, in (0, 1].
        budget: what sparsity counts: `units` (weights, channels or heads) or, with `coupled` or `heads`, the `macs` or
            `parameters` of the whole network, to within one channel.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: if the rounds do not fit into the run, or the run begins after the point to rewind to.

    Example:
        >>> LotteryTicket(sparsity=0.9, rewind_to="2 epochs").trainings.count
        11
    """

    shards: ClassVar[Shards] = "any"

    round = Remembered(int)
    """The number of the current training; 0 is the dense one."""
    moment = Remembered(Snapshot)
    """The snapshot that rounds rewind to."""

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
        refuse_shorter_run(f"{self.label} starts its last round", self.trainings.end, until)

    @property
    def at_target(self) -> bool:
        return self.round == self.trainings.count

    def begin(self) -> None:
        super().begin()
        step = self.run.trainer.global_step
        if step and self.trainings.start and self.trainings.passed_start(self.position(epoch_start=True)):
            raise ValueError(
                f"{self.label}: rewind_to={self.rewind_to!r} lies before step {step}, at which this run begins, so it is "
                f"never "
                "reached; rewind_to=0 rewinds to the beginning of this run."
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
        self.clean()  # the snapshot was dense
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
                f"not {self.quota.sparsity}: training stopped early. Train longer, or use fewer rounds."
            )
