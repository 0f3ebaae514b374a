"""Scores of how much each weight matters. A score has the shape of its weight; higher survives."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "connection_sensitivity",
    "gradient_flow",
    "hashed_score",
    "hessian_times",
    "magnitude",
    "random_generator",
    "random_score",
]


def magnitude(weight: Tensor) -> Tensor:
    """Return the absolute value of every weight, in float32 or wider.

    Example:
        >>> magnitude(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])
    """
    return _wide(weight.detach().abs())


def random_generator(seed: int, step: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends only on its arguments.

    Every rank, device and resumed run draws the same numbers from it, regardless of the state of the global generators.

    Args:
        seed: the seed of the run.
        step: the step at which the numbers are drawn.
        name: the name of the parameter.
    """
    mixed = zlib.crc32(f"{seed}/{step}/{name}".encode())
    return torch.Generator().manual_seed((mixed << 32) | zlib.crc32(name.encode(), mixed))


def random_score(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return uniform random numbers in the shape of the weight, drawn on the CPU so that all devices agree.

    They are float64, which not every device supports: float32 has only 2^24 values in [0, 1), and ties would favor early
    entries.
    """
    return torch.rand(weight.shape, generator=generator, dtype=torch.float64)


def hashed_score(weight: Tensor, generator: torch.Generator, places: Tensor | None = None) -> Tensor:
    """Return random numbers in the shape of the weight, computed on its device from two keys that the generator draws.

    Integer arithmetic makes all devices agree, as with `random_score`, without drawing every number on the CPU: each
    entry's index and the two keys go through a hash (C. Wellons, "Prospecting for Hash Functions", lowbias32,
    https://nullprogram.com/blog/2018/07/31/). The result is float32 with 2^24 different values: fine enough for a random
    choice of entries, too coarse for anything else.

    Args:
        weight: the weight; only its shape and device matter.
        generator: draws the keys.
        places: the flat index of each entry if the tensor is a part of a weight; default: the entries in order.
    """
    first, second = torch.randint(-(1 << 31), 1 << 31, (2,), generator=generator).tolist()
    if places is None:
        value = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device).add_(first)
    else:
        value = places.to(torch.int32).add(first)
    # Right shifts of signed integers copy the sign bit; the bit masks clear it.
    value ^= (value >> 16) & 0xFFFF
    value *= 0x7FEB352D
    value ^= second
    value ^= (value >> 15) & 0x1FFFF
    value *= 0x846CA68B - (1 << 32)
    value ^= (value >> 16) & 0xFFFF
    return (value >> 8).float().view(weight.shape)


def connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    r"""Return how fast a scalar changes when a weight is scaled: $|w \, \partial L / \partial w|$.

    With the gradient of the loss, this is SNIP. With the gradient of the summed output of the network with all weights made
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
    r"""Return how much a weight contributes to the gradient norm: $w \,(H g)$, positive or negative.

    To first order, removing the weight changes $g^\top g$ by $-2\,w\,(Hg)$. Weights whose removal would reduce the gradient
    flow most score highest, and those whose removal would increase it most score lowest. The paper defines the score with
    the opposite sign and removes the highest.

    Source: Wang, Zhang and Grosse 2020, "Picking winning tickets before training by preserving gradient flow",
    https://arxiv.org/abs/2002.07376.

    Args:
        weight: the weight w.
        product: the product of the loss's Hessian with its gradient, from `hessian_times`.

    Example:
        >>> gradient_flow(torch.tensor([-2.0, 0.5]), torch.tensor([3.0, 4.0]))
        tensor([-6.,  2.])
    """
    return _wide(weight.detach() * product.detach())


def hessian_times(loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return the Hessian of a loss times a vector, by differentiating the inner product of the gradient with the vector.

    The backward pass runs to all leaves of the graph, and each leaf gets a `grad`. Only this way do functions without a
    second derivative raise an error; a backward pass to the weights alone would skip them and return a wrong result.

    Args:
        loss: a loss with a graph.
        weights: leaf tensors to differentiate by.
        vectors: one vector per weight; they are constants.

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
