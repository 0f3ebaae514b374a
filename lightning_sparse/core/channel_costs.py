"""The cost of a network with only some of its channels: multiplications or parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_sparse.core.coupling import Coupling

__all__ = ["ChannelCosts"]


class ChannelCosts:
    r"""The cost of a network as a function of which units of coupled channels are kept.

    $$ C = C_0 + \sum_l c_l \, \frac{\text{outputs kept of } l}{\text{outputs of } l} \,
           \frac{\text{inputs kept of } l}{\text{inputs of } l} $$

    Args:
        coupling: which channels are coupled, and which layers read them.
        prices: the cost of each weight, bias and norm in the dense network.
        fixed: the cost that does not depend on channels.

    Example:
        >>> import torch
        >>> channels = [[("a", 0)], [("a", 1)]]
        >>> coupling = Coupling(channels, {"a": 2}, {}, {}, {"b": [("a", 0), ("a", 1)]})
        >>> costs = ChannelCosts(coupling, {"a": 10, "b": 100}, fixed=1)
        >>> costs.dense, costs(torch.tensor([True, False]))
        (111, 56)
    """

    def __init__(self, coupling: Coupling, prices: Mapping[str, int], fixed: int = 0) -> None:
        self._layers = [(price, coupling.units.get(name), coupling.inputs.get(name)) for name, price in prices.items()]
        self._fixed = fixed
        self.dense = fixed + sum(prices.values())
        """The cost of the dense network."""

    def __call__(self, kept: Tensor) -> int:
        """Return the cost with only these units.

        Args:
            kept: a boolean for each unit, on the CPU.
        """
        shares = [price * _share(outputs, kept) * _share(inputs, kept) for price, outputs, inputs in self._layers]
        return self._fixed + round(sum(shares))


def _share(units: Tensor | None, kept: Tensor) -> float:
    """Return the fraction of channels left, from the unit of each channel."""
    if units is None or not len(units):
        return 1.0
    return float((kept[units.clamp(min=0)] | (units < 0)).double().mean()) if len(kept) else 1.0
