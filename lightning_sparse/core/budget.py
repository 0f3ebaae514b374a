"""How much is removed, of what, and how it is shared among layers; exact in every case."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_sparse.core.structure import Unstructured, parse_structure
from lightning_sparse.core.targets import Target
from lightning_sparse.functional import ALLOCATIONS, counts, exact_count, top_k_masks

__all__ = ["Budget"]


class Budget:
    """Selects masks of an exact size from scores.

    Args:
        sparsity: the fraction of units (weights, or channels) removed in the end, in [0, 1). May be None where the
            structure implies it.
        allocation: `global` (scores of all layers compete) or a name in `functional.ALLOCATIONS`.
        structure: `unstructured`, `channel`, or `n:m`.
        layer_sparsity: layers with a sparsity of their own: glob over names -> sparsity. They count towards the total.

    Raises:
        ValueError: for values out of range or in contradiction.
    """

    def __init__(
        self,
        sparsity: float | None,
        allocation: str = "global",
        structure: str = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
    ) -> None:
        self.structure = parse_structure(structure)
        implied = self.structure.sparsity
        if sparsity is None and implied is None:
            raise ValueError(f"structure='{structure}' needs a sparsity; write sparsity=0.9 to remove nine of ten.")
        self.sparsity: float = sparsity if sparsity is not None else implied  # type: ignore[assignment]
        check_sparsity("sparsity", self.sparsity)
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
        self.layer_sparsity = dict(layer_sparsity or {})
        for pattern, value in self.layer_sparsity.items():
            check_sparsity(f"layer_sparsity['{pattern}']", value)

    def check(self, targets: Sequence[Target]) -> None:
        """Refuse what cannot be reached on these weights, before any training."""
        for target in targets:
            self.structure.check(target)
        _, kept = self.kept_weights(targets)
        for target in targets:
            if kept.get(target.name) == 0:
                raise ValueError(
                    f"sparsity={self.sparsity} with allocation='{self.allocation}' leaves nothing of '{target.name}' "
                    f"({self.structure.units(target)} units); lower it, exclude the layer, or use allocation='global'."
                )

    def kept_units(self, targets: Sequence[Target], sparsity: float | None = None) -> int:
        """How many units remain at a sparsity (default: the final one)."""
        total = sum(self.structure.units(target) for target in targets)
        return total - exact_count(self.sparsity if sparsity is None else sparsity, total)

    def masks(self, targets: Sequence[Target], scores: Sequence[Tensor], sparsity: float | None = None) -> list[Tensor]:
        """Masks with exactly the due number of units, the best by score.

        Args:
            targets: the weights.
            scores: one tensor per weight; higher survives.
            sparsity: at this moment of a schedule; default: the final one.
        """
        for score, target in zip(scores, targets, strict=True):
            if bool(score.isnan().any()):
                raise ValueError(
                    f"The score of '{target.name}' holds NaN, so nothing can be ranked; training has diverged, lower the "
                    "learning rate or clip gradients."
                )
        sparsity = self.sparsity if sparsity is None else sparsity
        units = [self.structure.score(score, target) for score, target in zip(scores, targets, strict=True)]
        kept = self._kept_per_layer(targets, sparsity)
        chosen: dict[int, Tensor] = {layer: top_k_masks([units[layer]], keep)[0] for layer, keep in kept.items()}
        rest = [layer for layer in range(len(targets)) if layer not in kept]
        if rest:
            remaining = self.kept_units(targets, sparsity) - sum(kept.values())
            chosen.update(zip(rest, top_k_masks([units[layer] for layer in rest], remaining), strict=True))
        return [self.structure.expand(chosen[layer], target) for layer, target in enumerate(targets)]

    def kept_weights(self, targets: Sequence[Target]) -> tuple[int | None, dict[str, int]]:
        """Weights that remain in the end: in all, and per layer; left out where only the scores can tell."""
        kept = {
            targets[layer].name: number * targets[layer].weight.numel() // self.structure.units(targets[layer])
            for layer, number in self._kept_per_layer(targets, self.sparsity).items()
        }
        if len(kept) == len(targets):
            return sum(kept.values()), kept
        return (self.kept_units(targets) if isinstance(self.structure, Unstructured) else None), kept

    def _kept_per_layer(self, targets: Sequence[Target], sparsity: float) -> dict[int, int]:
        """Units to keep in every layer that does not compete with the others."""
        sizes = [self.structure.units(target) for target in targets]
        fixed = self._fixed(targets, sparsity)
        if self.allocation == "global":
            kept = {layer: size - exact_count(1 - fixed[layer], size) for layer, size in enumerate(sizes) if layer in fixed}
            remaining = self.kept_units(targets, sparsity) - sum(kept.values())
            room = sum(size for layer, size in enumerate(sizes) if layer not in fixed)
            if not 0 <= remaining <= room:
                raise ValueError(
                    f"sparsity={sparsity} keeps {self.kept_units(targets, sparsity):,} units, but layer_sparsity keeps "
                    f"{sum(kept.values()):,} and the other layers hold {room:,}; choose another sparsity or free a layer."
                )
            return kept
        shapes = [tuple(target.weight.shape) for target in targets]
        densities = ALLOCATIONS[self.allocation](shapes, 1 - sparsity, fixed)
        # Whole channels of unequal size cannot meet a number of weights exactly; their own number they do meet.
        if sizes == [target.weight.numel() for target in targets]:
            total = self.kept_units(targets, sparsity)
        else:
            total = round(sum(density * size for density, size in zip(densities, sizes, strict=True)))
        return dict(enumerate(counts(densities, sizes, total)))

    def _fixed(self, targets: Sequence[Target], sparsity: float) -> dict[int, float]:
        """Densities of the layers with a sparsity of their own, on the way in proportion to the whole."""
        way = sparsity / self.sparsity if self.sparsity else 1.0
        fixed: dict[int, float] = {}
        for pattern, value in self.layer_sparsity.items():
            hits = [
                layer
                for layer, target in enumerate(targets)
                if fnmatch.fnmatchcase(target.name, pattern) or fnmatch.fnmatchcase(target.name.rpartition(".")[0], pattern)
            ]
            if not hits:
                names = ", ".join(target.name for target in targets[:8])
                raise ValueError(f"layer_sparsity: '{pattern}' matches none of the chosen weights ({names}, ...).")
            fixed.update(dict.fromkeys(hits, 1 - value * way))
        return fixed


def check_sparsity(name: str, value: float) -> None:
    """Refuse what is not a fraction below one."""
    if not 0 <= value < 1:
        hint = f"; for {value:g} % write {value / 100:g}" if 1 <= value <= 100 else ""
        raise ValueError(f"{name}={value} must be in [0, 1): the fraction that is removed{hint}.")
