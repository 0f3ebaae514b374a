"""Structure of masks: N:M patterns, whole channels, and one bit per weight on disk."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "any_bits",
    "apply_bits_",
    "channel_score",
    "expand_channels",
    "find_n_m",
    "is_for_one_thread",
    "mask_bits",
    "pack",
    "unpack",
]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GRAIN = 1 << 18  # entries: up to here one thread is as fast as two
_CHUNK = 1 << 18  # entries per thread, which stay in its cache between widening a mask and using it


def channel_score(score: Tensor, dim: int = 0) -> Tensor:
    """One score per output channel: the mean over its entries, so that channels of any size compare.

    Args:
        score: one score per weight.
        dim: the dimension of the output channels (1 for transposed convolutions).
    """
    return score.movedim(dim, 0).flatten(1).mean(1)


def expand_channels(kept: Tensor, like: Tensor, dim: int = 0) -> Tensor:
    """The mask of a weight from the mask of its channels.

    Example:
        >>> expand_channels(torch.tensor([True, False]), torch.zeros(2, 3))
        tensor([[ True,  True,  True],
                [False, False, False]])
    """
    shape = [1] * like.ndim
    shape[dim] = -1
    return kept.reshape(shape).expand_as(like).clone(memory_format=torch.contiguous_format)


def mask_bits(mask: Tensor) -> Tensor:
    """A mask as int8 numbers whose bits are all one (-1, kept) or all zero (0, dropped); one byte per entry.

    Example:
        >>> mask_bits(torch.tensor([True, False]))
        tensor([-1,  0], dtype=torch.int8)
    """
    return mask.view(torch.int8).neg()


def apply_bits_(tensor: Tensor, bits: Tensor) -> None:
    """Set the dropped entries of a tensor to +0.0 in place, whatever their values, infinite or NaN.

    A bitwise and on the number's own bits: on a CPU more than three times as fast as `masked_fill_`, and forty times as fast
    as multiplying by a boolean mask, which first converts it at full size. On one thread it uses numpy, which widens the
    byte per entry in cache and so costs little more than a copy; autograd does not count it as a change.

    Args:
        tensor: of a floating dtype.
        bits: of the same shape, as `mask_bits` makes them.

    Example:
        >>> weight = torch.tensor([1.5, torch.nan])
        >>> apply_bits_(weight, torch.tensor([-1, 0], dtype=torch.int8))
        >>> weight
        tensor([1.5000, 0.0000])
    """
    raw = tensor.view(_INTEGERS[tensor.element_size()])
    if is_for_one_thread(tensor):
        array = raw.numpy()
        np.bitwise_and(array, bits.numpy(), array)
        return
    if tensor.numel() <= _GRAIN or not (tensor.is_cpu and tensor.is_contiguous() and bits.is_contiguous()):
        raw.bitwise_and_(bits if tensor.is_cuda else bits.to(raw.dtype))
        return
    raw, bits = raw.view(-1), bits.view(-1)
    size = _CHUNK * torch.get_num_threads()
    buffer = torch.empty(size, dtype=raw.dtype)
    for start in range(0, raw.numel(), size):
        part = raw[start : start + size]
        wide = buffer[: part.numel()]
        wide.copy_(bits[start : start + size])
        part.bitwise_and_(wide)


def is_for_one_thread(tensor: Tensor) -> bool:
    """Whether one thread is enough for this tensor, or torch has only one."""
    return tensor.is_cpu and (tensor.numel() <= _GRAIN or torch.get_num_threads() == 1)


def any_bits(tensor: Tensor, bits: Tensor) -> Tensor:
    """Whether any of the entries that `bits` keeps differs from +0.0, as a 0-d boolean tensor.

    Args:
        tensor: of a floating dtype.
        bits: of the same shape, as `mask_bits` makes them.

    Example:
        >>> any_bits(torch.tensor([1.5, 0.0]), torch.tensor([0, -1], dtype=torch.int8))
        tensor(False)
    """
    raw = tensor.view(_INTEGERS[tensor.element_size()])
    if not (tensor.is_cpu and tensor.is_contiguous() and bits.is_contiguous()):
        return raw.bitwise_and(bits.to(raw.dtype)).any()
    raw, bits = raw.view(-1), bits.view(-1)
    size = _CHUNK * torch.get_num_threads()
    parts = zip(torch.split(raw, size), torch.split(bits, size), strict=True)
    return torch.tensor(any(part.bitwise_and(kept.to(raw.dtype)).any() for part, kept in parts))


def pack(mask: Tensor) -> Tensor:
    """Eight booleans per byte, first entry in the highest bit; the last byte is filled with zeros.

    Example:
        >>> pack(torch.tensor([True, False, False, False, False, False, False, True, True]))
        tensor([129, 128], dtype=torch.uint8)
    """
    flat = mask.flatten().view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros_like(padded[:, 0])
    for position in range(8):
        packed |= padded[:, position] << (7 - position)
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: bytes as `pack` returns them.
        shape: of the mask.

    Raises:
        ValueError: if the number of bytes does not fit the shape.
    """
    size = torch.Size(shape).numel()
    if packed.numel() != (size + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes do not hold a mask of shape {tuple(shape)}.")
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(1) >> shifts) & 1).flatten()[:size].view(torch.bool).reshape(shape)


def find_n_m(mask: Tensor, dim: int = 1) -> tuple[int, int] | None:
    """Find the n:m pattern of a mask: n (or at most n) of every m consecutive entries along one dimension are kept.

    Groups of 4, 8, 16 and 32 are tried; a pattern that keeps at least 1% less than it allows is considered chance.

    Example:
        >>> find_n_m(torch.tensor([[True, False, False, True, False, True, True, False]]))
        (2, 4)
        >>> find_n_m(torch.ones(2, 8, dtype=torch.bool))
    """
    moved = mask.movedim(dim, -1)
    for m in (4, 8, 16, 32):
        if moved.shape[-1] % m:
            continue
        kept = moved.reshape(-1, m).sum(1)
        n = int(kept.max())
        if 0 < n < m and int(kept.sum()) >= 0.99 * n * len(kept):
            return n, m
    return None
