"""What a weight means to the loss, or to the flow through the network, before training: scores from derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["connection_sensitivity", "gradient_flow", "hessian_times"]


def connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""How fast a scalar moves when a weight is scaled: $|w \, \partial L / \partial w|$.

    With the gradient of the loss this is SNIP; with that of the summed output of the network with all weights made
    positive, on an input of ones, it is SynFlow.

    Sources: Lee et al. 2019, "SNIP: Single-shot network pruning based on connection sensitivity",
    https://arxiv.org/abs/1810.02340; Tanaka et al. 2020, "Pruning neural networks without any data by iteratively
    conserving synaptic flow", https://arxiv.org/abs/2006.05467.

    Example:
        >>> connection_sensitivity(torch.tensor([-2.0, 0.5]), torch.tensor([3.0, 4.0]))
        tensor([6., 2.])
    """
    return _wide(weight.detach() * gradient.detach()).abs()


def gradient_flow(weight: Tensor, product: Tensor) -> Tensor:
    r"""How much a weight holds up the gradient norm: $w \,(H g)$, of either sign.

    To first order, removing the weight changes $g^\top g$ by $-2\,w\,(Hg)$, so what would reduce the flow most scores
    highest, and what stands in its way lowest. The paper writes the score with the opposite sign and removes the highest.

    Source: Wang, Zhang and Grosse 2020, "Picking winning tickets before training by preserving gradient flow",
    https://arxiv.org/abs/2002.07376.

    Args:
        weight: w.
        product: of the Hessian of the loss with its gradient, from `hessian_times`.

    Example:
        >>> gradient_flow(torch.tensor([-2.0, 0.5]), torch.tensor([3.0, 4.0]))
        tensor([-6.,  2.])
    """
    return _wide(weight.detach() * product.detach())


def hessian_times(loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian of a loss times a vector, by differentiating the gradient's inner product with it.

    The graph is walked to all its leaves, which then hold a `grad`: functions without a second derivative raise only there,
    while a walk to the weights alone would pass them by with a wrong result.

    Args:
        loss: with a graph.
        weights: by which to differentiate; leaves.
        vectors: one per weight; constants.

    Raises:
        RuntimeError: if something in the graph has no second derivative.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_times((x**3).sum(), [x], [torch.tensor([1.0, 10.0])])
        [tensor([  6., 120.])]
    """
    first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    inner = [(gradient * vector).sum() for gradient, vector in zip(first, vectors, strict=True) if gradient is not None]
    for weight in weights:
        weight.grad = None
    torch.stack(inner).sum().backward()  # type: ignore[no-untyped-call]
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]


def _wide(score: Tensor) -> Tensor:
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
