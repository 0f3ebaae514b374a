"""Metrics of masks: sparsity, overlap and churn between readings, and the share of weights that were ever active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sparse.core import Masks
from lightning_sparse.functional import (
    mask_churn,
    mask_overlap,
    mask_sparsity,
    over_parameterization_rate,
    zero_fraction,
)
from lightning_sparse.metrics.drawing import curve

__all__ = ["MaskChurn", "MaskMetric", "MaskOverlap", "OverParameterizationRate", "Sparsity"]

NamedMasks = Mapping[str, Tensor] | Masks
"""Masks by name, True = kept; a method's `masks` works."""


class MaskMetric(Metric):
    """A metric of masks that are the same on all ranks, so nothing is gathered."""

    full_state_update = True
    label = ""
    """The axis label of a plot."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"sync_on_compute": False, **options})

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Plot the current value, or a list of values as a curve; needs matplotlib.

        Args:
            val: readings to draw instead of the current one.
            ax: matplotlib axes to draw on.

        Returns:
            The figure and its axes.
        """
        return curve(self.compute() if val is None else val, self.label, ax)


class Sparsity(MaskMetric):
    """The fraction removed, measured twice: by the masks, and by the exact zeros among the weights they belong to.

    The two agree unless weights happen to be zero, as some are at the start, or something has changed masked weights.

    Args:
        options: of `torchmetrics.Metric`.

    Example:
        >>> sparsity = Sparsity()
        >>> sparsity.update({"fc": torch.tensor([True, True, True, False])}, {"fc": torch.tensor([0.0, 1.0, 2.0, 0.0])})
        >>> sparsity.compute()
        {'sparsity': 0.25, 'zeros': 0.5}
    """

    readings: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("readings", torch.zeros(2, dtype=torch.float64))

    def update(self, masks: NamedMasks, weights: Mapping[str, Tensor]) -> None:
        """Read the current masks and weights; weights without a mask do not count."""
        both = mask_sparsity(masks[name] for name in masks), zero_fraction(weights[name] for name in masks)
        self.readings = torch.tensor(both, dtype=torch.float64, device=self.device)

    def compute(self) -> dict[str, float]:
        return dict(zip(("sparsity", "zeros"), self.readings.tolist(), strict=True))

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Plot the current pair, or a list of pairs as two curves; needs matplotlib."""
        pairs = [self.compute()] if val is None else list(val)
        for name in ("zeros", "sparsity"):
            figure, ax = curve([pair[name] for pair in pairs], "sparsity", ax)
        ax.legend(["exact zeros", "masks"])
        return figure, ax


class MaskOverlap(MaskMetric):
    r"""The fraction of connections that are still present since the previous reading: $|A \cap B| / |A|$.

    Holds one byte per weight.

    Args:
        masks: the first reading.
        options: of `torchmetrics.Metric`.

    Example:
        >>> overlap = MaskOverlap({"fc": torch.tensor([True, True, False])})
        >>> overlap.update({"fc": torch.tensor([False, True, True])})
        >>> overlap.compute()
        tensor(0.5000)
    """

    label = "overlap"
    between: Callable[[Iterable[Tensor], Iterable[Tensor]], float] = staticmethod(mask_overlap)
    last: Tensor
    value: Tensor

    def __init__(self, masks: NamedMasks, **options: Any) -> None:
        super().__init__(**options)
        self.names = list(masks)
        self.add_state("last", _flat(masks, self.names))
        self.add_state("value", torch.tensor(self.between([self.last], [self.last])))

    def update(self, masks: NamedMasks) -> None:
        """Compare with the previous reading."""
        now = _flat(masks, self.names).to(self.device)
        self.value = torch.tensor(self.between([self.last], [now]), device=self.device)
        self.last = now

    def compute(self) -> Tensor:
        return self.value


class MaskChurn(MaskOverlap):
    r"""The fraction of connections that were added or removed since the previous reading: $1 - |A \cap B| / |A \cup B|$.

    Holds one byte per weight.

    Args:
        masks: the first reading.
        options: of `torchmetrics.Metric`.

    Example:
        >>> churn = MaskChurn({"fc": torch.tensor([True, True, False, False])})
        >>> churn.update({"fc": torch.tensor([False, True, False, True])})
        >>> churn.compute()
        tensor(0.6667)
    """

    label = "churn"
    between = staticmethod(mask_churn)


class OverParameterizationRate(MaskMetric):
    """In-time over-parameterization: the fraction of weights that were active at any reading.

    Holds one byte per weight. It sees only the readings it gets; methods of dynamic sparse training record every update
    themselves with `track_explored=True`.

    Source: Liu et al. 2021, "Do We Actually Need Dense Over-Parameterization?", https://arxiv.org/abs/2102.02887.

    Args:
        masks: the first reading.
        options: of `torchmetrics.Metric`.

    Example:
        >>> rate = OverParameterizationRate({"fc": torch.tensor([True, False, False, False])})
        >>> rate.update({"fc": torch.tensor([False, True, False, False])})
        >>> rate.compute()
        tensor(0.5000)
    """

    label = "ever active"
    ever: Tensor

    def __init__(self, masks: NamedMasks, **options: Any) -> None:
        super().__init__(**options)
        self.names = list(masks)
        self.add_state("ever", _flat(masks, self.names))

    def update(self, masks: NamedMasks) -> None:
        """Add the current masks."""
        self.ever = self.ever | _flat(masks, self.names).to(self.device)

    def compute(self) -> Tensor:
        return torch.tensor(over_parameterization_rate([self.ever]), device=self.device)


def _flat(masks: NamedMasks, names: list[str]) -> Tensor:
    return torch.cat([masks[name].flatten() for name in names])
