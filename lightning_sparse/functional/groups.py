"""Groups of m neighbors along one dimension: the n best of each, and what S-STE makes of them.

Each entry meets the others of its group by shifts of the whole array by 1 to m - 1 neighbors. Shifted arrays are contiguous,
whatever m is, and what crosses the border of a group is left out. On a CPU this works on parts that stay in the cache, and
with numpy, whose comparisons take a tenth of the time of torch's there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["group_soft_threshold", "least_squares_scale", "n_m_mask", "show_softly_"]

_CHUNK = 1 << 15  # entries that stay in the cache of a core, together with what is computed from them


def n_m_mask(score: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """Keep the n highest of every m consecutive entries along one dimension.

    For `dim=1` these are consecutive inputs of one output, in linear layers and convolutions alike
    (for convolutions at the same kernel position), the layout that sparse tensor cores expect.
    Among equal scores the earlier entry survives.

    Args:
        score: higher survives.
        n: how many to keep, 0 < n < m.
        m: the group; must divide the size of `dim`.
        dim: along which to group.

    Raises:
        ValueError: if m does not divide the size of `dim`.

    Example:
        >>> n_m_mask(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 2, 4)
        tensor([[False,  True, False,  True]])
    """
    if score.shape[dim] % m:
        raise ValueError(f"{m} does not divide the {score.shape[dim]} inputs.")
    mask = torch.empty_like(score, dtype=torch.bool)
    for groups, (values, kept) in _parts(m, dim, [score], [mask]):
        groups.choose(n, values, kept)
    return mask


def group_soft_threshold(weight: Tensor, kept: Tensor, m: int, dim: int = 1) -> Tensor:
    r"""What is kept of every m consecutive entries, made smaller by the largest magnitude t that is dropped there.

    $$ S(w) = sign(w) \, \max(|w| - t, 0) $$

    for all entries, so dropped ones are zero. Where two entries change places in the order of their group, S does not jump,
    as the hard mask does: both are zero there.

    Source: Hu, Zhu and Chen 2024, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training",
    https://arxiv.org/abs/2409.09099.

    Args:
        weight: dense.
        kept: the mask of the largest of every group.
        m: the size of a group.
        dim: along which to group.

    Example:
        >>> weight = torch.tensor([[-4.0, 1.0, 2.0, 3.0]])
        >>> group_soft_threshold(weight, torch.tensor([[True, False, False, True]]), 4)
        tensor([[-2.,  0.,  0.,  1.]])
    """
    shown = torch.empty_like(weight)
    for groups, (values, chosen, result) in _parts(m, dim, [weight, kept], [shown]):
        result[:] = groups.soften(values, abs(values), chosen)
    return shown


def show_softly_(
    weight: Tensor, dense: Tensor, kept: Tensor, shown: Tensor, scale: Tensor, m: int, dim: int = 1, n: int | None = None
) -> None:
    """Replace a weight by `group_soft_threshold` of it, times a factor; all in one pass over the memory.

    Args:
        weight: the dense weight; receives what is shown of it.
        dense: receives the dense weight, in float32 or wider, the precision of the result.
        kept: the mask of the largest of every group.
        shown: receives what is shown.
        scale: the factor.
        m: the size of a group.
        dim: along which to group.
        n: how many of every group are the largest now; `kept` receives their mask. None leaves it as it is.

    Example:
        >>> weight, kept = torch.tensor([[-4.0, 1.0, 2.0, 3.0]]), torch.zeros(1, 4, dtype=torch.bool)
        >>> dense, shown = torch.zeros(2, 1, 4)
        >>> show_softly_(weight, dense, kept, shown, torch.tensor(2.0), 4, n=2)
        >>> weight, kept
        (tensor([[-4.,  0.,  0.,  2.]]), tensor([[ True, False, False,  True]]))
    """
    factor: Any = scale.item() if scale.is_cpu else scale
    for groups, (whole, values, chosen, seen) in _parts(m, dim, [], [dense, weight, kept, shown]):
        whole[:] = values
        size = abs(whole)
        if n is not None:
            groups.choose(n, size, chosen)
        softened = groups.soften(whole, size, chosen)
        softened *= factor
        seen[:] = softened
        values[:] = seen


def least_squares_scale(weight: Tensor, shown: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    r"""The factor by which something comes nearest to a weight: $\beta = w^\top s / s^\top s$; 1 if that is zero.

    Args:
        weight: w.
        shown: s.
        total: the sum over all ranks of what this one has, where it holds a part of the weight.

    Example:
        >>> least_squares_scale(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
        tensor(1.5000)
    """
    norm = total(shown.square().sum())
    return torch.where(norm > 0, total((weight * shown).sum()) / norm, torch.ones_like(norm))


class _Groups:
    """Arrays of whole groups, flat, in the number that stays in the cache.

    Args:
        use: the library of the arrays, numpy or torch.
        m: the size of a group.
        apart: the distance between neighbors.
        place: the place of each entry in its group.
        like: an array of the dtype in which values are computed.
    """

    def __init__(self, use: Any, m: int, apart: int, place: Any, like: Any) -> None:
        self.use, self.m, self.apart, self.place = use, m, apart, place
        self._like = like
        steps, reach = [], 1  # in which the largest of m neighbors is found: 1 and 2 for m = 4
        while reach < m:
            steps.append(min(reach, m - reach) * apart)
            reach += steps[-1] // apart
        self.steps = steps

    @cached_property
    def zero(self) -> Any:
        return self.use.zeros_like(self._like)

    @cached_property
    def first(self) -> Any:
        """All bits where a group begins, none elsewhere."""
        return self.bits(self.zero) - (self.place == 0).view(self.use.uint8)

    @cached_property
    def within(self) -> list[tuple[int, Any]]:
        """Every distance to a neighbor, and which entries have one in their group at that distance."""
        distances = range(1, self.m)
        return [(step * self.apart, self.place[: -step * self.apart] < self.m - step) for step in distances]

    def bits(self, values: Any) -> Any:
        return values.view(getattr(self.use, f"int{8 * values.itemsize}"))

    def choose(self, n: int, score: Any, kept: Any) -> None:
        """Write the mask of the n highest of each group to `kept`."""
        # Every pair of a group has one winner. So an entry wins as often as there are earlier ones, plus the times that it
        # beats a later one, minus the times that an earlier one beats it.
        size = len(score)
        wins = self.use.zeros_like(self.place[:size])
        wins += self.place[:size]
        for ahead, within in self.within:
            beats = score[:-ahead] >= score[ahead:]
            beats &= within[: size - ahead]
            wins[:-ahead] += beats.view(self.use.uint8)
            wins[ahead:] -= beats.view(self.use.uint8)
        self.use.greater_equal(wins, self.m - n, out=kept)

    def soften(self, values: Any, size: Any, kept: Any) -> Any:
        """Return all values, reduced by the largest size that is dropped in their group; overwrites `size`."""
        use, largest, other, zero = self.use, size, self.use.empty_like(size), self.zero[: len(size)]
        bits = self.bits(largest)
        bits &= kept.view(use.int8) - 1  # zero where kept: exact for infinite values too
        for ahead in self.steps:
            use.maximum(largest[:-ahead], largest[ahead:], out=other[:-ahead])
            largest, other = other, largest
        bits = self.bits(largest)
        bits &= self.first[: len(size)]
        for ahead in self.steps:  # from the first of each group to the others
            use.maximum(largest[:-ahead], largest[ahead:], out=other[ahead:])
            other[:ahead] = largest[:ahead]
            largest, other = other, largest
        # A sum of two, of which at least one is +0.0, so it is never a negative zero.
        use.add(values, largest, out=other)
        use.subtract(values, largest, out=largest)
        use.maximum(largest, zero, out=largest)
        use.minimum(other, zero, out=other)
        largest += other
        return largest


def _parts(m: int, dim: int, given: Sequence[Tensor], results: Sequence[Tensor]) -> Iterator[tuple[_Groups, list[Any]]]:
    """Yield tensors of one shape as flat arrays in the order of the first result's memory, part by part.

    Args:
        m: the size of a group; parts hold whole groups.
        dim: along which to group.
        given: are only read.
        results: are written to as well; values are computed in the dtype of the first one that has floating point.
    """
    like = results[0]
    if not like.numel():
        return
    order = sorted(range(like.ndim), key=lambda axis: like.stride()[axis], reverse=True)
    apart = prod(like.shape[axis] for axis in order[order.index(dim % like.ndim) + 1 :])
    group, both = m * apart, [*given, *results]
    fits_numpy = like.is_cpu and all(tensor.dtype in (torch.bool, torch.float32, torch.float64) for tensor in both)
    size = group * max(_CHUNK // group, 1) if like.is_cpu else like.numel()
    dtype = next((tensor.dtype for tensor in (*results, *given) if tensor.dtype.is_floating_point), torch.float32)
    make = _groups if like.is_cpu else _groups.__wrapped__  # a part of a weight on a CPU, a whole one elsewhere
    groups = make(fits_numpy, m, apart, size, dtype, like.device)
    ordered = [tensor.detach().permute(order) for tensor in both]
    flat = [tensor.contiguous().view(-1) for tensor in ordered]
    arrays = [tensor.numpy() if fits_numpy else tensor for tensor in flat]
    for start in range(0, like.numel(), size):
        yield groups, [array[start : start + size] for array in arrays]
    for tensor, array in zip(ordered[len(given) :], flat[len(given) :], strict=True):
        if not tensor.is_contiguous():
            tensor.copy_(array.view(tensor.shape))


@lru_cache(maxsize=32)
def _groups(fits_numpy: bool, m: int, apart: int, size: int, dtype: torch.dtype, device: torch.device) -> _Groups:
    place = torch.arange(m, dtype=torch.uint8 if m <= 256 else torch.int32, device=device)
    place, like = place.repeat_interleave(apart).repeat(size // (m * apart)), torch.empty(size, dtype=dtype, device=device)
    return _Groups(np, m, apart, place.numpy(), like.numpy()) if fits_numpy else _Groups(torch, m, apart, place, like)
