"""Metrics of masks: how dense each layer is, how much of a mask is left, how much has ever been tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sparse.core import MaskSet
from lightning_sparse.functional import layer_density, mask_overlap, over_parameterization_rate

__all__ = ["LayerDensity", "MaskOverlap", "OverParameterizationRate"]

Masks = Mapping[str, Tensor] | MaskSet
"""Masks by name, True = kept; a method's `masks` will do."""


class _MaskMetric(Metric):
    """A metric of masks that all ranks share, so nothing is gathered from them."""

    full_state_update = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"sync_on_compute": False, **options})


class LayerDensity(_MaskMetric):
    """The fraction of each layer's entries that are in effect, at the latest reading.

    Give it masks for what is kept, or weights for what is not zero.

    Args:
        masks: of the layers to be read.
        options: of `torchmetrics.Metric`.

    Example:
        >>> masks = {"fc": torch.tensor([True, True, False, False])}
        >>> density = LayerDensity(masks)
        >>> density.update(masks)
        >>> density.compute()
        {'fc': 0.5}
    """

    densities: Tensor

    def __init__(self, masks: Masks, **options: Any) -> None:
        super().__init__(**options)
        self.names = list(masks)
        self.add_state("densities", torch.ones(len(self.names), dtype=torch.float64))

    def update(self, masks: Masks) -> None:
        """Read the masks, or the weights, as they are now."""
        densities = layer_density({name: masks[name] for name in self.names})
        self.densities = torch.tensor(list(densities.values()), dtype=torch.float64, device=self.device)

    def compute(self) -> dict[str, float]:
        return dict(zip(self.names, self.densities.tolist(), strict=True))


class MaskOverlap(_MaskMetric):
    r"""The fraction of connections that are still there since the reading before: $|A \\cap B| / |A|$.

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

    last: Tensor
    overlap: Tensor

    def __init__(self, masks: Masks, **options: Any) -> None:
        super().__init__(**options)
        self.names = list(masks)
        self.add_state("last", _flat(masks, self.names))
        self.add_state("overlap", torch.ones(()))

    def update(self, masks: Masks) -> None:
        """Compare with the reading before."""
        now = _flat(masks, self.names).to(self.device)
        self.overlap = torch.tensor(mask_overlap([self.last], [now]), device=self.device)
        self.last = now

    def compute(self) -> Tensor:
        return self.overlap


class OverParameterizationRate(_MaskMetric):
    """In-time over-parameterisation: the fraction of weights that were active at any reading.

    Holds one byte per weight. Sees what it is shown: the methods of dynamic sparse training take part in every update
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

    ever: Tensor

    def __init__(self, masks: Masks, **options: Any) -> None:
        super().__init__(**options)
        self.names = list(masks)
        self.add_state("ever", _flat(masks, self.names))

    def update(self, masks: Masks) -> None:
        """Add the masks as they are now."""
        self.ever = self.ever | _flat(masks, self.names).to(self.device)

    def compute(self) -> Tensor:
        return torch.tensor(over_parameterization_rate([self.ever]), device=self.device)


def _flat(masks: Masks, names: list[str]) -> Tensor:
    return torch.cat([masks[name].flatten() for name in names])
