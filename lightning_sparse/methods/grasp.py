"""GraSP: gradient flow at initialization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sparse.families.pruning_at_init import PruningAtInitOnData
from lightning_sparse.functional import gradient_flow, hessian_times

__all__ = ["GraSP"]


@final
class GraSP(PruningAtInitOnData):
    r"""Before the first batch, keep the weights that sustain the gradient norm; then train with a fixed mask.

    $$ s = w \, (H g), \qquad g = \nabla L(w), \quad H = \nabla^2 L(w) $$

    at the initial weights, on `batches` batches of the training set. Costs two passes over these batches, once; the second
    computes second derivatives, for which attention runs without its fused kernels. Meanwhile it needs more than twice the
    memory of a training step, because a gradient can be differentiated only while its own graph is kept.

    Source: Wang, Zhang and Grosse 2020, "Picking winning tickets before training by preserving gradient flow",
    https://arxiv.org/abs/2002.07376. The temperature by which the paper divides the logits is left to the user's loss here.

    For the arguments see `PruningAtInitOnData`.

    Raises:
        ValueError: at the start of fit, if the model has no second derivatives.

    Example:
        >>> GraSP(sparsity=0.9, batches=4).label
        'GraSP'
    """

    def choose_masks(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            gradients = self.mean_over_data(self.gradient)

            def curvature(twin: LightningModule, loss: Tensor) -> Iterable[Tensor]:
                try:
                    return hessian_times(loss, self.twin_weights(twin), gradients)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise ValueError(
                        f"{self.label} needs second derivatives of the loss, which this model does not have; replace the "
                        f"layer "
                        f"that lacks them, or use SNIP ({error})."
                    ) from error

            products = self.mean_over_data(curvature)
        scores = [gradient_flow(w, p) for w, p in zip(self.weights.values(), products, strict=True)]
        self.keep_best(scores)
