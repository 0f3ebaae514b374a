"""What a method may override, use and remember. `sparsifier.py` shows the loop that calls it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sparse.core import (
    LayerRow,
    Layout,
    Masks,
    Memory,
    Position,
    Remembered,
    RunLength,
    Target,
    as_patterns,
    count_parameters,
    select_targets,
    spread_over,
    summarize,
)
from lightning_sparse.functional.penalties import alone
from lightning_sparse.functional.spread import Spread
from lightning_sparse.loop.arguments import arguments, plain, refuse_words
from lightning_sparse.loop.run import Run
from lightning_sparse.loop.selection import tell_selection
from lightning_sparse.loop.step import Step

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Method", "Shards"]


Shards = Literal["none", "data", "any"]
"""Which sharded weights a method works on."""


class Method(Memory, ABC):
    """Base of every method: override the stations you need and leave the rest.

    Args:
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class, in checkpoints and messages.
    """

    removes_weights: ClassVar[bool] = True
    """Whether the chosen weights become sparse; if so, a message reports which weights are left out."""
    takes_frozen: ClassVar[bool] = False
    """Whether frozen weights are chosen too; the method owns them from the moment they join an optimizer."""
    shards: ClassVar[Shards] = "none"
    """Sharded weights that the method works on: `data` if each rank must see whole features (FSDP2), or `any`."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Arguments of other methods or earlier versions that this method does not take, and what to use instead."""

    steps = Remembered(int)
    """Batches so far that ended in an optimizer step."""
    goal = Remembered[dict[str, Any]](lambda: {"total": None, "layers": {}})
    """How many weights a method promises to keep, in total and per layer; None and missing if it makes no promise."""
    begun_with = Remembered[dict[str, Any]](lambda: RunLength(None, None)._asdict())
    """The length of the run as originally planned."""
    shapes = Remembered[dict[str, list[int]]](dict)
    """Of the chosen weights; empty before the first fit."""
    left_frozen = Remembered[list[str]](list)
    """Weights that were frozen when the run began; they stay out of it, even if they are unfrozen later."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse arguments of other methods and earlier versions, and say what to use instead."""
        refuse_words(cls, cls.refused, args, kwargs)
        return super().__new__(cls)

    def __init__(self, *, targets: str | Sequence[str] = ("*",), name: str | None = None) -> None:
        self.targets = as_patterns(targets)
        self.name = name
        self.chosen: list[Target] = []
        self.brought: Mapping[str, Any] | None = None
        """The state loaded from a checkpoint, until training begins."""
        self.model_size = 0
        """The number of parameters of the whole model, with shared ones counted once."""
        self.layouts: dict[str, dict[str, Layout]] = {}
        """With sharded weights: by what a tensor holds (see `core.Remembered`), then by name of the weight."""
        self._frozen: list[str] = []
        self._run: Run | None = None

    # ---- what a method may answer ------------------------------------------------------------------------------------

    def check(self, run: RunLength, until: float = 1.0) -> None:
        """Raise a ValueError for anything that cannot work; the weights are chosen, nothing has been changed yet.

        Args:
            run: the length that fractions of the run refer to.
            until: fraction of it that is over when this fit ends; less than 1 if a run is resumed to be shorter.
        """

    def begin(self) -> None:
        """A fresh start: create the state, project for the first time."""

    def resume(self) -> None:
        """The state has been restored; rebuild what is derived from it."""

    def evolve(self, position: Position) -> None:
        """Topology: called at the start of every epoch and right after every step, as long as the method `evolves`."""

    def before_batch(self, position: Position) -> None:
        """Called before every batch. With `run.fresh` no gradients of earlier batches are pending, and topology may change.

        For changes that belong to the next batch and not to the last one: validation, checkpoints and learning rate
        schedulers that follow the last step are done.
        """

    def feature_penalty(self) -> Tensor | None:
        """A differentiable term for this batch, from features that the method's own hooks have seen."""
        return None

    def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
        """Gradients of a penalty on the weights, in closed form, by name; one at a time where memory matters."""
        return ()

    def before_step(self, step: Step) -> None:
        """Called right before the optimizer moves; all gradients are complete."""

    def silence(self, step: Step) -> None:
        """Remove the gradients that the optimizer must not see, or all of them with `step.replaced = True`."""

    def after_step(self, step: Step) -> None:
        """Called right after the optimizer has moved."""

    def after_unseen_step(self, step: Step) -> None:
        """The optimizer has moved without `before_step`: a manual step that bypasses Lightning, with a closure."""

    def undo_step(self, step: Step) -> None:
        """The step that `before_step` prepared did not happen; undo the preparation."""

    def project(self, step: Step) -> None:
        """Project the weights back onto their constraint set."""

    def settle(self) -> None:
        """Called before validation or a checkpoint: repair what was changed since the last step."""

    def batch_end(self, output: Any, batch: Any) -> None:
        """The batch is over; learning rate schedulers that move by steps have moved.

        Args:
            output: what `training_step` returned, before any penalty was added.
            batch: the batch it was given.
        """

    def epoch_end(self) -> Mapping[str, float | Tensor]:
        """The epoch is over; the returned values go to the logger, under the method's label."""
        return {}

    def headline(self) -> Mapping[str, float | str]:
        """What the progress bar shows besides the sparsity: a phase, a round. Called whenever the bar is drawn."""
        return {}

    def numbers(self) -> Mapping[str, float | Tensor]:
        """What the logger shows of this method, under its label. Called once per epoch, in its first batch."""
        return {}

    def conclude(self) -> None:
        """Training has ended, hooks are still attached."""

    def release(self) -> None:
        """Remove everything that the method attached to the model; called after success and failure alike."""

    def answers(self, station: Callable[..., Any]) -> bool:
        """Whether this method overrides a station, such as `Method.project`."""
        return getattr(type(self), station.__name__) is not station

    # ---- what it says about itself -----------------------------------------------------------------------------------

    @property
    def mask_set(self) -> Masks | None:
        """The masks of this method, if it has any."""
        return None

    @property
    def evolves(self) -> bool:
        """Whether `evolve` may still change something; if not, it is no longer called."""
        return self.answers(Method.evolve)

    @property
    def dropped_live_on(self) -> bool:
        """Whether dropped entries keep values outside the model and optimizer moments, and may return after any step."""
        return False

    @property
    def swaps_weights(self) -> bool:
        """Whether the method would break with an optimizer that lets the model see averages of weights."""
        return self.dropped_live_on

    @property
    def dropped_learn(self) -> bool:
        """Whether the optimizer sees gradients of dropped entries, so that they may return."""
        return False

    @property
    def clears_moments(self) -> bool:
        """Whether the optimizer state of dropped entries is set to zero; then the optimizer must allow that."""
        return False

    @property
    def prepares_steps(self) -> bool:
        """Whether `before_step` and `after_step` are a pair here."""
        return self.answers(Method.after_step) or self.answers(Method.undo_step)

    @property
    def moves(self) -> Collection[str]:
        """The weights that the method moves instead of the optimizer; no other method may act on them."""
        return ()

    @property
    def at_target(self) -> bool | None:
        """Whether no more is kept than `goal` says, in total and in each layer; None for a method without a target."""
        masks, total, layers = self.mask_set, self.goal["total"], self.goal["layers"]
        if masks is None or (total is None and not layers):
            return None
        counts = masks.counts
        in_all = total is None or sum(counts.values()) <= total
        return in_all and all(counts[name] <= kept for name, kept in layers.items())

    # ---- what a method may use ---------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights this method works on, by name, as far as this rank holds them; empty outside training."""
        return {target.name: target.weight for target in self.chosen}

    @property
    def spread(self) -> Spread | None:
        """How these weights are distributed over ranks; None if every rank holds all of them."""
        return spread_over(target.layout for target in self.chosen)

    def counts(self, name: str) -> bool:
        """Whether this rank's shard of a weight is counted; if several ranks hold copies, only one is."""
        layout = self.layouts.get("entries", {}).get(name)
        return layout is None or layout.counts

    def total(self, name: str) -> Callable[[Tensor], Tensor]:
        """A function that turns sums over this rank's shard of a weight into sums over all of it; all ranks must call it."""
        layout = self.layouts.get("entries", {}).get(name)
        return alone if layout is None else layout.total

    @property
    def output_dims(self) -> dict[str, tuple[int, ...]]:
        """The output dimensions, by name."""
        return {target.name: target.output_dims for target in self.chosen}

    @property
    def run(self) -> Run:
        """The running fit: trainer, module, optimizers."""
        if self._run is None:
            raise RuntimeError(f"{self.label} is not in a running fit.")
        return self._run

    @property
    def running(self) -> bool:
        """Whether a fit is under way."""
        return self._run is not None

    def position(self, epoch_start: bool = False, under_way: int = 0) -> Position:
        """The current position in the run; see `Run.position`."""
        return self.run.position(RunLength(**self.begun_with), self.steps, epoch_start, under_way)

    def known(self, name: str, otherwise: Any) -> Any:
        """A remembered attribute before training begins: from the checkpoint, or from the run that this fit continues."""
        if self.brought is not None:
            return self.brought["memory"].get(name, otherwise)
        return getattr(self, name) if self.goes_on else otherwise

    def promise(self, total: int | None, layers: Mapping[str, int] | None = None) -> None:
        """Set the goal: weights to keep in total, and per layer where known."""
        self.goal = {"total": total, "layers": dict(layers or {})}

    def summary(self) -> list[LayerRow]:
        """One row per masked layer: kept, total and target counts; then the sum, and the whole model."""
        if self.mask_set is None:
            return []
        return summarize(self.mask_set, self.goal["total"], self.goal["layers"], self.model_size)

    def warn_of_empty(self, name: str, remedy: str) -> None:
        """Warn that a layer has lost all its weights, and say what helps."""
        rank_zero_warn(f"{self.label} has removed all of '{name}'; no signal passes this layer anymore. {remedy}")

    @property
    def label(self) -> str:
        """The name of this callback in messages."""
        return type(self).__name__ + (f"(name='{self.name}')" if self.name else "")

    # ---- its run, from the first fit to the last ---------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The arguments of this callback, as plain values."""
        return {name: plain(getattr(self, name)) for name in arguments(type(self)) if name != "name"}

    def choose(self, module: nn.Module, goes_on: bool = False) -> None:
        """Find the weights in a module.

        Args:
            module: the module that is trained.
            goes_on: whether a run is continued; weights that were unfrozen in the meantime do not belong to it.
        """
        before = self.brought["memory"].get("left_frozen", []) if self.brought else self.left_frozen if goes_on else []
        selection = select_targets(module, self.targets, self.takes_frozen, self.misfit)
        self.chosen = [target for target in selection.targets if target.name not in before]
        self._frozen = [*selection.frozen]
        cut = {target.name: (layout, target) for target in self.chosen if (layout := target.layout) is not None}
        by_output = {name: layout.flattened(target.output_dims) for name, (layout, target) in cut.items()}
        entries = {name: layout for name, (layout, _) in cut.items()}
        self.layouts = {"entries": entries, "outputs": by_output} if cut else {}
        self.model_size = count_parameters(module)
        if self.removes_weights:
            tell_selection(self.label, module, self.targets, selection)

    def misfit(self, target: Target) -> str | None:
        """Why the method cannot work on a weight, which then stays unchanged; None if it can."""
        return None

    def enter(self, run: Run) -> None:
        """A fit begins."""
        self._run = run

    def leave(self) -> None:
        """The fit is over, or never reached its first batch."""
        if self.brought is not None:  # the run ended before it began; keep the loaded state
            self.recall(self.brought["memory"])
            self.brought = None
        self._run = None
        self.chosen = []

    def check_brought(self) -> None:
        """A resumed run continues as it was configured, or not at all.

        Raises:
            ValueError: naming every argument that differs, or the weights that do.
        """
        if self.brought is None:
            return
        mine = self.config()
        defaults = {name: plain(value) for name, value in arguments(type(self)).items()}
        theirs = {**{name: defaults[name] for name in mine}, **self.brought["config"]}  # from a version with fewer arguments
        drift = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if drift:
            changes = ", ".join(f"{key}={mine.get(key)!r} (checkpoint: {theirs.get(key)!r})" for key in drift)
            raise ValueError(
                f"{self.label} resumes with {changes}; restore the checkpoint's values, or start a new run from its weights."
            )
        shapes, saved = self._chosen_shapes, self.brought["memory"]["shapes"]
        if shapes != saved:
            different = sorted(set(map(str, shapes.items())) ^ set(map(str, saved.items())))
            raise ValueError(f"{self.label} resumes with weights other than the checkpoint's: {', '.join(different[:4])}.")

    def length_as_begun(self, length: RunLength) -> RunLength:
        """The length that fractions of the run refer to: that of the run as originally planned, or of this fit."""
        return RunLength(**self.known("begun_with", length._asdict()))

    @property
    def goes_on(self) -> bool:
        """Whether this fit continues the run that this instance has trained before."""
        return self.run.trainer.global_step > 0 and self.steps > 0 and self._chosen_shapes == self.shapes

    def begin_or_resume(self, length: RunLength) -> None:
        """Begin, continue, or resume; everything has been checked."""
        if self.brought is not None:
            self.recall(self.brought["memory"])
            self.brought = None
            self.place(self.weights, self.run.module.device, self.layouts)
            self.resume()
        elif self.goes_on:
            self.resume()
        else:
            if self.run.trainer.global_step > 0:
                rank_zero_warn(
                    f"{self.label} starts in the middle of a run: the checkpoint, or the previous fit, has no state for it."
                )
            self.forget()
            self.begun_with = length._asdict()
            self.shapes = self._chosen_shapes
            self.left_frozen = self._frozen
            self.begin()

    @property
    def _chosen_shapes(self) -> dict[str, list[int]]:
        return {target.name: list(target.shape) for target in self.chosen}
