"""What is removed as one piece: a weight, all but n of m neighbors, or an output channel."""

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
    """Units that belong to the same weights: all of one weight, unless channels are coupled.

    Args:
        layers: positions of the weights.
        size: how many units.
    """

    layers: tuple[int, ...]
    size: int


class Structure(ABC):
    """Turns scores of weights into scores of units, and masks of units into masks of weights."""

    keeps_one: ClassVar[bool] = False
    """Whether the best unit of each pool stays in any case."""

    @property
    @abstractmethod
    def text(self) -> str:
        """How users write it."""

    def misfit(self, target: Target) -> str | None:
        """Why this weight cannot have the structure, or None if it can."""
        return None

    @abstractmethod
    def units(self, target: Target) -> int:
        """How many units the weight has."""

    @abstractmethod
    def score(self, score: Tensor, target: Target) -> Tensor:
        """One score per unit."""

    @abstractmethod
    def expand(self, kept: Tensor, target: Target) -> Tensor:
        """The mask of the weight from the mask of its units."""

    def layout(self, target: Target) -> Layout | None:
        """Where the units lie that this rank holds of a weight; None where it holds all of them.

        Raises:
            ValueError: if ranks do not hold whole units.
        """
        if target.layout is None:
            return None
        raise ValueError("needs whole weights")

    def unfit(self, target: Target) -> str | None:
        """Why the part of this weight that a rank holds cannot have the structure, or None if it can."""
        why = self.misfit(target)
        if why is None and target.layout is not None:
            try:
                self.layout(target.matrices()[0])
            except ValueError as error:
                why = f"is cut into shards, and structure='{self.text}' {error}"
        return why

    @property
    def sparsity(self) -> float | None:
        """The only sparsity the structure allows, or None if any."""
        return None

    def pools(self, targets: Sequence[Target]) -> list[Pool]:
        """All units, by the weights they belong to."""
        return [Pool((layer,), self.units(target)) for layer, target in enumerate(targets)]

    def rank(self, scores: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
        """One score per unit of every pool, from one per entry of every weight."""
        return [self.score(score, target) for score, target in zip(scores, targets, strict=True)]

    def spread(self, kept: Sequence[Tensor], targets: Sequence[Target], scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks of the weights from those of the pools.

        Args:
            kept: of every pool.
            targets: the weights.
            scores: of every entry of them, by which units were ranked.
        """
        return [self.expand(mask, target) for mask, target in zip(kept, targets, strict=True)]

    def regrow(
        self, target: Target, mask: Tensor, keep: Tensor, grow: Tensor, fraction: float, kept: int, min_salient: float
    ) -> Tensor:
        """The mask of a weight after a share of its connections has been dropped and as many grown.

        Args:
            target: the weight.
            mask: as it is.
            keep: how much each connection matters; the lowest are dropped.
            grow: how much each entry would gain by becoming one; the highest are grown.
            fraction: of the connections that is dropped.
            kept: how many connections there are.
            min_salient: the share of its connections below which an output is given up, where outputs have equal numbers.
        """
        protect, spread = partial(self.score, target=target), spread_over([target.layout])
        return regrow(mask, keep, grow, drop_count(kept, fraction), kept, protect, spread)

    def held(self, counts: Sequence[int], targets: Sequence[Target], ranked: Sequence[Tensor]) -> list[int]:
        """Units that every pool keeps so far, from the entries that every weight does; what is dropped is ranked last."""
        return [count * self.units(target) // target.size for count, target in zip(counts, targets, strict=True)]

    def entries(self, kept: Mapping[int, int], targets: Sequence[Target]) -> dict[int, int]:
        """Entries that weights keep when pools keep so many units; of weights all of whose pools are given."""
        return {layer: kept[layer] * targets[layer].size // self.units(targets[layer]) for layer in kept}


@final
class Unstructured(Structure):
    """Every weight by itself: scores are masks are weights, and nothing is to be translated."""

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

    The n best of each group are out of reach, and the others compete as single weights: a gradual schedule thins
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
            return f"is of no known kind of layer, and structure='{self.text}' must know its inputs (register_layer)"
        inputs = target.shape[target.input_dim]
        if inputs % self.m:
            said = "1 input" if inputs == 1 else f"{inputs} inputs"
            return f"has {said}, and structure='{self.text}' needs groups of {self.m}"
        return None

    def best(self, score: Tensor, target: Target) -> Tensor:
        """The mask that keeps the n best of each group."""
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

    The scores of a layer are divided by their mean before those of different layers compete: layers differ in width and in
    the scale of their weights, and without it some of them lose all that is to go.
    """

    text = "channel"

    def misfit(self, target: Target) -> str | None:
        if not target.layout_known:
            return f"is of no known kind of layer, and structure='{self.text}' must know its outputs (register_layer)"
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
