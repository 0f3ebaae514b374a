"""Rigged lottery: grow where the loss pulls hardest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from torch import Tensor

from lightning_sparse.core import AllocationName, StructureName, Target
from lightning_sparse.families.rewiring import Rewiring
from lightning_sparse.functional import growth_score, magnitude
from lightning_sparse.functional.regrowth import DropScheduleName
from lightning_sparse.functional.schedules import Schedule
from lightning_sparse.loop import Shards

__all__ = ["RigL"]


@final
class RigL(Rewiring):
    """Drop the smallest weights, grow where the dense gradient is largest.

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", https://arxiv.org/abs/1911.11134, and the
    official repository google-research/rigl. As there, an update takes the place of an optimizer step: for that step no
    parameter of the optimizer moves. There the first update falls on the very first step, here one interval later. The
    paper updates every 100 steps of 32,000 (`every=0.003`); the default is rarer, so that short runs do well too.

    A batch norm divides the gradients of an output without connections by the root of its `eps`, and growth goes there.
    Where a layer has few connections per output (3.4 in a narrow ResNet-20 at 98 %), the default `drop_fraction` empties
    outputs: in a pilot of two epochs static masks came to 39.9 and 41.1 %, RigL to 36.7 and 37.5 %, with `drop_fraction=0.1`
    to 40.9 and 42.2 %, and with `growth_per_output` to 42.2 % (docs/evidence.md).

    For the arguments not listed see `Rewiring`.

    Args:
        sparsity: the fraction removed, in [0, 1); may be left out for `structure='n:m'`.
        growth_per_output: divide the gradients of each output by their norm before they are ranked for growth (ours, not the
            paper's), so that none is grown into for the scale of its gradients alone.
        start: when rewiring starts: a fraction of the run, `'n epochs'` or `'n steps'`.
        end: when it ends; the number of connections moved is 0 from there on.
        every: time between updates; `'n epochs'` updates at the start of epochs, all else after steps.
        drop_fraction: share of each layer's connections that an update drops, in (0, 1).
        final_drop_fraction: to which it falls at `end`, in [0, 1).
        drop_schedule: `cosine`, `constant`, or a function of (progress, start value, end value).
        allocation: how sparsity is shared: `erk`, `erk+` (last layer dense), `er`, `uniform`, `uniform+` (first layer
            dense), or `global` (every weight has the same chance).
        structure: `unstructured`; `n:m`: every group of m inputs keeps n connections at all times; `fan_in`: every output of
            a layer has the same number of connections (SRigL, Lasby et al. 2024, https://arxiv.org/abs/2305.02299); or
            `block:RxC`: whole blocks move.
        layer_sparsity: layers with a sparsity of their own, glob -> sparsity, counted in the total.
        min_salient: with `structure='fan_in'`: outputs of which less than this share of the fan-in survives or grows are
            ablated (published: 0.3 for convolutional networks, 0.95 for transformers), in [0, 1]; never those of the last
            layer. 0 ablates none.
        track_explored: remember which weights have ever been active, a byte each, for `explored_rate`.
        seed: of the mask.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.

    Example:
        >>> RigL(sparsity=0.9).label
        'RigL'
    """

    shards: ClassVar[Shards] = "any"

    takes_steps = True

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        growth_per_output: bool = False,
        start: float | str = 0.0,
        end: float | str = 0.75,
        every: float | str = 0.05,
        drop_fraction: float = 0.3,
        final_drop_fraction: float = 0.0,
        drop_schedule: DropScheduleName | Schedule = "cosine",
        allocation: AllocationName = "erk",
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
            start=start,
            end=end,
            every=every,
            drop_fraction=drop_fraction,
            final_drop_fraction=final_drop_fraction,
            drop_schedule=drop_schedule,
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            min_salient=min_salient,
            track_explored=track_explored,
            seed=seed,
            targets=targets,
            name=name,
        )
        self.growth_per_output = growth_per_output

    def misfit(self, target: Target) -> str | None:
        if self.growth_per_output and target.parts_outputs:
            return "is cut into shards along its inputs, and growth_per_output needs all inputs of an output on one rank"
        return super().misfit(target)

    def keep_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return magnitude(weight)

    def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return growth_score(gradient, self.output_dims[name]) if self.growth_per_output else magnitude(gradient)
