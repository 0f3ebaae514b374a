"""HyperSparse: adaptive regularized training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.core import (
    MaskSet,
    Position,
    Remembered,
    RunLength,
    Span,
    TooShort,
    check_choice,
    check_sparsity,
    check_whole,
    put_back_,
)
from lightning_sparse.families.masked import Masked
from lightning_sparse.functional import HYPERSPARSE_ALIGNMENT, quantile_rank, top_k_masks
from lightning_sparse.loop import Shards, Step
from lightning_sparse.loop.dry_run import dry_run, refuse_unrepeatable_data, train_but_leaves
from lightning_sparse.methods.hypersparse.pull import PENALTIES
from lightning_sparse.methods.hypersparse.stop_rule import Attempt, StopRule
from lightning_sparse.methods.hypersparse.training_score import TrainingScore

__all__ = ["HyperSparse"]

ONE_BOUNDARY = "the penalty has one boundary for all chosen weights together; choose weights with targets"

PHASES = ("pretrain", "regularize", "finetune")

PUBLISHED_GROWTH, PUBLISHED_EPOCHS = 1.05, 64
PUBLISHED_PULL = 5e-6 * 782 * sum(PUBLISHED_GROWTH**epoch for epoch in range(PUBLISHED_EPOCHS))
"""The strength summed over all steps of the published runs, which stopped after 64 and 66 epochs of 782 steps."""

RESERVE = 3.0
"""By how much the strength of a planned phase exceeds the published pull: stopping early is fine, stopping late is not."""

LEARNING_RATES: dict[str, Callable[[float], float]] = {
    "step": lambda progress: 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "constant": lambda progress: 1.0,
}


@final
class HyperSparse(Masked):
    r"""Increase an adaptive penalty until a pruned copy predicts as well as the dense model, then prune and fine-tune.

    There are three phases of whole epochs. `pretrain` trains as usual. `regularize` adds, at station `weight_penalty`,

    $$ \lambda_0 \eta^e \, sign(w) \, P \, sech^2(s |w|) $$

    to the gradients (see `functional.hypersparse_gradient`). After every epoch, a copy pruned to the target is scored on the
    training set in evaluation mode, and the phase ends when that copy has caught up with the dense model's score during that
    epoch (`core.StopRule`). A model that returns no loss in evaluation mode, such as a detector, is scored in train mode
    with its norms and dropout in evaluation mode. Then the best copy is restored, its mask is fixed, the optimizer state is
    reset, and `finetune` runs to the end.

    Costs four passes over the weights per step during regularization, and one pass over the training set per epoch of it.
    The copies that may still be selected (at most 2 * radius + 2) stay on the CPU and in the checkpoint.

    Source: Glandorf, Kaiser and Rosenhahn 2023, "HyperSparse Neural Networks: Shifting Exploration to Exploitation through
    Adaptive Regularization", https://arxiv.org/abs/2308.07163, as in the official repository. As there, one weight more than
    sparsity * n is removed. Of equal magnitudes on the boundary, the earlier ones are kept, as many as needed (there, none),
    and sparsity * n is rounded down in exact arithmetic: 0.57 * 20,024,000 gives one less there. Phases as fractions of the
    run, and the strengths derived from them, are ours.

    Args:
        sparsity: the fraction removed, in (0, 1), of all chosen weights together.
        strength: strength in the first epoch of the phase (lambda_0; published: 5e-6). None: three times the published pull.
        growth: factor by which the strength grows per epoch (eta; published: 1.05). None: the published growth over 64
            epochs, spread over this phase.
        penalty: `hypersparse`, or `l1` or `l2` (the sum of squares) in the same framework; `l2` needs its own strength.
        pretrain: length of the first phase: a fraction of the run or `'n epochs'` (published: 60); 0 for none.
        regularize: maximum length of the second phase (published: no limit).
        finetune: None: to the end of the run, so that time saved by regularization is used. `'n epochs'` (published: 160):
            training ends this long after pruning, whenever that is; set `max_epochs=-1`.
        radius: a copy is judged by the mean score over this many neighbors on each side of it (published: 1).
        score: how the pruned copy and the dense model are compared. None uses the entry `accuracy` of the dictionary that
            `training_step` returns if it has one, otherwise the loss. Or the name of such an entry, with a minus sign if
            lower is better; or a function of (output, batch), higher is better.
        learning_rate_schedule: constant until pruning, then restarted from the initial value: `step` (divided by 10 at 1/2
            and 3/4 of fine-tuning; published), `cosine` or `constant`. None keeps the module's schedulers.
        max_pull: cap on P, which grows without bound when the magnitude on the pruning boundary goes to zero.
        alignment: x*, the point of tanh that meets the pruning boundary; the official code rounds it to 0.6585.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.
    """

    shards: ClassVar[Shards] = "any"

    phase = Remembered[str](lambda: PHASES[0])
    """`pretrain`, `regularize` or `finetune`."""
    history = Remembered[list[dict[str, float]]](list)
    """One entry per epoch of regularization: strength, pull, quantile, scores, and the best copy so far."""
    stop_reason = Remembered(str)
    """Why regularization ended: `fresh` or `stale` (see `core.StopRule`), or `limit`."""
    stop_rule = Remembered[StopRule]()
    first_epoch = Remembered(int)
    phase_start = Remembered(int)
    plan = Remembered[dict[str, Any]](dict)
    """The phases in epochs, and the number of steps per epoch."""
    rates = Remembered[list[list[float]]](list)
    """Learning rates of all groups of all optimizers, before fine-tuning."""
    dense = Remembered[Tensor](lambda: torch.zeros(2, dtype=torch.float64), averaged=True)
    """The dense model's score in this epoch: the sum, and the number of samples."""
    scale = Remembered[list[Tensor]](list)
    """Quantile and pull of the penalty in the last step."""

    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("allocation", "structure", "layer_sparsity"), ONE_BOUNDARY),
        "learning_rate": "use learning_rate_schedule for its schedule",
    }

    def __init__(
        self,
        sparsity: float,
        *,
        strength: float | None = None,
        growth: float | None = None,
        penalty: Literal["hypersparse", "l1", "l2"] = "hypersparse",
        pretrain: float | str = 0.2,
        regularize: float | str = 0.4,
        finetune: str | None = None,
        radius: int = 1,
        score: str | Callable[[Any, Any], Any] | None = None,
        learning_rate_schedule: Literal["step", "cosine", "constant"] | None = "step",
        max_pull: float = math.inf,
        alignment: float = HYPERSPARSE_ALIGNMENT,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.sparsity, self.strength, self.growth, self.penalty = sparsity, strength, growth, penalty
        self.pretrain, self.regularize, self.finetune, self.radius = pretrain, regularize, finetune, radius
        self.score, self.learning_rate_schedule = score, learning_rate_schedule
        self.max_pull, self.alignment = max_pull, alignment
        check_sparsity("sparsity", sparsity)
        if sparsity == 0:
            raise ValueError("sparsity=0 would regularize to no effect; remove the callback to train densely.")
        for argument in ("strength", "growth", "max_pull", "alignment"):
            value = getattr(self, argument)
            infinite = value == math.inf and argument != "max_pull"  # which is infinite by default
            if value is not None and (infinite or not (isinstance(value, Real) and float(value) > 0)):
                raise ValueError(f"{argument}={value!r} must be a positive number.")
        check_choice("penalty", penalty, PENALTIES)
        if learning_rate_schedule is not None:
            check_choice("learning_rate_schedule", learning_rate_schedule, LEARNING_RATES, " or None")
        check_whole("radius", radius, 0)
        self._check_spans()
        if penalty == "l2" and strength is None:
            raise ValueError("penalty='l2' has no published strength; set one, such as strength=1e-4.")
        self.stop_rule = StopRule(radius)
        self._score = TrainingScore(score)

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def _check_spans(self) -> None:
        for argument in PHASES:
            span = getattr(self, argument)
            if span is None:
                continue
            parsed = Span.parse(span, argument)
            if parsed.unit == "steps" or (parsed.unit == "epochs" and parsed.value != int(parsed.value)):
                raise ValueError(f"{argument}={span!r} must be whole epochs: the pruned copy is scored after each.")
            if argument == "finetune" and parsed.unit != "epochs":
                raise ValueError(f"finetune={span!r} must be a number of epochs, such as '160 epochs', or None.")
            if parsed.value == 0 and argument != "pretrain":
                raise ValueError(f"{argument}={span!r} makes the phase empty; give it at least one epoch.")

    def check(self, run: RunLength, until: float = 1.0) -> None:
        refuse_unrepeatable_data(self.run.trainer, self.run.module, self.label)
        total = sum(target.size for target in self.chosen)
        if self._kept(total) < 1:
            raise ValueError(
                f"sparsity={self.sparsity} of {total:,} weights leaves nothing; lower it or choose more layers."
            )
        plan = self._make_plan(run)
        if run.epochs is not None and self.known("phase", None) != "finetune":
            end = math.ceil(run.epochs * until - 1e-9)
            needed = plan["pretrain"] + plan["regularize"] + (plan["finetune"] or 1)
            if needed > end:
                phases = ", ".join(f"{name} {plan[name] or 'at least 1'}" for name in PHASES if plan[name] != 0)
                raise TooShort(
                    f"{self.label} needs {needed} epochs ({phases}), but training ends after {end}; shorten the phases or "
                    "raise max_epochs" + (", or set max_epochs=-1: the method ends training." if plan["finetune"] else ".")
                )
        if self.strength is None and plan["steps"] is None:
            raise ValueError(f"{self.label} cannot derive its strength: the data has no length; set one, such as 5e-6.")

    def _make_plan(self, run: RunLength) -> dict[str, Any]:
        """The phases in epochs, and the number of steps per epoch."""
        plan: dict[str, Any] = {
            "epochs": run.epochs,
            "finetune": None if self.finetune is None else int(Span.parse(self.finetune).value),
        }
        for name in PHASES[:2]:
            span = Span.parse(getattr(self, name), name)
            if span.unit == "epochs":
                plan[name] = int(span.value)
            elif run.epochs is None:
                raise ValueError(
                    f"{name}={span} is a fraction of a run without a length; write '60 epochs' or set max_epochs."
                )
            else:
                plan[name] = max(1, round(span.value * run.epochs)) if span.value else 0
        batches = self.run.trainer.num_training_batches
        plan["steps"] = None if batches == float("inf") else -(-int(batches) // self.run.trainer.accumulate_grad_batches)
        return plan

    def _kept(self, total: int) -> int:
        return total - quantile_rank(self.sparsity, total) - 1

    def begin(self) -> None:
        super().begin()
        trainer = self.run.trainer
        self.promise(self._kept(self.masks.total))
        self.plan = self._make_plan(RunLength(**self.begun_with))
        self.first_epoch = self.phase_start = trainer.current_epoch
        self.rates = [
            [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]
        with dry_run(trainer, self.run.module):
            pass  # refuse a module that cannot be copied now, not when the copy is needed

    def resume(self) -> None:
        super().resume()
        if self.phase == "finetune":
            self._end_training()

    # ---- the phases --------------------------------------------------------------------------------------------------

    def evolve(self, position: Position) -> None:
        if not position.epoch_start:
            return
        epoch = position.epoch
        if self.phase == "regularize" and epoch > self.phase_start:
            reason = self._try_pruned_copy(epoch - 1)
            if reason is None and epoch - self.phase_start >= self.plan["regularize"]:
                reason = "limit"
            if reason is not None:
                self._prune(epoch, reason)
        if self.phase == "pretrain" and epoch - self.first_epoch >= self.plan["pretrain"]:
            self.phase, self.phase_start = "regularize", epoch
        self.dense = torch.zeros(2, dtype=torch.float64, device=self.run.module.device)
        for optimizer in self.run.optimizers:
            self._set_rates(optimizer)

    def _try_pruned_copy(self, epoch: int) -> str | None:
        """Score a copy pruned to the target, and consult the stop rule."""
        masks, trainer = self._magnitude_masks(), self.run.trainer
        tried = torch.zeros_like(self.dense)  # failures, and samples with a score: all ranks must use the same mode
        try:
            state, pruned = self._score.of_copy(self.run, masks, nn.Module.eval)
            tried[1] = pruned[1]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # such models fail in many ways; a failure in train mode too is raised from there
            tried[0] = 1
        failures, samples = self._score.over_ranks(trainer, tried)
        if failures or not samples:
            state, pruned = self._score.of_copy(self.run, masks, train_but_leaves)
        dense, attained = (self._score.mean(trainer, total) for total in (self.dense, pruned))
        if not math.isfinite(dense):
            raise RuntimeError(
                f"{self.label}: the dense model scored {dense} in epoch {epoch}; training has diverged. Lower the learning "
                "rate or the strength."
            )
        attained = attained if math.isfinite(attained) else -math.inf  # worse than any other
        reason = self.stop_rule.add(Attempt(epoch, attained, state, masks.pieces()), dense)
        entry = {"epoch": epoch, "strength": self.strength_in(epoch), "pruned": attained, "dense": dense}
        if self.scale:
            entry |= {"quantile": float(self.scale[0]), "pull": float(self.scale[1])}
        assert self.stop_rule.best is not None
        self.history.append(entry | {"best": self.stop_rule.best.epoch, "mean": self.stop_rule.mean})
        return reason

    def _magnitude_masks(self) -> MaskSet:
        masks, sizes = MaskSet(self.weights), [weight.detach().abs() for weight in self.weights.values()]
        masks.replace(zip(self.weights, top_k_masks(sizes, self._kept(masks.total), self.spread), strict=True))
        return masks

    def _prune(self, epoch: int, reason: str) -> None:
        """Restore the best copy, fix its mask, and reset the optimizer state."""
        best, last = self.stop_rule.best, self.history[-1]
        assert best is not None
        what = f"the pruned copy of epoch {best.epoch}, score {best.score:.4g} (mean {self.stop_rule.mean:.4g})"
        scores = f"the dense model's {last['dense']:.4g} in epoch {epoch - 1}"
        if reason == "stale":
            rank_zero_warn(
                f"{self.label} continues with {what}: the dense model has fallen below it, to {scores}. The penalty grows "
                "faster than the network can follow; lower strength or growth."
            )
        else:
            verb = "has caught up with" if reason == "fresh" else "is the best when the phase ends; compare"
            rank_zero_info(f"{self.label} continues with {what}, which {verb} {scores}.")
        if self.layouts:
            put_back_(best.state, self.run.module.state_dict())
        else:
            self.run.module.load_state_dict(best.state)
        restored = MaskSet()
        restored.load_state_dict(best.masks)
        restored.to(self.weights)
        self.set_masks({name: restored[name] for name in self.weights})
        for optimizer in self.run.optimizers:
            optimizer.state.clear()
        self.stop_reason, self.phase, self.phase_start = reason, "finetune", epoch
        self.stop_rule.reset()  # releases the copies
        self.scale = []
        self._end_training()

    def _end_training(self) -> None:
        """If fine-tuning has its own length, end the run with it."""
        if self.plan["finetune"] is not None:
            trainer, end = self.run.trainer, self.phase_start + self.plan["finetune"]
            if trainer.current_epoch < end:
                trainer.fit_loop.max_epochs = end

    # ---- every step --------------------------------------------------------------------------------------------------

    def strength_in(self, epoch: int) -> float:
        """Lambda in an epoch of regularization."""
        epochs = self.plan["regularize"]
        growth = self.growth or PUBLISHED_GROWTH ** (PUBLISHED_EPOCHS / epochs)
        strength = self.strength
        if strength is None:
            strength = RESERVE * PUBLISHED_PULL / (self.plan["steps"] * sum(growth**e for e in range(epochs)))
        return strength * growth ** (epoch - self.phase_start)

    def weight_penalty(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        if self.phase != "regularize":
            return
        strength = self.strength_in(self.run.trainer.current_epoch)
        gradient = PENALTIES[self.penalty](self)
        for name, weight in step.weights.items():
            yield name, gradient(weight.detach()).mul_(strength)

    def _set_rates(self, optimizer: Optimizer) -> None:
        if self.learning_rate_schedule is None:
            return
        trainer = self.run.trainer
        factor = 1.0
        if self.phase == "finetune":
            length = self.plan["finetune"] or self.plan["epochs"] - self.phase_start
            factor = LEARNING_RATES[self.learning_rate_schedule](
                min(1.0, (trainer.current_epoch - self.phase_start) / length)
            )
        rates = self.rates[trainer.optimizers.index(optimizer)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def batch_end(self, output: Any, batch: Any) -> None:
        self._score.add(self.dense, output, batch, self.run.module.automatic_optimization)
        for optimizer in self.run.optimizers:
            self._set_rates(optimizer)  # schedulers just set theirs, and observers read them before the next step

    # ---- what can be seen --------------------------------------------------------------------------------------------

    def headline(self) -> Mapping[str, float | str]:
        return {"phase": f"{self.phase} {self.run.trainer.current_epoch - self.phase_start + 1}"}

    def numbers(self) -> Mapping[str, float | Tensor]:
        shown: dict[str, float | Tensor] = {"phase": float(PHASES.index(self.phase))}
        if self.phase == "regularize":
            shown["strength"] = self.strength_in(self.run.trainer.current_epoch)
            shown |= dict(zip(("quantile", "pull"), self.scale, strict=False))
        if self.history:
            last = self.history[-1]
            shown |= {"pruned score": last["pruned"], "dense score": last["dense"], "best mean": last["mean"]}
        return shown

    def conclude(self) -> None:
        if self.phase != "finetune":
            rank_zero_warn(
                f"{self.label} ends dense: training stopped in phase '{self.phase}', before pruning. Train longer, or "
                "shorten the earlier phases."
            )
