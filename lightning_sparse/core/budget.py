"""How much is removed, what sparsity counts, and how it is distributed over layers; always exact."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Literal, get_args

from lightning_sparse.core.checks import check_choice, check_sparsity
from lightning_sparse.core.coupled import Coupled
from lightning_sparse.core.structures import parse_structure
from lightning_sparse.functional import ALLOCATIONS

__all__ = ["AllocationName", "Budget", "BudgetName", "ShapeAllocationName", "UnscoredAllocationName"]

ShapeAllocationName = Literal["uniform", "uniform+", "er", "erk", "erk+"]
"""Allocations that depend only on the shapes of the layers: the names in `functional.ALLOCATIONS`."""

UnscoredAllocationName = Literal["global", "uniform", "uniform+", "er", "erk", "erk+"]
"""Allocations for methods without scores; with `global`, every weight of all layers has the same chance."""

AllocationName = Literal["global", "uniform", "uniform+", "er", "erk", "erk+", "owl"]
"""With `global`, the scores of all layers compete; `owl` weights layers by the outliers among their scores."""

BudgetName = Literal["units", "macs", "parameters"]
"""What sparsity counts: the units of the structure, or the multiplications or parameters of the whole network."""


class Budget:
    """A sparsity, what it counts, and how it is distributed over layers.

    Args:
        sparsity: the final fraction of units (weights, or channels) removed, in [0, 1). May be None if the structure
            implies it.
        allocation: `global` (scores of all layers compete), `owl` (layers with more outliers among their scores keep more),
            or a name in `functional.ALLOCATIONS`.
        structure: a name in `STRUCTURES`, such as `channel` or `2:4`.
        layer_sparsity: layers with their own sparsity: glob over names -> sparsity. They count toward the total.
        usual: the method's default allocation; with `n:m`, only this one, `global` and `uniform` are accepted.
        max_layer_sparsity: the largest fraction of its units that a layer may lose if layers compete.
        measure: what sparsity counts, a `BudgetName`.
        scored: whether the method has scores; `owl` needs them.

    Raises:
        ValueError: if values are out of range or contradict each other.
    """

    def __init__(
        self,
        sparsity: float | None,
        allocation: str = "global",
        structure: str | int = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        usual: str = "global",
        max_layer_sparsity: float = 1.0,
        measure: str = "units",
        scored: bool = True,
    ) -> None:
        self.structure = parse_structure(structure)
        check_choice("budget", measure, get_args(BudgetName))
        self.measure, self.max_layer_sparsity = measure, max_layer_sparsity
        implied = self.structure.sparsity
        if sparsity is None and implied is None:
            raise ValueError(f"structure='{structure}' needs a sparsity; write sparsity=0.9 to remove nine of ten.")
        check_sparsity("sparsity", implied if sparsity is None else sparsity)
        self.sparsity = float(implied if sparsity is None else sparsity)  # type: ignore[arg-type]
        if implied is not None and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(
                f"sparsity={self.sparsity} contradicts structure='{structure}', which removes {implied:g} of every layer; "
                "omit sparsity."
            )
        check_choice("allocation", allocation, ["global", *ALLOCATIONS, *(["owl"] if scored else [])])
        self.allocation = "uniform" if implied is not None else allocation
        if implied is not None and allocation not in (usual, "global", "uniform"):
            raise ValueError(f"structure='{structure}' fixes every layer's sparsity; omit allocation='{allocation}'.")
        if layer_sparsity is not None and not isinstance(layer_sparsity, Mapping):
            raise ValueError(f"layer_sparsity={layer_sparsity!r} must map layers to sparsities, such as {{'*.fc': 0.0}}.")
        self.layer_sparsity = dict(layer_sparsity or {})
        if implied is not None and self.layer_sparsity:
            raise ValueError(
                f"structure='{structure}' fixes every layer's sparsity; omit layer_sparsity, and exclude layers that "
                "must stay dense with targets=['!<layer>']."
            )
        for pattern, value in self.layer_sparsity.items():
            check_sparsity(f"layer_sparsity['{pattern}']", value)
        self._check_limit()
        if measure != "units" and not isinstance(self.structure, Coupled):
            raise ValueError(
                f"budget='{measure}' counts what leaves the network, and structure='{structure}' takes nothing out of it; "
                "write structure='coupled', or 'heads'."
            )
        if measure != "units" and self.layer_sparsity:
            raise ValueError(
                f"layer_sparsity counts channels, and budget='{measure}' does not; choose layers with targets, or limit "
                "them with max_layer_sparsity."
            )

    def _check_limit(self) -> None:
        limit: object = self.max_layer_sparsity
        if not isinstance(limit, Real) or not 0 < float(limit) <= 1:
            raise ValueError(f"max_layer_sparsity={limit!r} must be in (0, 1]: the largest share that a layer loses.")
        if float(limit) == 1:
            return
        if self.allocation != "global":
            raise ValueError(
                f"max_layer_sparsity={limit} is for layers that compete; allocation='{self.allocation}' sets what each of "
                "them loses; omit one of the two."
            )
        if self.measure == "units" and self.sparsity > float(limit):
            raise ValueError(
                f"sparsity={self.sparsity} is above max_layer_sparsity={limit}, which no layer may exceed; lower it, or "
                "raise the limit."
            )
