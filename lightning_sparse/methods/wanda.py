"""Wanda: pruning by weights and activations."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from lightning_sparse.core import (
    AllocationName,
    Channels,
    InputTap,
    Position,
    Reading,
    Remembered,
    StructureName,
    as_matrix,
    check_choice,
    check_whole,
    from_matrix,
)
from lightning_sparse.families.pruning import Pruning
from lightning_sparse.families.sees_inputs import SeesInputs
from lightning_sparse.functional import ria_score, row_ranks, wanda_score
from lightning_sparse.functional.schedules import Schedule, ScheduleName
from lightning_sparse.loop import Shards

__all__ = ["Wanda"]

COMPARISONS = ("output", "layer")


class _Place(NamedTuple):
    """Where in `Wanda.seen` the columns of a weight are, by groups, and where the rows of each group are counted."""

    sums: slice
    counts: slice
    groups: int


@final
class Wanda(SeesInputs, Pruning):
    r"""Remove the weights that matter least to what reaches them, before the first batch or along a schedule; no gradients.

    $$ s_{ij} = |w_{ij}| \, \|x_j\|_2 $$

    compared within each output, where $x_j$ are all values of input $j$ on `batches` batches of the training set: all tokens
    of a linear layer, all places that a kernel position of a convolution sees. At station `begin`, one forward pass per
    batch; along a schedule also hooks that add up squares while training goes on, and every update halves what was seen
    before it. Sums are in float32 and over all ranks. What is removed stays removed, and the rest trains on.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    https://arxiv.org/abs/2306.11695. There the inputs of a block are those behind pruned blocks; here all layers are scored
    in one pass of the dense model. `relative=True`: RIA, Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training
    Pruning Method for Large Language Models", https://openreview.net/forum?id=Tr0lPx9woF.

    Args:
        sparsity: the fraction removed in the end, in [0, 1); may be left out for `structure='n:m'`.
        relative: take each weight relative to all weights of its output and of its input, and the root of the norm (RIA).
        compare: among whom weights are ranked: those of one `output` (each keeps the same share, the paper's), or of the
            whole `layer`. Channels are always compared within their layer.
        batches: of the training set that are looked at before the first batch, on every rank.
        start: when pruning starts: a fraction of the run, `'n epochs'` or `'n steps'`.
        end: when the final sparsity is reached; with 0 all at once, before the first batch.
        every: time between updates; `'n epochs'` updates at the start of epochs, all else after steps.
        schedule: how sparsity grows from 0: `constant` (all at once), `linear`, `cubic`, `cosine`, `exponential`, or a
            function of (progress, start value, end value).
        allocation: how sparsity is shared: `uniform`, `uniform+`, `er`, `erk`, `erk+`, `owl` (more where scores have
            outliers), or with `compare='layer'` also `global`.
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (the same,
            in all layers that additions couple, with biases and norms, so that they can leave the network), `heads` (of
            attention, which can leave too), or `n:m`.
        layer_sparsity: layers with a sparsity of their own, glob -> sparsity, counted in the total.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.

    Raises:
        ValueError: at the start of fit, if a layer is never reached, as an expert without tokens.

    Example:
        >>> Wanda(sparsity=0.5, batches=16).label
        'Wanda'
    """

    shards: ClassVar[Shards] = "data"

    seen = Remembered[Tensor](lambda: torch.zeros(0), averaged=True)
    """Sums of squares of all columns of all weights, and behind them of each group how many rows were added."""

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        relative: bool = False,
        compare: Literal["output", "layer"] = "output",
        batches: int = 8,
        start: float | str = 0.0,
        end: float | str = 0.0,
        every: float | str = 0.01,
        schedule: ScheduleName | Schedule = "cubic",
        allocation: AllocationName = "uniform",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            start=start,
            end=end,
            every=every,
            schedule=schedule,
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            targets=targets,
            name=name,
        )
        self.relative, self.compare, self.batches = relative, compare, batches
        check_choice("compare", compare, COMPARISONS)
        check_whole("batches", batches, 1)
        if compare == "output" and self.quota.allocation == "global":
            raise ValueError(
                "allocation='global' lets the scores of all layers compete, and compare='output' only those of one output; "
                "write compare='layer', or allocation='uniform'."
            )
        self._tap: InputTap | None = None
        self._places: dict[str, _Place] = {}
        self._norms: dict[str, Tensor] = {}

    # ---- what reaches the weights ------------------------------------------------------------------------------------

    def begin(self) -> None:
        super().begin()
        self._lay_out()
        self.seen = torch.zeros(self._size, device=self.run.module.device)
        with self.calibration() as (twin, send):
            tap = InputTap(twin, [*self.weights], self._add)
            send()
            tap.remove()
        self._measure()
        self._norms = {}
        self._watch()

    def resume(self) -> None:
        super().resume()
        self._lay_out()
        self._watch()

    def _lay_out(self) -> None:
        """Where the columns of each weight lie in `seen`, and where its rows are counted."""
        shapes = {target.name: as_matrix(target, target.weight).shape for target in self.chosen}
        columns = sum(groups * width for groups, _, width in shapes.values())
        self._places, start, counts = {}, 0, columns
        for name, (groups, _, width) in shapes.items():
            self._places[name] = _Place(slice(start, start + groups * width), slice(counts, counts + groups), groups)
            start, counts = start + groups * width, counts + groups
        self._size = counts

    def _watch(self) -> None:
        """Look on while training goes on, as long as more is to be pruned."""
        if self.window.is_over or self.window.end <= 0:
            return
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # graphs made before do not know of the hooks
        self._tap = InputTap(self.run.module, [*self.weights], self._add, training=True)

    def _add(self, name: str, reading: Reading) -> None:
        place = self._places[name]
        for part, sums, rows in reading.squares():
            self.seen[place.sums].view(place.groups, -1)[part] += sums.to(self.seen)
            self.seen[place.counts][part] += rows

    def _measure(self) -> None:
        """The norms of all inputs, over rows and ranks, up to one factor for all."""
        total = self.everywhere(self.seen.clone())
        for name, target in self.targets_by_name.items():
            place = self._places[name]
            if not bool(total[place.counts].all()):
                self.refuse_unreached(name)
            norms = (total[place.sums].view(place.groups, -1) / total[place.counts].unsqueeze(1)).sqrt()
            if not bool(norms.isfinite().all()):
                self.refuse_infinite(name)
            self._norms[name] = norms.to(target.weight.device)

    # ---- scores ------------------------------------------------------------------------------------------------------

    def evolve(self, position: Position) -> None:
        due = self.window.is_due(position)
        if due:
            self._measure()
        super().evolve(position)
        if due:
            self._norms = {}
            self.seen /= 2
            if self.window.is_over:
                self._look_away()

    def score(self, name: str, weight: Tensor) -> Tensor:
        target = self.targets_by_name[name]
        matrix = as_matrix(target, weight)
        norms = self._norms[name]
        score = ria_score(matrix, norms, total=self.total(name)) if self.relative else wanda_score(matrix, norms)
        if self.compare == "output" and not isinstance(self.quota.structure, Channels):
            dropped = as_matrix(target, self.masks.dropped(name))
            score = row_ranks(score.masked_fill(dropped, -torch.inf))
        return from_matrix(target, score)

    def _look_away(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def release(self) -> None:
        self._look_away()
        self._norms, self._places = {}, {}
        super().release()
