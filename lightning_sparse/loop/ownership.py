"""Which weights of a method an optimizer moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_sparse.core import owner_of
from lightning_sparse.loop.method import Method

__all__ = ["Owned", "Ownership"]


class Owned(NamedTuple):
    """What one optimizer moves.

    Args:
        sizes: numbers of parameters of its groups.
        weights: by the identity of the method, and by name.
        parts: the shards that methods see in place of the parameters that the optimizer moves, by name.
    """

    sizes: list[int]
    weights: dict[int, dict[str, nn.Parameter]]
    parts: dict[str, nn.Parameter]


class Ownership:
    """The weights of methods, by the optimizer that moves them; recomputed when its parameter groups change.

    Args:
        methods: the methods of a fit.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self._methods = list(methods)
        self._known: dict[int, Owned] = {}

    def of(self, optimizer: Optimizer) -> Owned:
        """What this optimizer moves."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        known = self._known.get(id(optimizer))
        if known is None or known.sizes != sizes:  # for example when frozen layers join
            mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            weights = {
                id(method): {name: weight for name, weight in method.weights.items() if id(owner_of(weight)) in mine}
                for method in self._methods
            }
            parts = {name: w for owned in weights.values() for name, w in owned.items() if owner_of(w) is not w}
            known = self._known[id(optimizer)] = Owned(sizes, weights, parts)
        return known
