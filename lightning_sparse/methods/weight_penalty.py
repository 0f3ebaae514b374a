"""Penalties on weights, with a prune at the end: the plain baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_sparse.core import (
    AllocationName,
    BudgetName,
    MaskSet,
    Position,
    RunLength,
    StructureName,
    Target,
    check_choice,
    check_number,
    parse_structure,
)
from lightning_sparse.families import Pruning
from lightning_sparse.functional import PENALTIES, magnitude
from lightning_sparse.loop import Shards, Step

__all__ = ["WeightPenalty"]


@final
class WeightPenalty(Pruning):
    r"""Pull weights toward zero by a penalty, then remove the smallest at once.

    At station `weight_penalty`, as a gradient in closed form: $g \leftarrow g + \lambda\, dR/dw$; or, with `proximal`, at
    station `project`: $w \leftarrow prox_{\eta\lambda R}(w)$ with the learning rate $\eta$ of the step that was made. One
    pass over the weights per step, and no graph. The penalty ends with the prune, and what is left trains on without it.

    | penalty | R(w) of one layer |
    | --- | --- |
    | `l1` | the sum of magnitudes |
    | `l2` | half the squared norm: weight decay |
    | `group_lasso` | the norms of output channels, each times the root of its size |
    | `hoyer` | the square of the sum of magnitudes over the sum of squares; no proximal map |

    Sources: Han et al. 2015, https://arxiv.org/abs/1506.02626 (L1 and L2, then pruning by magnitude); Wen et al. 2016,
    https://arxiv.org/abs/1608.03665 (group lasso); Yang et al. 2020, https://arxiv.org/abs/1908.09979 (Hoyer-Square).

    Args:
        sparsity: the fraction removed by the prune, in [0, 1); None prunes nothing, and then the penalty alone decides.
        penalty: what is penalized: `l1`, `l2`, `group_lasso` or `hoyer`.
        strength: lambda, not negative.
        proximal: take the penalty as a proximal step, which makes exact zeros by itself, where there is one. The step
            size is the plain learning rate, also with optimizers that scale every entry by their own.
        end: when the penalty ends and the prune is made: a fraction of the run, `'n epochs'` or `'n steps'`; what is left of
            the run trains without it. Without a sparsity, `end=1.0` keeps the penalty on to the last step, and `proximal`
            needs that: its zeros last only as long as it does.
        allocation: how sparsity is shared: `global` (all layers compete), `uniform`, `uniform+`, `er`, `erk`, `erk+`,
            `owl` (more where there are outliers).
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
        ValueError: for an unknown penalty, a negative strength, or a proximal step that has no closed form.

    Example:
        >>> WeightPenalty(sparsity=0.9, penalty="group_lasso", structure="channel").label
        'WeightPenalty'
    """

    shards: ClassVar[Shards] = "any"

    refused: ClassVar[Mapping[str, str]] = {
        "kind": "the kind of penalty is called penalty",
        "start": "the penalty pulls from the first step on",
    }

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        penalty: Literal["l1", "l2", "group_lasso", "hoyer"] = "l1",
        strength: float = 1e-4,
        proximal: bool = False,
        end: float | str = 0.8,
        allocation: AllocationName = "global",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        budget: BudgetName = "units",
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        self.prunes = sparsity is not None or bool(layer_sparsity) or parse_structure(structure).sparsity is not None
        at_once = float(end) if isinstance(end, int) else end  # a start of 1 would be refused as a slip of the pen
        super().__init__(
            sparsity if self.prunes else 0.0,
            start=at_once,
            end=end,
            schedule="constant",
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            max_layer_sparsity=max_layer_sparsity,
            budget=budget,
            targets=targets,
            name=name,
        )
        self.sparsity = sparsity
        self.penalty, self.strength, self.proximal = penalty, strength, proximal
        check_choice("penalty", penalty, PENALTIES)
        check_number("strength", strength)
        if proximal and PENALTIES[penalty].proximal_ is None:
            able = [other for other, known in PENALTIES.items() if known.proximal_ is not None]
            raise ValueError(
                f"penalty='{penalty}' has no proximal map in closed form; leave proximal out, or choose from {able}."
            )

    def score(self, name: str, weight: Tensor) -> Tensor:
        return magnitude(weight)

    def misfit(self, target: Target) -> str | None:
        if self.penalty == "group_lasso" and target.parts_outputs:
            return "is cut into shards along its inputs, and penalty='group_lasso' needs all inputs of an output on one rank"
        return super().misfit(target)

    @property
    def mask_set(self) -> MaskSet | None:
        return self.masks if self.prunes else None

    @property
    def pulls(self) -> bool:
        """Whether the penalty is still on."""
        return not self.window.is_over

    def check(self, run: RunLength, until: float = 1.0) -> None:
        if self.prunes:
            super().check(run, until)
        elif self.end != 1:
            self.window.resolve(run)
            if self.proximal and self.window.end < 1:
                raise ValueError(
                    "proximal=True without a sparsity makes zeros that last only as long as the penalty, and "
                    f"end={self.end!r} is before the end of training; write end=1.0, or give a sparsity."
                )

    def begin(self) -> None:
        if self.prunes:
            super().begin()

    def evolve(self, position: Position) -> None:
        if self.prunes:
            super().evolve(position)
        elif self.end != 1:
            self.window.take(position)

    def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
        if self.pulls and not self.proximal:
            dims = self.output_dims
            for name, weight in step.weights.items():
                yield (
                    name,
                    PENALTIES[self.penalty].gradient(weight.detach(), dims[name], self.total(name)).mul_(self.strength),
                )

    def project(self, step: Step) -> None:
        move = PENALTIES[self.penalty].proximal_
        if self.pulls and self.proximal and move is not None:
            dims = self.output_dims
            for name, weight in step.weights.items():
                move(weight, step.learning_rate(name) * self.strength, dims[name])
        super().project(step)

    @torch.no_grad()
    def numbers(self) -> Mapping[str, float | Tensor]:
        if not self.pulls:
            return {}
        dims, value = self.output_dims, PENALTIES[self.penalty].value
        values = [value(weight, dims[name], self.total(name)) for name, weight in self.weights.items()]
        return {"penalty": self.strength * torch.stack(values).sum()}

    def conclude(self) -> None:
        if self.prunes:
            super().conclude()
