"""Move connections within a layer: some are dropped, and exactly the same number is grown."""

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
    """The start value throughout."""
    return start


DropScheduleName = Literal["cosine", "constant"]
"""The names in `DROP_SCHEDULES`."""

DROP_SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "constant": held}
r"""How the dropped fraction changes. The cosine is that of RigL, $\frac{\alpha}{2}(1 + \cos(\pi t / T))$ for an end at 0.

Source: Evci et al. 2020, "Rigging the Lottery", https://arxiv.org/abs/1911.11134, section 3.2.
"""


def drop_count(kept: int, fraction: float) -> int:
    """How many of the kept connections are dropped: the fraction, rounded down.

    Example:
        >>> drop_count(10, 0.3), drop_count(100, 0.29), drop_count(3, 0.3)
        (3, 29, 0)
    """
    return math.floor(fraction * kept + 1e-6)


def growth_score(gradient: Tensor, dim: Dims = 0) -> Tensor:
    r"""The magnitude of the gradient divided by its norm in each output, so that outputs are comparable.

    $$ |g_{oi}| \Big/ \Big(\sum_j g_{oj}^2\Big)^{1/2} $$

    Source: the official repository of Li et al. 2021, https://arxiv.org/abs/2103.16013. Its code takes the signed gradient;
    its figure, and this function, take the magnitude.

    Args:
        gradient: of all entries, dropped ones included.
        dim: that counts the outputs.

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
    """The mask after `count` connections have been dropped and as many grown.

    Of the connections in the mask, those with the highest `keep` survive. Of all others, those just dropped included, the
    ones with the highest `grow` join them. Among equal scores the earlier entry comes first.

    Sources: Mocanu et al. 2018, https://arxiv.org/abs/1707.04780 (grown at random); Evci et al. 2020,
    https://arxiv.org/abs/1911.11134, algorithm 1 (grown by gradient).

    Args:
        mask: True = kept.
        keep: how much each connection matters, of the mask's shape.
        grow: how much each entry would gain by becoming one, finite.
        count: from 0 to the number of connections.
        kept: that number, where it is known; of all ranks together.
        protect: gives the score inf to entries that a structure such as n of m cannot do without; called with `grow`, in
            which survivors have that score already.
        spread: how these tensors are spread over ranks; None if this rank holds all of them.

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
    # A NaN is both the smallest and the largest.
    bad = ~torch.stack(grow.aminmax()).isfinite().all() if grow.numel() else torch.zeros((), device=grow.device).bool()
    if bool(bad) if spread is None else spread.any([bad]):
        raise ValueError("A growth score is NaN or infinite, so nothing can be ranked; look for a diverged loss.")
    # Only what is kept is ranked for staying: at 90 % sparsity a tenth of all.
    candidates = None if spread is None else spread.chosen([mask], [kept])
    survivors = torch.zeros_like(mask).masked_scatter_(mask, top_k_masks([keep[mask]], kept - count, candidates)[0])
    order = grow.masked_fill(survivors, torch.inf)
    return top_k_masks([order if protect is None else protect(order)], kept, spread)[0]
