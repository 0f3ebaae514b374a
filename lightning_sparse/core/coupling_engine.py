"""The question of which channels can only leave together, in a form that any tracer of networks can answer."""

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
    """A part of a network that goes with outputs of a layer, the root.

    Args:
        name: of a module; None for an operation, a parameter that is added, or an output of the network.
        produces: whether by its outputs, or by its inputs; of a norm or an activation, and of a depthwise layer, both.
        channels: where they are in it, by output of the root.
        stays: why they cannot leave; empty if they can as far as the engine knows. That weights are shared, that a module
            of no known kind holds them, or that they do not match its size is checked by who asks.
    """

    name: str | None
    produces: bool
    channels: Positions
    stays: str = ""


class CouplingEngine(Protocol):
    """What finds out which channels of a network are coupled."""

    def __call__(self, network: nn.Module, call: Call) -> Mapping[str, Sequence[Member]]:
        """Of each layer that the outputs depend on, by name, what goes with its outputs: itself, and what reads them.

        Args:
            network: in evaluation mode; its parameters require gradients.
            call: that fits it.

        Raises:
            ValueError: if it cannot be traced.
        """
        ...
