"""What is removed as one unit: a weight, all but n of m neighbors, or an output channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_sparse.core.layout import Layout, spread_over
from lightning_sparse.core.target import Target
from lightning_sparse.functional import channel_score, drop_count, expand_channels, n_m_mask, normalized, regrow

__all__ = ["Channels", "NOfM", "Pool", "Structure", "Unstructured"]


@dataclass(frozen=True)
class Pool:
    """Units that belong to the same weights: all units of one weight, unless channels are coupled.

    Args:
        layers: positions of the weights.
        size: number of units.
    """

    layers: tuple[int, ...]
    size: int


class Structure(ABC):
    """Turns scores of weights into scores of units, and masks of units into masks of weights."""

    keeps_one: ClassVar[bool] = False
    """Whether the best unit of each pool is always kept."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The structure as users write it."""

    def misfit(self, target: Target) -> str | None:
        """Return why this weight cannot have the structure; None if it can."""
        return None

    @abstractmethod
    def units(self, target: Target) -> int:
        """Return the number of units in the weight."""

    @abstractmethod
    def score(self, score: Tensor, target: Target) -> Tensor:
        """Return one score per unit."""

    @abstractmethod
    def expand(self, kept: Tensor, target: Target) -> Tensor:
        """Return the mask of the weight from the mask of its units."""

    def layout(self, target: Target) -> Layout | None:
        """Return the layout of this rank's units of a weight; None if this rank holds all of them.

        Raises:
            ValueError: if a unit is split over ranks.
        """
        if target.layout is None:
            return None
        raise ValueError("needs whole weights")

    def unfit(self, target: Target) -> str | None:
        """Return why this rank's part of the weight cannot have the structure; None if it can."""
        why = self.misfit(target)
        if why is None and target.layout is not None:
            try:
                self.layout(target.matrices()[0])
            except ValueError as error:
                why = f"is sharded, and structure='{self.text}' {error}"
        return why

    @property
    def sparsity(self) -> float | None:
        """The only sparsity the structure allows, or None if any."""
        return None

    def pools(self, targets: Sequence[Target]) -> list[Pool]:
        """Return all units, grouped by the weights they belong to."""
        return [Pool((layer,), self.units(target)) for layer, target in enumerate(targets)]

    def rank(self, scores: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
        """Return one score per unit of every pool, from one score per entry of every weight."""
        return [self.score(score, target) for score, target in zip(scores, targets, strict=True)]

    def spread(self, kept: Sequence[Tensor], targets: Sequence[Target], scores: Sequence[Tensor]) -> list[Tensor]:
        """Return the masks of the weights from those of the pools.

        Args:
            kept: the mask of every pool.
            targets: the weights.
            scores: the scores of all their entries, from which units were ranked.
        """
        return [self.expand(mask, target) for mask, target in zip(kept, targets, strict=True)]

    def regrow(
        self, target: Target, mask: Tensor, keep: Tensor, grow: Tensor, fraction: float, kept: int, min_salient: float
    ) -> Tensor:
        """Return the mask of a weight after a fraction of its connections is dropped and the same number grown.

        Args:
            target: the weight.
            mask: its current mask.
            keep: scores of the connections; the lowest are dropped.
            grow: scores of all entries; the highest of those that are not connections are grown.
            fraction: the fraction of connections to drop.
            kept: the current number of connections.
            min_salient: with `structure='fan_in'`: ablate outputs where less than this fraction of the fan-in survives or
                grows.
        """
        protect, spread = partial(self.score, target=target), spread_over([target.layout])
        return regrow(mask, keep, grow, drop_count(kept, fraction), kept, protect, spread)

    def held(self, counts: Sequence[int], targets: Sequence[Target], ranked: Sequence[Tensor]) -> list[int]:
        """Return the units that every pool keeps so far, from the kept entries of every weight; removed ones rank last."""
        return [count * self.units(target) // target.size for count, target in zip(counts, targets, strict=True)]

    def entries(self, kept: Mapping[int, int], targets: Sequence[Target]) -> dict[int, int]:
        """Return the kept entries of each weight from the kept units of pools; only for weights with all pools given."""
        return {layer: kept[layer] * targets[layer].size // self.units(targets[layer]) for layer in kept}


@final
class Unstructured(Structure):
    """Single weights: units are entries, so scores and masks need no conversion."""

    text = "unstructured"

    def units(self, target: Target) -> int:
        return target.size

    def score(self, score: Tensor, target: Target) -> Tensor:
        return score

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return kept

    def layout(self, target: Target) -> Layout | None:
        return target.layout

    def rank(self, scores: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
        return list(scores)

    def spread(self, kept: Sequence[Tensor], targets: Sequence[Target], scores: Sequence[Tensor]) -> list[Tensor]:
        return list(kept)

    def held(self, counts: Sequence[int], targets: Sequence[Target], ranked: Sequence[Tensor]) -> list[int]:
        return list(counts)

    def entries(self, kept: Mapping[int, int], targets: Sequence[Target]) -> dict[int, int]:
        return dict(kept)


class NOfM(Structure):
    """At most n kept of every m consecutive inputs; `2:4` runs on sparse tensor cores.

    The n best of each group are always kept, and the others compete as single weights. A gradual schedule therefore thins
    the groups step by step and ends exactly at n of m.
    """

    def __init__(self, n: int, m: int) -> None:
        if not 0 < n < m:
            raise ValueError(f"structure='{n}:{m}' must keep some and remove some: write 'n:m' with 0 < n < m, as '2:4'.")
        self.n, self.m = n, m

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def misfit(self, target: Target) -> str | None:
        if not target.layout_known:
            return f"is in a layer of an unknown type, and structure='{self.text}' needs its inputs (register_layer)"
        inputs = target.shape[target.input_dim]
        if inputs % self.m:
            said = "1 input" if inputs == 1 else f"{inputs} inputs"
            return f"has {said}, and structure='{self.text}' needs groups of {self.m}"
        return None

    def best(self, score: Tensor, target: Target) -> Tensor:
        """Return the mask that keeps the n best of each group."""
        return n_m_mask(score, self.n, self.m, target.input_dim)

    def units(self, target: Target) -> int:
        return target.size

    def score(self, score: Tensor, target: Target) -> Tensor:
        return score.masked_fill(self.best(score, target), torch.inf)

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return kept

    def layout(self, target: Target) -> Layout | None:
        if target.layout is not None and target.input_dim in target.layout.cut:
            raise ValueError("needs all inputs of an output on one rank")
        return target.layout


class Channels(Structure):
    """Whole output channels: filters of a convolution, neurons of a linear layer.

    The scores of a layer are divided by their mean before layers compete. Layers differ in width and in the scale of their
    weights; without this, a few layers would lose most of the channels.
    """

    text = "channel"

    def misfit(self, target: Target) -> str | None:
        if not target.layout_known:
            return f"is in a layer of an unknown type, and structure='{self.text}' needs its outputs (register_layer)"
        if target.shares_rows:
            return (
                "is a grouped transposed convolution, where one row serves several outputs, and structure="
                f"'{self.text}' takes whole outputs"
            )
        return None

    def units(self, target: Target) -> int:
        return target.shape[target.output_dim]

    def score(self, score: Tensor, target: Target) -> Tensor:
        layout = self.layout(target)
        return normalized(channel_score(score, target.output_dim), *(() if layout is None else (layout.total, layout.numel)))

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return expand_channels(kept, target.weight, target.output_dim)

    def layout(self, target: Target) -> Layout | None:
        if target.layout is None:
            return None
        if set(target.layout.cut) - {target.output_dim}:
            raise ValueError("needs all inputs of an output on one rank")
        return target.layout.along([target.output_dim])
