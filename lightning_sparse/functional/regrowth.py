"""Move connections within a layer: drop some, and grow exactly the same number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_sparse.functional.dims import Dims
from lightning_sparse.functional.lp_sphere import lp_normalize
from lightning_sparse.functional.order import top_k_masks
from lightning_sparse.functional.schedules import Schedule, cosine
from lightning_sparse.functional.spread import Spread

__all__ = ["DROP_SCHEDULES", "DropScheduleName", "drop_count", "growth_score", "held", "regrow"]


def held(progress: float, start: float, end: float) -> float:
    """Keep the start value throughout."""
    return start


DropScheduleName = Literal["cosine", "constant"]
"""The names in `DROP_SCHEDULES`."""

DROP_SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "constant": held}
r"""Schedules of the dropped fraction. The cosine is RigL's, $\frac{\alpha}{2}(1 + \cos(\pi t / T))$ if the end value is 0.

Source: Evci et al. 2020, "Rigging the Lottery", https://arxiv.org/abs/1911.11134, section 3.2.
"""


def drop_count(kept: int, fraction: float) -> int:
    """Return how many of the kept connections are dropped: the fraction of them, rounded down.

    Example:
        >>> drop_count(10, 0.3), drop_count(100, 0.29), drop_count(3, 0.3)
        (3, 29, 0)
    """
    return math.floor(fraction * kept + 1e-6)


def growth_score(gradient: Tensor, dim: Dims = 0) -> Tensor:
    r"""Return the gradient's magnitude divided by its norm over each output, so that outputs are comparable.

    $$ |g_{oi}| \Big/ \Big(\sum_j g_{oj}^2\Big)^{1/2} $$

    Source: the official repository of Li et al. 2021, https://arxiv.org/abs/2103.16013. Its code uses the signed gradient;
    its figure, and this function, use the magnitude.

    Args:
        gradient: the gradient of all entries, including dropped ones.
        dim: the dimension of the outputs.

    Example:
        >>> growth_score(torch.tensor([[3.0, -4.0], [300.0, 400.0]]))
        tensor([[0.6000, 0.8000],
                [0.6000, 0.8000]])
    """
    return lp_normalize(gradient, 2.0, dim).abs_()


def regrow(
    mask: Tensor,
    keep: Tensor,
    grow: Tensor,
    count: int,
    kept: int | None = None,
    protect: Callable[[Tensor], Tensor] | None = None,
    spread: Spread | None = None,
) -> Tensor:
    """Return the mask after `count` connections have been dropped and the same number grown.

    The connections in the mask with the highest `keep` survive. Of all other entries, including those just dropped, the ones
    with the highest `grow` become connections. Ties go to the earlier entry.

    Sources: Mocanu et al. 2018, https://arxiv.org/abs/1707.04780 (grown at random); Evci et al. 2020,
    https://arxiv.org/abs/1911.11134, algorithm 1 (grown by gradient).

    Args:
        mask: True = kept.
        keep: scores of the connections, in the mask's shape; the lowest are dropped.
        grow: finite scores of all entries; the highest of those that are not connections are grown.
        count: number of connections to drop, from 0 to all of them.
        kept: the number of connections on all ranks together, if known.
        protect: sets the score to inf for entries that a structure such as n of m must keep; called with `grow`, where
            survivors already have this score.
        spread: how these tensors are distributed over ranks; None if this rank holds all of them.

    Raises:
        ValueError: if the count is out of range, a score is NaN, or `grow` is infinite.

    Example:
        >>> mask = torch.tensor([True, True, True, False, False])
        >>> regrow(mask, torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 2.0, 3.0]), 1)
        tensor([ True, False,  True, False,  True])
    """
    if kept is None:
        kept = int(mask.count_nonzero()) if spread is None else spread.sums([mask.count_nonzero()])[0]
    if not 0 <= count <= kept:
        raise ValueError(f"count={count} connections cannot be dropped where there are {kept}; give 0 <= count <= {kept}.")
    if count == 0:
        return mask.clone()
    # aminmax returns NaN for both if any entry is NaN.
    bad = ~torch.stack(grow.aminmax()).isfinite().all() if grow.numel() else torch.zeros((), device=grow.device).bool()
    if bool(bad) if spread is None else spread.any([bad]):
        raise ValueError("A growth score is NaN or infinite, so nothing can be ranked; look for a diverged loss.")
    # Only connections are ranked for survival: at 90% sparsity a tenth of all entries.
    candidates = None if spread is None else spread.chosen([mask], [kept])
    places = mask.flatten().nonzero().squeeze(1)  # faster than to select and to scatter by the mask
    survivors = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    survivors[places[top_k_masks([keep.flatten()[places]], kept - count, candidates)[0]]] = True
    order = torch.where(survivors.view(mask.shape), torch.inf, grow)
    return top_k_masks([order if protect is None else protect(order)], kept, spread)[0]
