"""Detects whether anything moves pruned entries; as long as nothing does, they need not be reset."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from lightning_sparse.core import owner_of
from lightning_sparse.loop import Step

__all__ = ["Watch"]


class Watch:
    """Records for an optimizer and its surroundings whether pruned entries have ever left zero by themselves.

    An entry with zero weight, zero gradient and zero moments stays where it is under nearly every optimizer. Which
    optimizers these are is tested, not listed: pruned entries are checked in the first step, and again after every change of
    masks or of parameter groups. In between, the version counters of tensors show at no cost whether anything has written to
    a weight outside the optimizer's step.
    """

    def __init__(self) -> None:
        self.moved = False
        """Whether something has moved a pruned entry; from then on they are reset after every step."""
        self._passed: dict[int, tuple[int, Mapping[str, nn.Parameter]]] = {}
        self._versions: dict[int, list[int]] = {}
        self._owners: dict[int, tuple[Mapping[str, nn.Parameter], list[nn.Parameter]]] = {}
        self._turn = 0

    def trusts(self, step: Step, changes: int) -> bool:
        """Whether a check of the weights of a step found nothing, under these masks and parameter groups.

        Args:
            step: the step; after a change of parameter groups it has another mapping of weights.
            changes: number of mask changes so far.
        """
        passed = self._passed.get(id(step.optimizer))
        return passed is not None and passed[0] == changes and passed[1] is step.weights

    def trust(self, step: Step, changes: int) -> None:
        """Record that a check found nothing."""
        self._passed[id(step.optimizer)] = changes, step.weights

    def distrust(self, optimizer: Optimizer) -> None:
        """Record that a new check is needed."""
        self._passed.pop(id(optimizer), None)

    def note(self, step: Step) -> None:
        """Record the current versions of a step's weights."""
        self._versions[id(step.optimizer)] = self._current(step)

    def written(self, step: Step) -> bool:
        """Whether anything has written to the weights of a step since `note`; edits of `.data` do not show."""
        return self._versions.get(id(step.optimizer)) != self._current(step)

    def sample(self, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """One weight of them, another one each time."""
        names = [*weights]
        self._turn += 1
        return {name: weights[name] for name in names[self._turn % len(names) :][:1]} if names else {}

    def _current(self, step: Step) -> list[int]:
        """Version counters of the parameters, not of their local parts: a write to one need not show in the other."""
        known = self._owners.get(id(step.optimizer))
        if known is None or known[0] is not step.weights:
            known = self._owners[id(step.optimizer)] = step.weights, [owner_of(weight) for weight in step.weights.values()]
        return [weight._version for weight in known[1]]
