"""Methods that train sparse from the start and move connections during training."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.core import (
    Channels,
    FanIn,
    MaskSet,
    Position,
    Remembered,
    RunLength,
    StructureName,
    Target,
    TooShort,
    UnscoredAllocationName,
    Window,
    check_choice,
    check_schedule,
    spread_over,
)
from lightning_sparse.families.budgeted import Budgeted
from lightning_sparse.functional import DROP_SCHEDULES, drop_count
from lightning_sparse.functional.regrowth import DropScheduleName
from lightning_sparse.functional.schedules import Schedule
from lightning_sparse.loop import Step
from lightning_sparse.loop.rng import check_seed, draw_seed

__all__ = ["Rewiring"]


class Rewiring(Budgeted):
    """Start from a random mask, and repeatedly drop some connections of each layer and grow the same number elsewhere.

    Runs at station `evolve`, at the cost of two selections per layer and update; between updates it costs what every mask
    costs. The number of connections of each layer never changes. Grown weights start at zero with zero moments; a connection
    that is dropped and grown again in the same update keeps its weight, as in the official code of RigL. Gradients come from
    the regular backward pass, penalties included; they are read in `before_step` and kept in one buffer until the update is
    done.

    Args:
        sparsity: the fraction removed, in [0, 1); optional with `structure='n:m'`.
        start: when rewiring starts: a fraction of the run, `'n epochs'` or `'n steps'`. At 0 the random mask counts as the
            first update.
        end: when rewiring ends; no connections move after that.
        every: time between updates; `'n epochs'` updates at the start of epochs, everything else after steps. About a
            hundred steps or more: grown connections need time to matter before they are judged.
        drop_fraction: fraction of each layer's connections that an update drops, in (0, 1).
        final_drop_fraction: the drop fraction at `end`, in [0, 1).
        drop_schedule: `cosine`, `constant`, or a function of (progress, start value, end value).
        allocation: how sparsity is distributed over the layers: `erk`, `erk+` (last layer dense), `er`, `uniform`,
            `uniform+` (first layer dense), or `global` (every weight has the same chance). With `n:m` every layer has the
            same sparsity.
        structure: `unstructured`, `n:m` (every group of m inputs keeps n connections at all times), `fan_in` (every output
            of a layer has the same number of connections: SRigL, Lasby et al. 2024, https://arxiv.org/abs/2305.02299), or
            `block:RxC` (whole blocks move).
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        min_salient: with `structure='fan_in'`: ablate outputs where less than this fraction of the fan-in survives or grows,
            in [0, 1] (published: 0.3 for convolutional networks, 0.95 for transformers); never in the last layer. 0 ablates
            none.
        track_explored: record which weights have ever been active, one byte each, for `explored_rate`.
        seed: of the mask and of all that is grown at random. None takes the seed of `seed_everything`, or draws one.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.
    """

    has_scores: ClassVar[bool] = False
    reads_gradients: ClassVar[bool] = True
    """Whether scores need gradients; if not, none are kept."""
    takes_steps: ClassVar[bool] = False
    """Whether an update replaces an optimizer step, which then moves nothing."""

    drawn_seed = Remembered(int)
    updates = Remembered(int)
    """The number of updates so far."""
    explored = Remembered(MaskSet)
    """The union of all masks so far, if it is tracked."""
    window = Remembered[Window]()
    last_update = Remembered(int)
    """The step after the last update."""
    gradients = Remembered[dict[str, Tensor | None]](dict, over="entries")
    """Dense gradients of the step after which an update is due."""

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        start: float | str = 0.0,
        end: float | str = 0.75,
        every: float | str = 0.05,
        drop_fraction: float = 0.3,
        final_drop_fraction: float = 0.0,
        drop_schedule: DropScheduleName | Schedule = "cosine",
        allocation: UnscoredAllocationName = "erk",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        min_salient: float = 0.3,
        track_explored: bool = False,
        seed: int | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            targets=targets,
            name=name,
        )
        self.track_explored, self.seed, self.min_salient = track_explored, seed, min_salient
        self.start, self.end, self.every = start, end, every
        self.drop_fraction, self.final_drop_fraction = drop_fraction, final_drop_fraction
        self.drop_schedule = drop_schedule
        _check_share("drop_fraction", drop_fraction, "(0, 1): the share of a layer's connections that an update drops", 0.3)
        if final_drop_fraction != 0:
            _check_share("final_drop_fraction", final_drop_fraction, "[0, 1): what drop_fraction falls to", 0.0)
        if callable(drop_schedule):
            check_schedule("drop_schedule", drop_schedule, drop_fraction, final_drop_fraction)
        else:
            check_choice("drop_schedule", drop_schedule, DROP_SCHEDULES, " or give a function")
        check_seed(seed)
        share: object = min_salient  # a config may contain anything
        if not isinstance(share, Real) or not 0 <= float(share) <= 1:
            raise ValueError(f"min_salient={share!r} must be in [0, 1]: the share of its fan-in that an output needs.")
        if isinstance(self.quota.structure, Channels):
            raise ValueError(
                f"structure='{structure}' is not rewired; write 'unstructured', 'fan_in', 'block:RxC' or 'n:m' such as "
                "'2:4'."
            )
        self.window = Window(start, end, every)
        self._reading = False

    # ---- what a method answers ---------------------------------------------------------------------------------------

    @abstractmethod
    def keep_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        """How important each connection is; the lowest are dropped. Must be the same on all ranks.

        Args:
            name: name of the weight.
            weight: its current value.
            gradient: the dense gradient of this step; empty if `reads_gradients` is False.
        """

    @abstractmethod
    def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        """How much each entry would gain as a connection; the highest are grown. Must be the same on all ranks."""

    # ---- checks, start -----------------------------------------------------------------------------------------------

    def check(self, run: RunLength, until: float = 1.0) -> None:
        for progress in (0.0, 0.5, 1.0):
            if not math.isfinite(value := self._scheduled(progress)):
                raise ValueError(f"drop_schedule gives {value} at progress {progress}; it must return a share in [0, 1).")
        self.window.resolve(run)
        interval = self.window.interval(run)
        if interval is not None and interval >= self.window.end - self.window.start:
            raise TooShort(
                f"every={self.every!r} leaves no update between {self.window.start:.0%} and {self.window.end:.0%} of a "
                f"training of {_length(run)}; choose a shorter interval or train longer."
            )
        super().check(run, until)

    def begin(self) -> None:
        super().begin()
        self.drawn_seed = draw_seed(self.run.trainer, self.seed)
        self.explored = MaskSet(self.weights if self.track_explored else {})
        self.explored.replace({name: torch.zeros_like(self.masks[name]) for name in self.explored})
        self.set_masks(self.first_masks())
        self.window.skip(self.position(epoch_start=True))

    def first_masks(self) -> Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]:
        """The initial masks."""
        return self.plan.random_masks(self.drawn_seed)

    def set_masks(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        super().set_masks(masks)
        self.explored.replace((name, self.explored[name] | self.masks[name]) for name in self.explored)

    @property
    def explored_rate(self) -> float | None:
        """The fraction of weights that have ever been active; None if it is not tracked."""
        return self.explored.kept / self.explored.total if len(self.explored) else None

    # ---- updates -----------------------------------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        position = self.position(under_way=1)
        self._reading = (
            self._waits_for_gradients(position)
            and not step.weights.keys() <= self.gradients.keys()
            and any(weight.grad is not None for weight in step.weights.values())
        )
        if self._reading:
            for name, weight in step.weights.items():
                self.gradients[name] = _copy(weight.grad, step.gradient_scale)

    def silence(self, step: Step) -> None:
        super().silence(step)
        step.replaced = self.takes_steps and self._reading

    @property
    def prepares_steps(self) -> bool:
        return bool(self.gradients)  # a pair only if there is something to undo: checking waits for the device

    def undo_step(self, step: Step) -> None:
        for name in step.weights:
            self.gradients.pop(name, None)

    def evolve(self, position: Position) -> None:
        if not self._is_due(position):
            return
        if self._waits_for_gradients(position) and len(self.gradients) < len(self.chosen):
            return  # for other optimizers, or the first step of this epoch
        self.update(position)
        self.gradients = {}
        self.window.finish()
        self.last_update = self.steps

    def conclude(self) -> None:
        if self.updates == 0:
            rank_zero_warn(
                f"{self.label} has moved no connection: training ended before the first update, or all steps were made with "
                "a closure past Lightning, which shows no gradients; update more often, or step with self.optimizers()."
            )

    def update(self, position: Position) -> None:
        """Everything that happens at an update."""
        fraction = self.fraction_dropped(position)
        if fraction > 0:
            self.rewire(fraction)

    def rewire(self, fraction: float) -> None:
        """Drop this fraction of every layer's connections, and grow the same number."""
        self.updates += 1
        self.set_masks(self._moved(fraction))
        if isinstance(self.plan.structure, FanIn):  # less than one connection per output is lost where some are ablated
            self.promise(self.masks.kept, self.masks.counts)

    def _moved(self, fraction: float) -> Iterator[tuple[str, Tensor]]:
        """The new mask of one weight after the other; each gradient is released after use."""
        counts = self.masks.counts
        for target in self.chosen:
            name, weight = target.name, target.weight.detach()
            gradient = self.gradients.pop(name, None) if self.reads_gradients else weight.new_empty(0)
            if gradient is None or drop_count(counts[name], fraction) == 0:
                continue  # a layer that was not used in this step has no gradient
            keep, grow = self.keep_score(name, weight, gradient), self.grow_score(name, weight, gradient)
            del gradient
            try:
                mask = self._rewired(target, counts[name], keep, grow, fraction)
            except ValueError as error:
                raise ValueError(f"{self.label} cannot rewire '{name}': {error}") from None
            del keep, grow
            yield name, mask

    def _rewired(self, target: Target, count: int, keep: Tensor, grow: Tensor, fraction: float) -> Tensor:
        """The new mask of a weight with this many connections; each matrix of a stack keeps its own number of them."""
        matrices, masks = target.matrices(), []
        least = 0.0 if target is self.chosen[-1] else self.min_salient
        now = target.unstack(self.masks[target.name])
        parts = zip(now, self._kept(target, count, now, matrices), *map(target.unstack, (keep, grow)), matrices, strict=True)
        for mask, kept, keep_score, grow_score, matrix in parts:
            structure = self.plan.structure
            masks.append(structure.regrow(matrix, mask, keep_score, grow_score, fraction, kept, least))
        return target.restack(masks)

    def _kept(self, target: Target, count: int, masks: Sequence[Tensor], matrices: Sequence[Target]) -> list[int]:
        """How many connections each matrix of a weight has."""
        if not target.stack_dims:
            return [count]
        numbers, spread = [mask.count_nonzero() for mask in masks], spread_over(matrix.layout for matrix in matrices)
        return [int(number) for number in numbers] if spread is None else spread.sums(numbers)

    def places(self, name: str) -> Tensor | None:
        """The positions of this rank's entries in the whole weight; None if it holds the whole."""
        layout = self.layouts.get("entries", {}).get(name)
        return None if layout is None else layout.places()

    def fraction_dropped(self, position: Position) -> float:
        """The fraction of connections that an update here drops; 0 from the end on."""
        progress = self.window.progress(position)
        return 0.0 if progress >= 1 else min(max(self._scheduled(progress), 0.0), 1.0)

    def _scheduled(self, progress: float) -> float:
        schedule = DROP_SCHEDULES[self.drop_schedule] if isinstance(self.drop_schedule, str) else self.drop_schedule
        return float(schedule(progress, self.drop_fraction, self.final_drop_fraction))

    def _is_due(self, position: Position) -> bool:
        rested = not self.takes_steps or self.steps > self.last_update + 1  # grown weights must move before they are judged
        return self.window.is_due(position) and rested

    def _waits_for_gradients(self, position: Position) -> bool:
        return self.reads_gradients and self._is_due(position) and self.fraction_dropped(position) > 0


def _check_share(name: str, value: Any, meaning: str, usual: float) -> None:
    if not isinstance(value, Real) or not 0 < float(value) < 1:
        raise ValueError(f"{name}={value!r} must be in {meaning}; {usual:g} is usual.")


def _copy(gradient: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.detach().clone() if scale is None else gradient.detach() / scale


def _length(run: RunLength) -> str:
    known = {"epochs": run.epochs, "steps": run.steps}
    return " or ".join(f"{value:g} {unit}" for unit, value in known.items() if value is not None)
