"""The similarity of a model's layers on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sparse.functional import cka_from_hsic, linear_hsic_matrix
from lightning_sparse.metrics.drawing import figure_of

__all__ = ["CKA"]


class CKA(Metric):
    r"""Linear centered kernel alignment of all pairs of layers, over any number of batches.

    HSIC is summed over batches and ranks, and a single ratio is taken at the end, so the value hardly depends on the batch
    size. A batch of n samples costs n^2 times the size of all features; only one number per pair is stored. Batches of fewer
    than four samples are uninformative.

    Source: Nguyen et al. 2020, "Do Wide and Deep Networks Learn the Same Things?", https://arxiv.org/abs/2010.15327,
    equations 2 and 3.

    Args:
        names: names of the layers, in the order of the features.
        unbiased: use the unbiased estimator of HSIC.
        options: options of `torchmetrics.Metric`.

    Example:
        >>> metric = CKA(["a", "b"])
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [2.0], [5.0]])
        >>> metric.update([x, -2 * x])
        >>> metric.update([x, x**2])
        >>> metric.compute()
        tensor([[1.0000, 0.8105],
                [0.8105, 1.0000]])
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False
    hsic: Tensor

    def __init__(self, names: Sequence[str], unbiased: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if len(names) < 2:
            raise ValueError(f"names={list(names)} must name at least two layers: a similarity is between two.")
        self.names, self.unbiased = list(names), unbiased
        self.add_state("hsic", torch.zeros(len(self.names), len(self.names)), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, features: Sequence[Tensor]) -> None:
        """Add a batch.

        Args:
            features: one tensor per name, all of the same samples.
        """
        if len(features) != len(self.names):
            raise ValueError(f"CKA of {len(self.names)} layers got {len(features)} features.")
        self.hsic = self.hsic + linear_hsic_matrix(features, self.unbiased).to(self.hsic)

    def compute(self) -> Tensor:
        return cka_from_hsic(self.hsic)

    def plot(self, val: Tensor | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw a heat map, layer by layer; needs matplotlib, and changes none of its global state.

        Args:
            val: a matrix to draw instead of the current one.
            ax: matplotlib axes to draw on.

        Returns:
            The figure and its axes.
        """
        matrix = (self.compute() if val is None else val).detach().float().cpu()
        side = 2.0 + 0.28 * len(self.names)
        figure, ax = figure_of(ax, side + 0.6, side)
        image = ax.imshow(matrix.numpy(), vmin=min(0.0, float(matrix.min())), vmax=1.0, cmap="magma")
        ticks = range(len(self.names))
        ax.set_xticks(ticks, self.names, rotation=90, fontsize="x-small")
        ax.set_yticks(ticks, self.names, fontsize="x-small")
        figure.colorbar(image, ax=ax, label="CKA")
        return figure, ax
