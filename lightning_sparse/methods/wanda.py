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
    """Where `Wanda.seen` holds the columns of a weight, by groups, and the row count of each group."""

    sums: slice
    counts: slice
    groups: int


@final
class Wanda(SeesInputs, Pruning):
    r"""Remove the weights that matter least given their inputs, before the first batch or along a schedule; no gradients.

    $$ s_{ij} = |w_{ij}| \, \|x_j\|_2 $$

    compared within each output, where $x_j$ are all values of input $j$ on `batches` batches of the training set: all tokens
    of a linear layer, all positions that a kernel entry of a convolution sees. Runs at station `begin` with one forward pass
    per batch. Along a schedule, hooks also add up squares during training, and every update halves the weight of what was
    seen before it. Sums are in float32 and over all ranks. Removed weights stay removed, and the rest trains on.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    https://arxiv.org/abs/2306.11695. There the inputs of a block come from pruned blocks; here all layers are scored
    in one pass of the dense model. `relative=True`: RIA, Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training
    Pruning Method for Large Language Models", https://openreview.net/forum?id=Tr0lPx9woF.

    Args:
        sparsity: the final fraction removed, in [0, 1); optional with `structure='n:m'`.
        relative: take each weight relative to all weights of its output and of its input, and the square root of the norm
            (RIA).
        compare: where weights compete: within one `output` (each keeps the same fraction, as in the paper), or within the
            whole `layer`. Channels are always compared within their layer.
        batches: number of training batches used before the first batch, on every rank.
        start: when pruning starts: a fraction of the run, `'n epochs'` or `'n steps'`.
        end: when the final sparsity is reached; 0 prunes at once, before the first batch.
        every: time between updates; `'n epochs'` updates at the start of epochs, everything else after steps.
        schedule: how sparsity grows from 0: `constant` (all at once), `linear`, `cubic`, `cosine`, `exponential`, or a
            function of (progress, start value, end value).
        allocation: how sparsity is distributed over the layers: `uniform`, `uniform+`, `er`, `erk`, `erk+`, `owl` (layers
            with more outliers among their scores keep more), or with `compare='layer'` also `global`.
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (channels
            across all layers that additions tie together, with biases and norms, so that they can be cut out of the
            network), `heads` (whole attention heads, which can be cut out too), or `n:m`.
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: at the start of fit, if a layer is never reached, such as an expert without tokens.

    Example:
        >>> Wanda(sparsity=0.5, batches=16).label
        'Wanda'
    """

    shards: ClassVar[Shards] = "data"

    seen = Remembered[Tensor](lambda: torch.zeros(0), averaged=True)
    """Sums of squares of all columns of all weights, followed by the number of rows added for each group."""

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
                "allocation='global' lets the scores of all layers compete, but compare='output' compares only those of one "
                "output; use compare='layer', or allocation='uniform'."
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
        """Where `seen` holds the columns of each weight, and the count of its rows."""
        shapes = {target.name: as_matrix(target, target.weight).shape for target in self.chosen}
        columns = sum(groups * width for groups, _, width in shapes.values())
        self._places, start, counts = {}, 0, columns
        for name, (groups, _, width) in shapes.items():
            self._places[name] = _Place(slice(start, start + groups * width), slice(counts, counts + groups), groups)
            start, counts = start + groups * width, counts + groups
        self._size = counts

    def _watch(self) -> None:
        """Keep collecting during training, as long as more pruning is due."""
        if self.window.is_over or self.window.end <= 0:
            return
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # graphs compiled earlier do not know about the hooks
        self._tap = InputTap(self.run.module, [*self.weights], self._add, training=True)

    def _add(self, name: str, reading: Reading) -> None:
        place = self._places[name]
        for part, sums, rows in reading.squares():
            self.seen[place.sums].view(place.groups, -1)[part] += sums.to(self.seen)
            self.seen[place.counts][part] += rows

    def _measure(self) -> None:
        """The norms of all inputs, over rows and ranks, up to one common factor."""
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
        return from_matrix(target, score)

    def rivals(self, name: str, score: Tensor) -> Tensor:
        if self.compare != "output" or isinstance(self.quota.structure, Channels):
            return score
        target = self.targets_by_name[name]
        ranks = from_matrix(target, row_ranks(as_matrix(target, score)))
        return ranks.masked_fill(score == -torch.inf, -torch.inf)

    def _look_away(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def release(self) -> None:
        self._look_away()
        self._norms, self._places = {}, {}
        super().release()
