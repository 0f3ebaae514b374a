"""Distribute a budget over the weights of a model: how many units each weight keeps, and which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_sparse.core.budget import Budget
from lightning_sparse.core.channel_costs import ChannelCosts
from lightning_sparse.core.checks import refuse_nan
from lightning_sparse.core.coupled import Coupled
from lightning_sparse.core.coupling import Coupling
from lightning_sparse.core.layout import spread_over
from lightning_sparse.core.patterns import matches_name
from lightning_sparse.core.structure import Structure, Unstructured
from lightning_sparse.core.target import Target
from lightning_sparse.functional import ALLOCATIONS, counts, exact_count, outlier_share, owl, random_generator, top_k_masks
from lightning_sparse.functional.order import each_top_k_mask
from lightning_sparse.functional.spread import Spread

__all__ = ["Plan", "lay_out"]


def lay_out(
    budget: Budget, targets: Sequence[Target], coupling: Coupling | None = None, costs: ChannelCosts | None = None
) -> Plan:
    """Distribute a budget over the weights of a model.

    Args:
        budget: the budget.
        targets: the weights.
        coupling: which channels are coupled, for `coupled` and `heads`.
        costs: the costs of the network, if sparsity counts them.
    """
    structure = budget.structure
    if coupling is not None and isinstance(structure, Coupled):
        structure = type(structure)(coupling)
    return Plan(budget, targets, structure, costs)


class Plan:
    """A budget distributed over weights: how many units each weight keeps, at every sparsity of a schedule.

    If a weight is a stack of independent matrices, such as experts, each matrix counts as a layer of its own.

    Args:
        budget: the budget.
        targets: the weights.
        structure: what is removed as one unit.
        costs: the costs of the network; they determine the number of units if sparsity does not count units.

    Raises:
        ValueError: if a layer with its own sparsity is not among the weights.
    """

    def __init__(
        self, budget: Budget, targets: Sequence[Target], structure: Structure, costs: ChannelCosts | None = None
    ) -> None:
        self.budget, self.targets, self.structure, self.costs = budget, targets, structure, costs
        self._matrices = [target.matrices() for target in targets]
        self._layers = [matrix for matrices in self._matrices for matrix in matrices]
        self._pools = structure.pools(self._layers)
        self._sizes = [pool.size for pool in self._pools]
        self.units = sum(self._sizes)
        """Number of units."""
        self._own = self._sparsities_of_their_own()
        everyone = range(len(self._sizes))
        if budget.allocation == "global":
            free = tuple(pool for pool in everyone if pool not in self._own)
            self._groups = [(pool,) for pool in self._own] + ([free] if free else [])
        else:
            self._groups = [(pool,) for pool in everyone]
        self._room = [sum([self._sizes[pool] for pool in group]) for group in self._groups]

    def check(self) -> None:
        """Refuse a budget that these weights cannot meet, before training starts."""
        if self.costs is not None:
            self._check_costs(self.costs)
            return
        sparsity, kept = self.budget.sparsity, self.kept_units()
        least = sum([self._least(pool) for pool in self._open])
        if self.budget.max_layer_sparsity < 1 and kept < least:
            raise ValueError(
                f"sparsity={sparsity} keeps {kept:,} units, but max_layer_sparsity={self.budget.max_layer_sparsity} keeps "
                f"{least:,}, rounded up in every layer; lower the one or raise the other."
            )
        if kept == 0:
            raise ValueError(f"sparsity={sparsity} of {self.units:,} units leaves nothing; lower it or choose more layers.")
        if self.structure.keeps_one and kept < len(self._pools):
            what = self.structure.holders if isinstance(self.structure, Coupled) else "layers"
            raise ValueError(
                f"sparsity={sparsity} keeps {kept} units, fewer than there are {what} ({len(self._pools)}), and each keeps "
                "one; lower it."
            )
        alone = self._kept_alone(self._final)
        for index, layer in enumerate(self._layers):
            if alone.get(index) == 0:
                raise ValueError(
                    f"sparsity={sparsity} with allocation='{self.budget.allocation}' leaves nothing of '{layer.name}' "
                    f"({self.structure.units(layer)} units); lower it, exclude the layer, or use allocation='global'."
                )

    def _check_costs(self, costs: ChannelCosts) -> None:
        """Refuse a budget that is not met even if every layer keeps as few channels as it may."""
        sparsity, limited = self.budget.sparsity, "" if self.budget.max_layer_sparsity == 1 else " that the limit leaves"
        assert isinstance(self.structure, Coupled)
        fewest = [torch.arange(size) < max(1, self._least(pool)) for pool, size in enumerate(self._sizes)]
        cost = costs(self.structure.together(fewest))
        if cost > (1 - sparsity) * costs.dense:
            raise ValueError(
                f"sparsity={sparsity} of {costs.dense:,} {self.budget.measure} cannot be reached: with the fewest channels"
                f"{limited} in every layer {cost:,} remain; lower it, or choose more layers."
            )

    @property
    def _open(self) -> list[int]:
        """Return the pools whose units compete with those of other pools."""
        return [pool for pool in range(len(self._sizes)) if pool not in self._own]

    def _least(self, pool: int) -> int:
        """Return the minimum number of units that a pool keeps."""
        return self._sizes[pool] - math.floor(self.budget.max_layer_sparsity * self._sizes[pool] + 1e-6)

    def kept_units(self, sparsity: float | None = None) -> int:
        """Return the number of units that remain at a sparsity (default: the final one)."""
        return self.units - exact_count(self.budget.sparsity if sparsity is None else sparsity, self.units)

    def kept_weights(self, sparsity: float | None = None) -> tuple[int | None, dict[str, int]]:
        """Return the weights that remain at a sparsity (default: the final one): in total, and per layer if known.

        The number of a layer is known if it does not depend on scores.
        """
        if self.costs is not None:
            return None, {}
        numbers = self._final if sparsity is None else self._counts(sparsity)
        alone, kept, first = self._kept_alone(numbers), {}, 0
        for target, matrices in zip(self.targets, self._matrices, strict=True):
            mine = [alone[index] for index in range(first, first + len(matrices)) if index in alone]
            first += len(matrices)
            if len(mine) == len(matrices):
                kept[target.name] = sum(mine)
        if len(kept) == len(self.targets):
            return sum(kept.values()), kept
        return (self.kept_units(sparsity) if isinstance(self.structure, Unstructured) else None), kept

    def _kept_alone(self, numbers: Sequence[int]) -> dict[int, int]:
        """Return the weights that remain in each matrix whose number does not depend on scores, from the units per group."""
        by_score = self.budget.allocation == "owl"
        alone = {
            group[0]: number
            for group, number in zip(self._groups, numbers, strict=True)
            if len(group) == 1 and not (by_score and group[0] not in self._own)
        }
        return self.structure.entries(alone, self._layers)

    def outliers(self, scores: Sequence[Tensor]) -> list[float] | None:
        """Return the share of outliers among the scores of every layer; None if the allocation does not need it."""
        if self.budget.allocation != "owl":
            return None
        return [outlier_share(units) for units in self.structure.rank(self._apart(scores), self._layers)]

    def _apart(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Return the scores of all matrices."""
        return [part for target, score in zip(self.targets, scores, strict=True) for part in target.unstack(score)]

    def masks(
        self,
        scores: Sequence[Tensor],
        sparsity: float | None = None,
        kept: Sequence[int] | None = None,
        outliers: Sequence[float] | None = None,
    ) -> list[Tensor]:
        """Return masks that keep the units with the highest scores, and exactly as many as the budget allows.

        Args:
            scores: one tensor per weight; higher survives.
            sparsity: the current sparsity of a schedule; default: the final one.
            kept: number of weights that each layer keeps so far. No layer gets more, and none goes below its final number,
                so removed weights stay removed and every layer ends exactly at its number.
            outliers: what `outliers` returned for scores of which only the order is left in `scores`.

        Raises:
            ValueError: if a score is NaN.
        """
        shares = self.outliers(scores) if outliers is None else outliers
        apart = self._apart(scores)
        ranked = self.structure.rank(apart, self._layers)
        held = None if kept is None else self.structure.held(self._kept_apart(kept, apart), self._layers, ranked)
        due = self.budget.sparsity if sparsity is None else sparsity
        try:
            ranked = self._limited(ranked)
            if self.costs is None:
                chosen = self._best(ranked, due, held, shares)
            else:
                chosen = self._affordable(ranked, due, held, shares, self.costs)
        except ValueError:
            refuse_nan(scores, [target.name for target in self.targets])
            raise
        spread = iter(self.structure.spread(chosen, self._layers, apart))
        return [
            target.restack([next(spread) for _ in matrices])
            for target, matrices in zip(self.targets, self._matrices, strict=True)
        ]

    def each_mask(
        self, scores: list[Tensor], sparsity: float, kept: Sequence[int], outliers: Sequence[float] | None = None
    ) -> Iterator[Tensor]:
        """Yield what `masks` returns, one mask at a time, and empty the list of scores to save memory.

        If single weights compete, each score is removed from the list before its mask is yielded; otherwise all scores are
        removed at the start.
        """
        single = isinstance(self.structure, Unstructured) and len(self._layers) == len(self.targets)
        if not single or len(self._groups) > 1 or self.budget.max_layer_sparsity < 1:
            masks = self.masks(scores, sparsity, kept, outliers)
            scores.clear()
            while masks:
                yield masks.pop(0)
            return
        try:
            best = each_top_k_mask(scores, self._counts(sparsity, kept)[0], self._spread(self._groups[0]))
            first = next(best)
        except ValueError:
            refuse_nan(scores, [target.name for target in self.targets])
            raise
        yield first
        yield from best

    def _best(
        self, ranked: Sequence[Tensor], sparsity: float, held: Sequence[int] | None, outliers: Sequence[float] | None
    ) -> list[Tensor]:
        """Return the masks of the pools that keep the highest scores."""
        chosen: dict[int, Tensor] = {}
        for group, number in zip(self._groups, self._counts(sparsity, held, outliers), strict=True):
            masks = top_k_masks([ranked[pool] for pool in group], number, self._spread(group))
            chosen.update(zip(group, masks, strict=True))
        return [chosen[pool] for pool in range(len(ranked))]

    def _affordable(
        self,
        ranked: Sequence[Tensor],
        sparsity: float,
        held: Sequence[int] | None,
        outliers: Sequence[float] | None,
        costs: ChannelCosts,
    ) -> list[Tensor]:
        """Return such masks with the largest number of units that the costs allow."""
        assert isinstance(self.structure, Coupled)

        def with_units(kept: int) -> list[Tensor]:
            return self._best(ranked, (self.units - kept) / self.units, held, outliers)

        low, high = len(self._sizes), self.units if held is None else sum(held)
        while low < high:
            middle = (low + high + 1) // 2
            if costs(self.structure.together(with_units(middle))) <= (1 - sparsity) * costs.dense:
                low = middle
            else:
                high = middle - 1
        return with_units(low)

    def _limited(self, ranked: list[Tensor]) -> list[Tensor]:
        """Return scores in which the units that a layer must keep rank first."""
        if self.budget.max_layer_sparsity == 1:
            return ranked
        for pool in self._open:
            first = top_k_masks([ranked[pool]], self._least(pool), self._spread([pool]))[0]
            ranked[pool] = ranked[pool].masked_fill(first, torch.inf)
        return ranked

    def _kept_apart(self, kept: Sequence[int], scores: Sequence[Tensor]) -> list[int]:
        """Return the number of weights that each matrix keeps so far; in a stack, those with a score above -inf."""
        counts: list[int] = []
        for count, matrices in zip(kept, self._matrices, strict=True):
            mine = scores[len(counts) : len(counts) + len(matrices)]
            counts += [count] if len(matrices) == 1 else self._ranked(mine, matrices)
        return counts

    def _ranked(self, scores: Sequence[Tensor], matrices: Sequence[Target]) -> list[int]:
        """Return the number of entries of each matrix with a score above -inf."""
        numbers, spread = [(score > -torch.inf).count_nonzero() for score in scores], spread_over(m.layout for m in matrices)
        return [int(number) for number in numbers] if spread is None else spread.sums(numbers)

    def _spread(self, group: Sequence[int]) -> Spread | None:
        """Return how the units of these pools are distributed over ranks."""
        layers = [layer for pool in group for layer in self._pools[pool].layers]
        return spread_over(self.structure.layout(self._layers[layer]) for layer in layers)

    def random_masks(self, seed: int, sparsity: float | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield pairs of name and random mask; they are the same on every rank and device."""
        due = self.budget.sparsity if sparsity is None else sparsity
        draws = (target.draw(random_generator(seed, 0, target.name)) for target in self.targets)
        together = self.budget.allocation == "global" or isinstance(self.structure, Coupled)
        masks = iter(self.masks([*draws], due)) if together else self._alone(draws, self._counts(due))
        for target, mask in zip(self.targets, masks, strict=True):
            yield target.name, mask.to(target.weight.device)

    def _alone(self, scores: Iterable[Tensor], numbers: Sequence[int]) -> Iterator[Tensor]:
        """Yield masks of weights that do not compete, with the scores of only one weight in memory."""
        first = 0
        for target, matrices, score in zip(self.targets, self._matrices, scores, strict=True):
            apart, chosen = target.unstack(score), []
            for pool, ranked in enumerate(self.structure.rank(apart, matrices), first):
                chosen += top_k_masks([ranked], numbers[pool], self._spread([pool]))
            yield target.restack(self.structure.spread(chosen, matrices, apart))
            first += len(matrices)

    @cached_property
    def _final(self) -> list[int]:
        return self._counts(self.budget.sparsity)

    def _counts(
        self, sparsity: float, held: Sequence[int] | None = None, outliers: Sequence[float] | None = None
    ) -> list[int]:
        """Return the units to keep in every group of pools that compete with each other; most groups are single pools.

        Args:
            sparsity: the current sparsity.
            held: number of units that every pool keeps so far.
            outliers: the share of outliers in every pool, if it is known.
        """
        densities, total = self._densities(sparsity, outliers), self.kept_units(sparsity)
        if held is None:
            return counts(densities, self._room, total)
        high = [sum([held[pool] for pool in group]) for group in self._groups]
        final = self._final if self.budget.allocation != "owl" else [self._final_of(group[0]) for group in self._groups]
        low = list(map(min, final, high)) if self.costs is None else [0] * len(high)
        return counts(densities, self._room, min(total, sum(high)), low, high)

    def _final_of(self, pool: int) -> int:
        """Return the final minimum of a pool if scores set the allocation: its own share, or none if it has none."""
        return self._final[pool] if pool in self._own else 0

    def _densities(self, sparsity: float, outliers: Sequence[float] | None = None) -> list[float]:
        """Return the density of every group. Layers with their own sparsity approach it in proportion to the whole."""
        way = sparsity / self.budget.sparsity if self.budget.sparsity else 1.0
        own = {pool: 1 - value * way for pool, value in self._own.items()}
        if self.budget.allocation == "owl":
            return owl(outliers or [0.0] * len(self._sizes), 1 - sparsity, self._sizes, own)
        if self.budget.allocation != "global":
            shapes = [self._layers[pool.layers[0]].shape for pool in self._pools]
            return ALLOCATIONS[self.budget.allocation](shapes, 1 - sparsity, own, self._sizes)
        left = (1 - sparsity) * self.units - sum([density * self._sizes[pool] for pool, density in own.items()])
        room = self._room[-1] if len(own) < len(self._groups) else 0
        if not -1e-6 <= left <= room + 1e-6:
            total = self.kept_units(sparsity)
            raise ValueError(
                f"sparsity={sparsity} keeps {total:,} units, but layer_sparsity keeps {total - round(left):,} and the "
                f"other layers hold {room:,}; choose another sparsity or free a layer."
            )
        return [*own.values(), *([left / room] if room else [])]

    def _sparsities_of_their_own(self) -> dict[int, float]:
        """Return the sparsities of pools that have their own, in order."""
        own: dict[int, float] = {}
        for pattern, value in self.budget.layer_sparsity.items():
            matching = [matches_name(pattern, target.name) for target in self.targets]
            places = [hit for hit, matrices in zip(matching, self._matrices, strict=True) for _ in matrices]
            hits = {layer for layer, hit in enumerate(places) if hit}
            if not hits:
                names = ", ".join(target.name for target in self.targets[:8])
                more = ", ..." if len(self.targets) > 8 else ""
                top = pattern.removeprefix("*.")
                hint = f"; write '{top}'" if any(matches_name(top, target.name) for target in self.targets) else ""
                said = f"layer_sparsity: the glob '{pattern}' matches none of the chosen weights ({names}{more}){hint}"
                raise ValueError(f"{said}.")
            own.update({index: value for index, pool in enumerate(self._pools) if hits & {*pool.layers}})
        return dict(sorted(own.items()))
