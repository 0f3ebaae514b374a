"""Exact order statistics over many tensors at once, without sorting and without one long copy.

On a CPU, a sample gives two values between which the rank must lie (Floyd and Rivest 1975). All entries are compared with
both, in chunks that stay in the cache, and the few in between are partitioned: several times faster than `torch.kthvalue`.

On a GPU and for shards, a float32 number is read as an integer that orders like it. Two histograms of 16 bits each then
find the exact value of any rank (a radix selection): the first says which 65,536th of the number
line holds it, the second which value in there; a float64 number takes four. On a GPU nothing is read back to the host.
With shards on several ranks, histograms are summed over ranks, and nothing else is sent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.functional.spread import Spread

__all__ = ["each_top_k_mask", "exact_count", "kth_smallest", "top_k_masks"]

_SAMPLE = 1 << 14  # entries; up to four times as many are partitioned at once
_BINS = 1 << 16
_CHUNK = 1 << 19  # bytes: stays in the cache between the passes over one chunk
_CUDA_CHUNK = 1 << 24  # a histogram on a GPU counts in float32, which is exact up to here
_PLACE_BITS = 12  # per pass over the places of ties: three passes of 16 KiB reach 64 billion entries


def exact_count(fraction: float, total: int) -> int:
    """The number of entries that a fraction of `total` is, rounded to the nearest: 0.29 of 100 is 29, never 28.

    Example:
        >>> exact_count(0.29, 100), exact_count(0.9, 1000), exact_count(0.5, 3)
        (29, 900, 2)
    """
    return int(fraction * total + 0.5)


def kth_smallest(values: Sequence[Tensor], k: int, magnitudes: bool = False, spread: Spread | None = None) -> Tensor:
    r"""The value of rank k (0-based) among all entries of all tensors, as a 0-d tensor on their device.

    Exact: it returns one of the given values, the same as sorting all of them and taking the k-th; it does not interpolate
    and has no size limit.

    Args:
        values: floating tensors on one device; NaN is not allowed. The result has the widest of their dtypes.
        k: from 0 to the number of entries - 1.
        magnitudes: rank the absolute values, without copying all of them.
        spread: how they are distributed over ranks; None if this rank holds all of them.

    Raises:
        ValueError: if there is no entry of that rank.

    Example:
        >>> kth_smallest([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 1)
        tensor(2.)
    """
    total = sum([value.numel() for value in values]) if spread is None else spread.numel
    if not 0 <= k < total:
        raise ValueError(f"k={k} is not a rank among {total} values; give 0 <= k < {total}.")
    dtype = _widest(values)
    ints, floats, width = (torch.int64, torch.float64, 64) if dtype == torch.float64 else (torch.int32, torch.float32, 32)
    if spread is None and values[0].is_cpu:
        found = _between_two(values, k, total, magnitudes, floats)
        if found is not None:
            return torch.tensor(found, dtype=dtype)
    bins = torch.arange(_BINS, device=values[0].device)
    prefix, rank = bins.new_zeros(()), bins.new_full((), k)
    for shift in range(width - 16, -1, -16):
        first = shift == width - 16
        counts = torch.zeros_like(bins)
        for bits in _bits(values if spread is None else spread.counted(values), magnitudes, floats, ints):
            counts += _histogram(bits >> shift if shift else bits, None if first else bits >> (shift + 16) == prefix)
        if spread is not None:
            counts = _summed(counts, spread)
        # Bit patterns of non-negative floats order like their values; those of negative floats, which are the upper half of
        # the first bins, order the other way round. So the bins are put in order, not the entries.
        if first:
            order = torch.cat([bins[_BINS // 2 :].flip(0), bins[: _BINS // 2]])
        else:
            order = torch.where(prefix < 0, bins.flip(0), bins)
        below = counts[order].cumsum(0)
        position = torch.searchsorted(below, rank, right=True)
        digit = order[position]
        rank = rank - (below[position] - counts[digit])  # the rank inside that bin
        prefix = torch.where(digit < _BINS // 2, digit, digit - _BINS) if first else (prefix << 16) | digit
    return prefix.to(ints).view(floats).to(dtype)


def top_k_masks(scores: Sequence[Tensor], keep: int, spread: Spread | None = None) -> list[Tensor]:
    """Boolean masks that keep exactly the `keep` highest scores over all tensors together.

    Among equal scores the earlier entry survives: earlier tensor first, then earlier position.

    Args:
        scores: tensors on one device; higher survives. -inf never survives while anything else can.
        keep: from 0 to the number of entries.
        spread: how scores are distributed over ranks; None if this rank holds all of them. Positions are those in the whole.

    Raises:
        ValueError: if `keep` is out of range or a score is NaN; on all ranks, if it is so on one.

    Example:
        >>> top_k_masks([torch.tensor([1.0, 5.0]), torch.tensor([1.0])], 2)
        [tensor([True, True]), tensor([False])]
    """
    return [*each_top_k_mask([*scores], keep, spread)]


def each_top_k_mask(scores: list[Tensor], keep: int, spread: Spread | None = None) -> Iterator[Tensor]:
    """The masks of `top_k_masks`, one after the other; each score is released before its mask is made.

    Args:
        scores: as there; the list is emptied.
        keep: as there.
        spread: as there.
    """
    total = sum([score.numel() for score in scores]) if spread is None else spread.numel
    if not 0 <= keep <= total:
        raise ValueError(f"keep={keep} is impossible among {total} entries; give 0 <= keep <= {total}.")
    flags = [score.amax().isnan() if score.numel() else torch.zeros((), device=score.device).bool() for score in scores]
    if any([bool(flag) for flag in flags]) if spread is None else spread.any(flags):  # noqa: C419 - faster than a generator
        raise ValueError("A score is NaN, so nothing can be ranked; look for a diverged loss or a bad weight.")
    if keep in (0, total):
        while scores:
            yield torch.full_like(scores.pop(0), keep > 0, dtype=torch.bool)
        return
    dtype = _widest(scores)
    scores[:] = [score.to(dtype) for score in scores]  # comparisons would round the threshold to the dtype of each score
    threshold = kth_smallest(scores, total - keep, spread=spread)
    if spread is not None:
        yield from _with_ties(scores, threshold, keep, spread)
        return
    masks = [(score >= threshold).contiguous() for score in scores]
    surplus = sum([int(mask.count_nonzero()) for mask in masks]) - keep
    numbers = [int((score == threshold).count_nonzero()) if surplus else 0 for score in scores]
    missing = sum(numbers) - surplus
    while masks:
        score, mask, number = scores.pop(0), masks.pop(0), numbers.pop(0)
        if number > missing:
            ties = (score == threshold).flatten().nonzero().squeeze(1)[missing:]
            mask.view(-1)[ties] = False
        missing = max(0, missing - number)
        del score
        yield mask


def _widest(values: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds all of these values exactly."""
    return functools.reduce(torch.promote_types, (value.dtype for value in values))


def _with_ties(scores: list[Tensor], threshold: Tensor, keep: int, spread: Spread) -> Iterator[Tensor]:
    """Masks of everything above the threshold, filled up to `keep` entries over all ranks with the earliest ties."""
    numbers = spread.sums([part.count_nonzero() for score in scores for part in (score > threshold, score == threshold)])
    missing = keep - sum(numbers[::2])
    for share, number in zip(spread.shares, numbers[1::2], strict=True):
        score = scores.pop(0)
        mask = (score > threshold).contiguous()
        if 0 < number <= missing:
            mask |= score == threshold
            missing -= number
        elif number and missing:
            # The cut falls into this tensor: the position in the whole decides.
            entries = (score == threshold).flatten().nonzero().squeeze(1)
            places = share.places(entries)
            last = _kth_place(places if share.counts else places[:0], missing - 1, share.numel, spread)
            mask.view(-1)[entries[places <= last]] = True
            missing = 0
        del score
        yield mask


def _kth_place(places: Tensor, k: int, numel: int, spread: Spread) -> Tensor:
    """The position of rank k among those of all ranks, which are distinct."""
    bins, passes = 1 << _PLACE_BITS, max(1, -(-(numel - 1).bit_length() // _PLACE_BITS))
    prefix, rank = places.new_zeros(()), places.new_full((), k)
    for shift in range((passes - 1) * _PLACE_BITS, -1, -_PLACE_BITS):
        here = places[places >> (shift + _PLACE_BITS) == prefix]
        counts = _summed(torch.bincount((here >> shift) & (bins - 1), minlength=bins), spread)
        below = counts.cumsum(0)
        digit = torch.searchsorted(below, rank, right=True)
        rank = rank - (below[digit] - counts[digit])
        prefix = (prefix << _PLACE_BITS) | digit
    return prefix


def _summed(counts: Tensor, spread: Spread) -> Tensor:
    """A histogram over all ranks; sent with four bytes per bin if that is enough."""
    return spread.total(counts.int() if spread.numel < 1 << 31 else counts).long()


def _between_two(values: Sequence[Tensor], k: int, total: int, magnitudes: bool, floats: torch.dtype) -> float | None:
    """The value of rank k, if it is one of two sampled values or lies between them, as it nearly always does."""

    def arrays() -> Iterator[np.ndarray]:
        for chunk in _chunks(values, floats):
            yield np.abs(chunk.numpy()) if magnitudes else chunk.numpy()

    if total <= 4 * _SAMPLE:
        few = np.concatenate([*arrays()])
        return float(np.partition(few, k)[k])
    step = total // _SAMPLE | 1  # odd, so that it goes through rows of usual lengths at changing places
    sample = torch.cat([value.detach().reshape(-1)[::step].to(floats) for value in values])
    sorted_sample = np.sort((sample.abs() if magnitudes else sample).numpy())
    size = len(sorted_sample)
    place = k / total * size
    margin = 4 * math.sqrt(place * (1 - place / size)) + 4  # four standard deviations
    low = sorted_sample[int(place - margin)] if place >= margin else -math.inf
    high = sorted_sample[math.ceil(place + margin)] if place + margin <= size - 1 else math.inf
    up_to_low, below_high, between = 0, 0, []
    for array in arrays():
        not_above, below = array <= low, array < high
        up_to_low += int(np.count_nonzero(not_above))
        below_high += int(np.count_nonzero(below))
        between.append(np.compress(below > not_above, array))
    if up_to_low <= k < below_high:
        k -= up_to_low
        return float(np.partition(np.concatenate(between), k)[k])
    if k < up_to_low and sum([np.count_nonzero(array < low) for array in arrays()]) <= k:
        return float(low)
    if k >= below_high and k < sum([np.count_nonzero(array <= high) for array in arrays()]):
        return float(high)
    return None


def _chunks(values: Sequence[Tensor], floats: torch.dtype) -> Iterator[Tensor]:
    """All entries, in chunks."""
    for value in values:
        flat = value.detach().reshape(-1)
        size = _CUDA_CHUNK if flat.is_cuda else _CHUNK // floats.itemsize
        for start in range(0, flat.numel(), size):
            yield flat[start : start + size].to(floats)


def _bits(values: Sequence[Tensor], magnitudes: bool, floats: torch.dtype, ints: torch.dtype) -> Iterator[Tensor]:
    """The bit patterns of all entries, in chunks."""
    for chunk in _chunks(values, floats):
        bits = chunk.view(ints)
        yield bits & torch.iinfo(ints).max if magnitudes else bits  # the highest bit is the sign


def _histogram(bits: Tensor, where: Tensor | None = None) -> Tensor:
    """How often each value of the lower 16 bits occurs, counting only selected entries."""
    digits = bits & (_BINS - 1)
    if bits.is_cuda:  # bincount would wait for the host; histc is exact here and leaves out -1
        digits = digits if where is None else torch.where(where, digits, -1)
        return torch.histc(digits.float(), _BINS, 0, _BINS).long()
    return torch.bincount(digits if where is None else digits[where], minlength=_BINS)
