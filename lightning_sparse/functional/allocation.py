"""How a budget of weights is distributed over layers: uniform, Erdős-Rényi and its kernel form, by outliers.

Every function except `owl` takes the shapes of all layers, their overall density, and optionally the densities of some of
them, which count toward the same budget. It returns a density per layer; `counts` turns densities into integers that add up
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "allocate",
    "counts",
    "er",
    "erk",
    "erk_plus",
    "outlier_share",
    "owl",
    "uniform",
    "uniform_plus",
]

Shape = Sequence[int]
Allocation = Callable[[Sequence[Shape], float, Mapping[int, float], "Sequence[int] | None"], list[float]]


def uniform(
    shapes: Sequence[Shape],
    density: float,
    fixed: Mapping[int, float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[float]:
    """The same density in every layer that is not fixed.

    Example:
        >>> uniform([(100,), (100,)], 0.5, {0: 1.0})
        [1.0, 0.0]
    """
    return allocate([1.0] * len(shapes), shapes, density, fixed, sizes)


def uniform_plus(
    shapes: Sequence[Shape],
    density: float,
    fixed: Mapping[int, float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[float]:
    """Uniform with the first layer dense and at least a fifth of the last layer kept.

    Source: Gale et al. 2019, "The State of Sparsity in Deep Neural Networks", https://arxiv.org/abs/1902.09574.
    """
    fixed = {0: 1.0, **(fixed or {})}
    last = len(shapes) - 1
    densities = uniform(shapes, density, fixed, sizes)
    if last in fixed or densities[last] >= 0.2:
        return densities
    return uniform(shapes, density, {**fixed, last: 0.2}, sizes)


def er(
    shapes: Sequence[Shape],
    density: float,
    fixed: Mapping[int, float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[float]:
    r"""Erdős-Rényi: density proportional to $(n_{in} + n_{out}) / (n_{in} n_{out})$.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
    connectivity", https://arxiv.org/abs/1707.04780.
    """
    return allocate([(s[0] + s[1]) / (s[0] * s[1]) for s in shapes], shapes, density, fixed, sizes)


def erk(
    shapes: Sequence[Shape],
    density: float,
    fixed: Mapping[int, float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[float]:
    r"""Erdős-Rényi kernel: density proportional to the sum of a layer's dimensions over their product.

    Source: Evci et al. 2020, "Rigging the Lottery", https://arxiv.org/abs/1911.11134, section 3.1.

    Example:
        >>> [round(d, 3) for d in erk([(64, 3, 3, 3), (64, 64, 3, 3)], 0.1)]
        [0.788, 0.068]
    """
    return allocate([sum(s) / math.prod(s) for s in shapes], shapes, density, fixed, sizes)


def erk_plus(
    shapes: Sequence[Shape],
    density: float,
    fixed: Mapping[int, float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[float]:
    """ERK with the last layer dense.

    Source: Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning",
    https://arxiv.org/abs/2202.02643.
    """
    return erk(shapes, density, {len(shapes) - 1: 1.0, **(fixed or {})}, sizes)


def outlier_share(score: Tensor, threshold: float = 5.0) -> float:
    """The fraction of scores that are more than `threshold` times as large as their mean; dropped entries (-inf) count as 0.

    Example:
        >>> import torch
        >>> outlier_share(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 0.0, -torch.inf]))
        0.1
    """
    size = score.clamp(min=0)
    return float((size > threshold * size.mean()).double().mean())


def owl(
    shares: Sequence[float],
    density: float,
    sizes: Sequence[int],
    fixed: Mapping[int, float] | None = None,
    reach: float = 0.08,
) -> list[float]:
    r"""Outlier-weighed layer-wise sparsity: layers with more outliers among their scores keep more.

    $$ d_l = d + 2 \lambda \left(\hat s_l - \bar s\right), \qquad
       \hat s_l = \frac{s_l - \min s}{\max s - \min s} $$

    where the mean is weighted by layer sizes, so that the budget is met. No layer loses more than half of what it would
    keep, or of what it would lose, at a uniform density.

    Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity", https://arxiv.org/abs/2310.05175, as in the published code, but per layer where that treats the layers of a
    transformer block together.

    Args:
        shares: fraction of outliers in each layer, from `outlier_share`.
        density: overall density, in [0, 1].
        sizes: sizes of the layers.
        fixed: layer -> density, counted toward the same budget.
        reach: lambda.

    Example:
        >>> [round(d, 2) for d in owl([0.0, 0.01, 0.02], 0.5, [10, 10, 10])]
        [0.42, 0.5, 0.58]
    """
    fixed = fixed or {}
    free = [layer for layer in range(len(sizes)) if layer not in fixed]
    even = allocate([1.0] * len(sizes), [(size,) for size in sizes], density, fixed, sizes)
    room = sum(sizes[layer] for layer in free)
    if not room:
        return even
    least, most = min(shares[layer] for layer in free), max(shares[layer] for layer in free)
    relative = {layer: (shares[layer] - least) / (most - least) if most > least else 0.0 for layer in free}
    mean = sum(relative[layer] * sizes[layer] for layer in free) / room
    base = even[free[0]]
    span = max(max(mean, 1 - mean), 1e-12)
    step = min(2 * reach, base / 2 / span, (1 - base) / 2 / span)
    return [fixed[layer] if layer in fixed else base + step * (relative[layer] - mean) for layer in range(len(sizes))]


def allocate(
    raw: Sequence[float],
    shapes: Sequence[Shape],
    density: float,
    fixed: Mapping[int, float] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[float]:
    r"""Densities $\min(1, \epsilon\, raw_l)$ with the $\epsilon$ that uses the budget exactly.

    Args:
        raw: the proportions, positive.
        shapes: shapes of the layers.
        density: overall density, in [0, 1].
        fixed: layer -> density, counted toward the same budget.
        sizes: what the budget counts in each layer, if not its weights.

    Raises:
        ValueError: if the fixed layers alone need more than the budget, or leave more than the others can hold.
    """
    fixed = fixed or {}
    sizes = [math.prod(shape) for shape in shapes] if sizes is None else sizes
    budget = density * sum(sizes) - sum(share * sizes[layer] for layer, share in fixed.items())
    free = [layer for layer in range(len(sizes)) if layer not in fixed]
    room = sum(sizes[layer] for layer in free)
    if not -1e-6 <= budget <= room + 1e-6:
        raise ValueError(
            f"sparsity={round(1 - density, 10)} keeps {density * sum(sizes):,.0f} of {sum(sizes):,} weights, but the "
            f"layers whose sparsity is fixed, by layer_sparsity or by the allocation, keep "
            f"{density * sum(sizes) - budget:,.0f} and the others hold {room:,}; choose another sparsity or allocation, or "
            "free a layer."
        )
    # Dense layers are found starting with the most favored: once one stays under the cap, all later ones do.
    densities = dict(fixed)
    free.sort(key=lambda layer: -raw[layer])
    weight = [raw[layer] * sizes[layer] for layer in free]
    for position, layer in enumerate(free):
        remaining = sum(weight[position:])
        epsilon = max(budget, 0.0) / remaining if remaining else 0.0
        if epsilon * raw[layer] <= 1:
            densities.update({other: epsilon * raw[other] for other in free[position:]})
            break
        densities[layer] = 1.0
        budget -= sizes[layer]
    return [densities[layer] for layer in range(len(sizes))]


def counts(
    densities: Sequence[float],
    sizes: Sequence[int],
    total: int,
    low: Sequence[int] | None = None,
    high: Sequence[int] | None = None,
) -> list[int]:
    """Integer numbers of entries to keep, as close to their exact shares as the bounds allow, that add up to `total`.

    Without bounds each is within one of its exact share: the largest remainders are rounded up; ties go to the earlier
    layer.

    Args:
        densities: density of each layer, in [0, 1].
        sizes: entries of each layer.
        total: sum of the result.
        low: minimum for each layer; 0 by default.
        high: maximum for each layer; its size by default.

    Raises:
        ValueError: if the bounds leave no room for the total.

    Example:
        >>> counts([0.5, 0.5, 0.5], [3, 3, 4], 5)
        [2, 1, 2]
    """
    low = [0] * len(sizes) if low is None else low
    high = sizes if high is None else high
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"{total:,} entries cannot be kept where layers must keep {sum(low):,} and at most {sum(high):,}.")
    exact = [density * size for density, size in zip(densities, sizes, strict=True)]
    # A share that is an integer up to rounding errors is treated as one.
    whole = [max(lo, min(math.floor(share + 1e-6), hi)) for share, lo, hi in zip(exact, low, high, strict=True)]
    while missing := total - sum(whole):
        step, bound = (1, high) if missing > 0 else (-1, low)
        able = [layer for layer in range(len(whole)) if whole[layer] != bound[layer]]
        able.sort(key=lambda layer: (step * (whole[layer] - exact[layer]), layer))
        for layer in able[: abs(missing)]:
            room, share = abs(bound[layer] - whole[layer]), abs(missing) // len(able)
            whole[layer] += step * max(1, min(room, share))
    return whole


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "uniform+": uniform_plus,
    "er": er,
    "erk": erk,
    "erk+": erk_plus,
}
"""Allocations by the shapes of layers; `global` and `owl` are not among them, because they depend on scores."""
