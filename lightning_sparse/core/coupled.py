"""Output channels that are cut out of a network together, because additions tie them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_sparse.core.calls import Call
from lightning_sparse.core.coupling import Coupling
from lightning_sparse.core.dependencies import find_coupling
from lightning_sparse.core.layout import Layout
from lightning_sparse.core.structure import Channels, Pool, Structure
from lightning_sparse.core.target import Target
from lightning_sparse.functional import input_score, normalized

__all__ = ["Coupled"]


class Coupled(Channels):
    """Output channels across all layers that additions tie together, with biases and norms; they can be cut out entirely.

    The score of a channel is computed from all layers that produce or read it. Channels that cannot be removed are kept.

    Args:
        coupling: which channels belong together; None before the network is known.
    """

    text = "coupled"
    keeps_one = True
    noun: ClassVar = "channels"
    """The name of the units in messages."""
    counted: ClassVar = "coupled channels"
    """The name of the units in tables."""
    holders: ClassVar = "groups of coupled layers"
    """The name of the pools in messages."""

    def __init__(self, coupling: Coupling | None = None) -> None:
        self._coupling = coupling

    @property
    def coupling(self) -> Coupling:
        """Which channels belong together."""
        if self._coupling is None:
            raise ValueError(f"structure='{self.text}' needs to know which {self.noun} of the network go together.")
        return self._coupling

    def find(self, model: nn.Module, calls: Sequence[Call], weights: Mapping[str, int]) -> Coupling:
        """Find the units of a model.

        Args:
            model: the model that holds the weights.
            calls: calls of its networks, none of which contains another.
            weights: weight -> its number of output channels.

        Raises:
            ValueError: if none can be removed, or this cannot be determined.
        """
        return find_coupling(model, calls, weights)

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, int]) -> Coupling | None:
        """Restore what `find` returned from `Coupling.state`; None if that belongs to other weights."""
        return Coupling.restore(state, weights)

    def parts(self, coupling: Coupling) -> list[str]:
        """Modules whose products between activations shrink with the units."""
        return []

    def misfit(self, target: Target) -> str | None:
        if target.stack_dims:
            return "is a stack of matrices, such as experts, whose channels nothing couples"
        return super().misfit(target)

    def layout(self, target: Target) -> Layout | None:
        return Structure.layout(self, target)

    def pools(self, targets: Sequence[Target]) -> list[Pool]:
        places = {target.name: layer for layer, target in enumerate(targets)}
        return [Pool(tuple(places[name] for name in names), len(units)) for names, units in self.coupling.pools]

    def rank(self, scores: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
        by_channel, by_input = {}, {}
        for score, target in zip(scores, targets, strict=True):
            by_channel[target.name] = self.score(score, target)
            if target.shape[target.input_dim] == len(self.coupling.inputs.get(target.name, ())):
                by_input[target.name] = normalized(input_score(score, target.input_dim))
        mean = self.coupling.mean(by_channel, by_input)
        ranked = [mean[units.to(mean.device)] for _, units in self.coupling.pools]
        for score in ranked:
            score[score.argmax()] = torch.inf  # a layer needs at least one channel
        return ranked

    def spread(self, kept: Sequence[Tensor], targets: Sequence[Target], scores: Sequence[Tensor]) -> list[Tensor]:
        whole = self.together(kept)
        return [self.expand(self.coupling.spread(whole, target.name).to(target.weight.device), target) for target in targets]

    def together(self, kept: Sequence[Tensor]) -> Tensor:
        """Merge the masks of all pools into one mask of all units, on the CPU."""
        whole = torch.ones(self.coupling.count, dtype=torch.bool)
        for mask, (_, units) in zip(kept, self.coupling.pools, strict=True):
            whole[units] = mask.cpu()
        return whole

    def held(self, counts: Sequence[int], targets: Sequence[Target], ranked: Sequence[Tensor]) -> list[int]:
        return [int((score > -torch.inf).count_nonzero()) for score in ranked]

    def entries(self, kept: Mapping[int, int], targets: Sequence[Target]) -> dict[int, int]:
        pools, found = self.pools(targets), {}
        for layer, target in enumerate(targets):
            mine = [index for index, pool in enumerate(pools) if layer in pool.layers]
            if all(index in kept for index in mine):
                stay = int((self.coupling.units[target.name] < 0).count_nonzero())
                channels = stay + sum(kept[index] for index in mine)
                found[layer] = channels * target.size // self.units(target)
        return found
