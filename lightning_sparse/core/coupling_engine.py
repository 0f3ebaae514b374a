"""An interface for finding channels that can only be removed together; any tracer of networks can implement it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from lightning_sparse.core.calls import Call

__all__ = ["CouplingEngine", "Member", "Positions"]

Positions = dict[int, list[int]]
"""Positions in a layer, by the channel of the root that they are coupled with."""


@dataclass(frozen=True)
class Member:
    """A part of a network that is coupled with outputs of a layer, the root.

    Args:
        name: the name of a module; None for an operation, a parameter that is added, or an output of the network.
        produces: True if its outputs are coupled, False if its inputs are; norms, activations and depthwise layers appear
            with both.
        channels: positions in this part, by output of the root.
        stays: why the channels cannot be removed; empty if they can, as far as the engine knows. The caller checks whether
            weights are shared, the module is of an unknown kind, or the channels do not match its size.
    """

    name: str | None
    produces: bool
    channels: Positions
    stays: str = ""


class CouplingEngine(Protocol):
    """Finds the coupled channels of a network."""

    def __call__(self, network: nn.Module, call: Call) -> Mapping[str, Sequence[Member]]:
        """Return what is coupled with the outputs of each layer, by the layer's name: itself, and the layers that read them.

        Only layers that the network's outputs depend on are included.

        Args:
            network: the network, in evaluation mode; its parameters require gradients.
            call: a call that fits it.

        Raises:
            ValueError: if the network cannot be traced.
        """
        ...
