"""Output channels that can only be removed together, because additions couple them across layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.core.masks import MaskSet
from lightning_sparse.core.moments import clear_moments

__all__ = ["CoupledVectors", "Coupling", "Place"]

Place = tuple[str, int]
"""A parameter, and a channel of it."""


class Coupling:
    """Which channels of which parameters form one unit.

    Args:
        groups: for every channel, the places where it appears; channels with a common place form one unit.
        weights: weight -> its number of output channels.
        vectors: the same for biases and norms; they are removed with a channel but do not affect its score.
        staying: weight whose channels, and all channels coupled with them, must stay -> reason.
        readers: weight -> for each of its inputs, a place of the channel that it reads, or None.

    Example:
        >>> channels = [[("a", 0), ("b", 0)], [("a", 1), ("b", 1)], [("c", 0)]]
        >>> coupling = Coupling(channels, {"a": 2, "b": 2, "c": 1}, {}, {})
        >>> coupling.units["b"], coupling.pools
        (tensor([0, 1]), [(('a', 'b'), tensor([0, 1])), (('c',), tensor([2]))])
    """

    def __init__(
        self,
        groups: Iterable[Sequence[Place]],
        weights: Mapping[str, int],
        vectors: Mapping[str, int],
        staying: Mapping[str, str],
        readers: Mapping[str, Sequence[Place | None]] | None = None,
    ) -> None:
        self.staying = dict(staying)
        parents: dict[Place, Place] = {}

        def root(place: Place) -> Place:
            while (parent := parents[place]) != place:
                parents[place] = parents[parent]
                place = parent
            return place

        for places in groups:
            for place in places:
                parents.setdefault(place, place)
                parents[root(place)] = root(places[0])
        fixed = {root(place) for place in parents if place[0] in staying}
        numbers: dict[Place, int] = {}
        members: dict[int, list[str]] = {}
        self.units: dict[str, Tensor] = {}
        """Parameter -> the unit of each of its channels; -1 for channels that stay."""
        for name, size in {**weights, **vectors}.items():
            units = [-1] * size
            for place in ((name, channel) for channel in range(size)):
                if place in parents and (first := root(place)) not in fixed:
                    units[place[1]] = unit = numbers.setdefault(first, len(numbers))
                    if name in weights and name not in members.setdefault(unit, []):
                        members[unit].append(name)
            self.units[name] = torch.tensor(units)
        self.inputs: dict[str, Tensor] = {}
        """Weight -> the unit that each of its inputs reads; -1 for channels that stay."""
        for name, read in (readers or {}).items():
            found = [-1 if place is None or place not in parents else numbers.get(root(place), -1) for place in read]
            self.inputs[name] = torch.tensor(found)
        self.vectors = list(vectors)
        """Names of biases and norms."""
        shared: dict[tuple[str, ...], list[int]] = {}
        for unit, names in members.items():
            shared.setdefault(tuple(names), []).append(unit)
        self.pools = [(names, torch.tensor(units)) for names, units in shared.items()]
        """Units, grouped by the weights they belong to."""
        self.count = len(numbers)
        """Number of units."""

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs besides the weights."""
        return {
            "units": dict(self.units),
            "vectors": list(self.vectors),
            "staying": dict(self.staying),
            "inputs": dict(self.inputs),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any], weights: Mapping[str, int]) -> Coupling | None:
        """Restore a coupling from its state; None if the state belongs to other weights.

        Args:
            state: the result of `state`.
            weights: weight -> its number of output channels.
        """
        units, vectors = state.get("units", {}), state.get("vectors", ())
        sizes = {name: len(one) for name, one in units.items()}
        if {name: size for name, size in sizes.items() if name not in vectors} != dict(weights):
            return None
        groups: dict[int, list[Place]] = {}
        for name, one in units.items():
            for channel, unit in enumerate(one.tolist()):
                if unit >= 0:
                    groups.setdefault(unit, []).append((name, channel))
        readers: dict[str, list[Place | None]] = {
            name: [groups[unit][0] if unit >= 0 else None for unit in one.tolist()]
            for name, one in state.get("inputs", {}).items()
        }
        return cls(groups.values(), weights, {name: sizes[name] for name in vectors}, state["staying"], readers)

    def mean(self, scores: Mapping[str, Tensor], read: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the score of each unit: the mean over the weights that contain it and those that read it.

        Args:
            scores: weight -> one score per channel.
            read: weight -> one score per input.
        """
        device = next(iter(scores.values())).device
        total, times = torch.zeros(self.count, device=device), torch.zeros(self.count, device=device)
        parts = [(self.units[name], score) for name, score in scores.items()]
        parts += [(self.inputs[name], score) for name, score in (read or {}).items()]
        for units, score in parts:
            free = units >= 0
            where = units[free].to(device)
            values = score.to(device)[free.to(device)].float()
            total.index_add_(0, where, values)
            times.index_add_(0, where, torch.ones_like(values))
        return total / times

    def spread(self, kept: Tensor, name: str) -> Tensor:
        """Return the mask of a parameter's channels from the mask of units."""
        units = self.units[name].to(kept.device)
        return kept[units.clamp(min=0)] | (units < 0)

    def gather(self, channels: Mapping[str, Tensor]) -> Tensor:
        """Return the mask of units from the masks of all weights' channels; the inverse of `spread`."""
        kept = torch.ones(self.count, dtype=torch.bool)
        for name, alive in channels.items():
            free = self.units[name] >= 0
            kept[self.units[name][free]] = alive.cpu()[free]
        return kept


class CoupledVectors:
    """Biases and norms of coupled channels: they are zero where a channel is removed, and are not counted.

    Args:
        coupling: which channels are coupled.
        parameters: the network's parameters, by name.
    """

    def __init__(self, coupling: Coupling, parameters: Mapping[str, nn.Parameter]) -> None:
        self.coupling = coupling
        self.parameters = {name: parameters[name] for name in coupling.vectors}
        self.masks = MaskSet(self.parameters)

    def follow(
        self,
        channels: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
        averages: Iterable[Mapping[str, nn.Parameter]],
    ) -> None:
        """Set the entries of removed channels to zero, also in optimizer states and averages.

        Args:
            channels: for each weight, which channels are kept.
            optimizers: the network's optimizers.
            averages: copies of the network's parameters.
        """
        units = self.coupling.gather(channels)
        self.masks.replace({name: self.coupling.spread(units, name) for name in self.parameters})
        for optimizer in optimizers:
            self.clear(optimizer)
        for copy in (self.parameters, *averages):
            self.masks.apply_({name: copy[name] for name in self.parameters})

    def clear(self, optimizer: Optimizer) -> None:
        """Set their optimizer state to zero."""
        for name, vector in self.parameters.items():
            clear_moments(optimizer, vector, self.masks.dropped(name))

    def silence(self) -> None:
        """Set their gradients to zero."""
        self.masks.apply_({name: vector.grad for name, vector in self.parameters.items()})

    def project(self) -> None:
        """Set them to zero."""
        self.masks.apply_(self.parameters)
