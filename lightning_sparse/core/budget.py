"""How much is removed, of what, and how it is shared among layers; exact in every case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_sparse.core.structure import Coupled, Pool, Unstructured, parse_structure
from lightning_sparse.core.targets import Target, matches_name
from lightning_sparse.functional import ALLOCATIONS, counts, exact_count, random_generator, random_score, top_k_masks

__all__ = ["Budget"]


class Budget:
    """Selects masks of an exact size from scores.

    Args:
        sparsity: the fraction of units (weights, or channels) removed in the end, in [0, 1). May be None where the
            structure implies it.
        allocation: `global` (scores of all layers compete) or a name in `functional.ALLOCATIONS`.
        structure: `unstructured`, `channel`, `coupled`, or `n:m`.
        layer_sparsity: layers with a sparsity of their own: glob over names -> sparsity. They count toward the total.

    Raises:
        ValueError: for values out of range or in contradiction.
    """

    def __init__(
        self,
        sparsity: float | None,
        allocation: str = "global",
        structure: str | int = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
    ) -> None:
        self.structure = parse_structure(structure)
        implied = self.structure.sparsity
        if sparsity is None and implied is None:
            raise ValueError(f"structure='{structure}' needs a sparsity; write sparsity=0.9 to remove nine of ten.")
        check_sparsity("sparsity", implied if sparsity is None else sparsity)
        self.sparsity = float(implied if sparsity is None else sparsity)  # type: ignore[arg-type]
        if implied is not None and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(
                f"sparsity={self.sparsity} contradicts structure='{structure}', which removes {implied:g} of every layer; "
                "leave sparsity out."
            )
        if allocation != "global" and allocation not in ALLOCATIONS:
            raise ValueError(f"allocation='{allocation}' is unknown; choose from {['global', *ALLOCATIONS]}.")
        self.allocation = "uniform" if implied is not None else allocation
        if implied is not None and allocation not in ("global", "uniform"):
            raise ValueError(f"structure='{structure}' fixes every layer's sparsity; leave allocation='{allocation}' out.")
        if layer_sparsity is not None and not isinstance(layer_sparsity, Mapping):
            raise ValueError(f"layer_sparsity={layer_sparsity!r} must map layers to sparsities, such as {{'*.fc': 0.0}}.")
        self.layer_sparsity = dict(layer_sparsity or {})
        if implied is not None and self.layer_sparsity:
            raise ValueError(
                f"structure='{structure}' fixes every layer's sparsity; leave layer_sparsity out, and exclude layers that "
                "shall stay dense with targets=['!<layer>']."
            )
        for pattern, value in self.layer_sparsity.items():
            check_sparsity(f"layer_sparsity['{pattern}']", value)

    def check(self, targets: Sequence[Target]) -> None:
        """Refuse what cannot be reached on these weights, before any training."""
        for target in targets:
            self.structure.check(target)
        if self.kept_units(targets) == 0:
            total = sum(pool.size for pool in self.structure.pools(targets))
            raise ValueError(f"sparsity={self.sparsity} of {total:,} units leaves nothing; lower it or choose more layers.")
        if isinstance(self.structure, Coupled) and self.kept_units(targets) < len(self.structure.pools(targets)):
            raise ValueError(
                f"sparsity={self.sparsity} keeps {self.kept_units(targets)} units, fewer than there are groups of coupled "
                f"layers ({len(self.structure.pools(targets))}), and each keeps one; lower it."
            )
        _, kept = self.kept_weights(targets)
        for target in targets:
            if kept.get(target.name) == 0:
                raise ValueError(
                    f"sparsity={self.sparsity} with allocation='{self.allocation}' leaves nothing of '{target.name}' "
                    f"({self.structure.units(target)} units); lower it, exclude the layer, or use allocation='global'."
                )

    def kept_units(self, targets: Sequence[Target], sparsity: float | None = None) -> int:
        """How many units remain at a sparsity (default: the final one)."""
        total = sum(pool.size for pool in self.structure.pools(targets))
        return total - exact_count(self.sparsity if sparsity is None else sparsity, total)

    def kept_weights(self, targets: Sequence[Target], sparsity: float | None = None) -> tuple[int | None, dict[str, int]]:
        """Weights that remain at a sparsity (default: the final one): in all, and per layer where scores have no say."""
        units = self._plan(targets, self.sparsity if sparsity is None else sparsity)
        alone = {pools[0]: number for pools, number in units.items() if len(pools) == 1}
        kept = {targets[layer].name: count for layer, count in self.structure.entries(alone, targets).items()}
        if len(kept) == len(targets):
            return sum(kept.values()), kept
        return (self.kept_units(targets, sparsity) if isinstance(self.structure, Unstructured) else None), kept

    def masks(
        self,
        targets: Sequence[Target],
        scores: Sequence[Tensor],
        sparsity: float | None = None,
        kept: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Masks with exactly the due number of units, the best by score.

        Args:
            targets: the weights.
            scores: one tensor per weight; higher survives.
            sparsity: at this moment of a schedule; default: the final one.
            kept: weights that each layer keeps so far. No layer gets more, and none goes below its final number, so
                that nothing returns and every layer ends exactly.

        Raises:
            ValueError: if a score is NaN.
        """
        for score, target in zip(scores, targets, strict=True):
            if bool(score.isnan().any()):
                raise ValueError(
                    f"The score of '{target.name}' holds NaN, so nothing can be ranked; training has diverged, lower the "
                    "learning rate or clip gradients."
                )
        ranked = self.structure.rank(scores, targets)
        held = None if kept is None else self.structure.held(kept, targets, ranked)
        chosen: dict[int, Tensor] = {}
        for pools, number in self._plan(targets, self.sparsity if sparsity is None else sparsity, held).items():
            chosen.update(zip(pools, top_k_masks([ranked[pool] for pool in pools], number), strict=True))
        return self.structure.spread([chosen[pool] for pool in range(len(ranked))], targets)

    def random_masks(self, targets: Sequence[Target], seed: int, sparsity: float | None = None) -> dict[str, Tensor]:
        """Masks by name, drawn at random; the same on every rank and device."""
        scores = [random_score(target.weight, random_generator(seed, 0, target.name)) for target in targets]
        masks = self.masks(targets, scores, sparsity)
        return {target.name: mask.to(target.weight.device) for target, mask in zip(targets, masks, strict=True)}

    def _plan(
        self, targets: Sequence[Target], sparsity: float, held: Sequence[int] | None = None
    ) -> dict[tuple[int, ...], int]:
        """Units to keep in every group of pools that compete with each other; most groups are single pools.

        Args:
            targets: the weights.
            sparsity: at this moment.
            held: units that every pool keeps so far.
        """
        everything = self.structure.pools(targets)
        sizes = [pool.size for pool in everything]
        fixed = self._fixed(targets, everything, sparsity)
        total = self.kept_units(targets, sparsity)
        if self.allocation == "global":
            groups: list[tuple[int, ...]] = [(pool,) for pool in fixed]
            free = tuple(pool for pool in range(len(sizes)) if pool not in fixed)
            left = (1 - sparsity) * sum(sizes) - sum(fixed[pool] * sizes[pool] for pool in fixed)
            room = sum(sizes[pool] for pool in free)
            if not -1e-6 <= left <= room + 1e-6:
                raise ValueError(
                    f"sparsity={sparsity} keeps {total:,} units, but layer_sparsity keeps {total - round(left):,} and the "
                    f"other layers hold {room:,}; choose another sparsity or free a layer."
                )
            densities = [fixed[pool] for pool in fixed] + ([left / room] if free else [])
            groups += [free] if free else []
        else:
            groups = [(pool,) for pool in range(len(sizes))]
            shapes = [tuple(targets[pool.layers[0]].weight.shape) for pool in everything]
            densities = ALLOCATIONS[self.allocation](shapes, 1 - sparsity, fixed, sizes)
        capacity = [sum(sizes[pool] for pool in pools) for pools in groups]
        if held is None:
            return dict(zip(groups, counts(densities, capacity, total), strict=True))
        high = [sum(held[pool] for pool in pools) for pools in groups]
        low = list(self._plan(targets, self.sparsity).values())
        low = [min(final, most) for final, most in zip(low, high, strict=True)]
        return dict(zip(groups, counts(densities, capacity, min(total, sum(high)), low, high), strict=True))

    def _fixed(self, targets: Sequence[Target], pools: Sequence[Pool], sparsity: float) -> dict[int, float]:
        """Densities of the pools with a sparsity of their own, on the way in proportion to the whole."""
        way = sparsity / self.sparsity if self.sparsity else 1.0
        fixed: dict[int, float] = {}
        for pattern, value in self.layer_sparsity.items():
            hits = {layer for layer, target in enumerate(targets) if matches_name(pattern, target.name)}
            if not hits:
                names = ", ".join(target.name for target in targets[:8])
                more = ", ..." if len(targets) > 8 else ""
                raise ValueError(f"layer_sparsity: the glob '{pattern}' matches none of the chosen weights ({names}{more}).")
            fixed.update({index: 1 - value * way for index, pool in enumerate(pools) if hits & {*pool.layers}})
        return dict(sorted(fixed.items()))


def check_sparsity(name: str, value: Any) -> None:
    """Refuse what is not a fraction below one."""
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r} must be a number in [0, 1): the fraction that is removed.")
    value = float(value)
    if not 0 <= value < 1:
        hint = f"; for {value:g} % write {value / 100:g}" if 1 <= value <= 100 else ""
        raise ValueError(f"{name}={value} must be in [0, 1): the fraction that is removed{hint}.")
