"""Output channels that leave a network together: all that additions couple with one."""

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
    """Output channels, each in all the layers that additions couple, with its biases and norms: these can leave a network.

    A channel counts by what all the layers say that hold it or read it. Channels that cannot leave are kept.

    Args:
        coupling: which channels go together; None before the network is known.
    """

    text = "coupled"
    keeps_one = True
    noun: ClassVar = "channels"
    """What messages call the units."""
    counted: ClassVar = "coupled channels"
    """What tables call them."""
    holders: ClassVar = "groups of coupled layers"
    """What messages call the pools."""

    def __init__(self, coupling: Coupling | None = None) -> None:
        self._coupling = coupling

    @property
    def coupling(self) -> Coupling:
        """Which channels go together."""
        if self._coupling is None:
            raise ValueError(f"structure='{self.text}' needs to know which {self.noun} of the network go together.")
        return self._coupling

    def find(self, model: nn.Module, calls: Sequence[Call], weights: Mapping[str, int]) -> Coupling:
        """Which units a model has.

        Args:
            model: that holds the weights.
            calls: of its networks, of which none holds another.
            weights: weight -> how many output channels it has.

        Raises:
            ValueError: if none can leave, or it cannot be found out.
        """
        return find_coupling(model, calls, weights)

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, int]) -> Coupling | None:
        """What `find` has found before, from `Coupling.state`; None if that was of other weights."""
        return Coupling.restore(state, weights)

    def parts(self, coupling: Coupling) -> list[str]:
        """Modules whose products between activations get fewer with the units."""
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
            score[score.argmax()] = torch.inf  # a layer without channels is none
        return ranked

    def spread(self, kept: Sequence[Tensor], targets: Sequence[Target], scores: Sequence[Tensor]) -> list[Tensor]:
        whole = self.together(kept)
        return [self.expand(self.coupling.spread(whole, target.name).to(target.weight.device), target) for target in targets]

    def together(self, kept: Sequence[Tensor]) -> Tensor:
        """The masks of all pools as one of all units, on the CPU."""
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
