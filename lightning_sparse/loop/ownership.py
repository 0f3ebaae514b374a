"""Which weights of a method an optimizer moves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_sparse.loop.method import Method

__all__ = ["Ownership"]


class Ownership:
    """The weights of methods, by the optimizer that moves them; asked anew when an optimizer is given more parameters.

    Args:
        methods: of a fit.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self._methods = list(methods)
        self._known: dict[int, tuple[int, dict[int, dict[str, nn.Parameter]]]] = {}

    def of(self, optimizer: Optimizer) -> dict[int, dict[str, nn.Parameter]]:
        """By the identity of the method, and by name."""
        count = sum([len(group["params"]) for group in optimizer.param_groups])
        known, owned = self._known.get(id(optimizer), (-1, {}))
        if known != count:  # so it is when frozen layers join
            mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            owned = {
                id(method): {name: weight for name, weight in method.weights.items() if id(weight) in mine}
                for method in self._methods
            }
            self._known[id(optimizer)] = count, owned
        return owned
