"""How much each weight matters. A score is a tensor like the weight; higher survives."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

__all__ = ["hashed_score", "magnitude", "random_generator", "random_score"]


def magnitude(weight: Tensor) -> Tensor:
    """The absolute value of every weight, in float32 or wider.

    Example:
        >>> magnitude(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])
    """
    score = weight.detach().abs()
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def random_generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    Every rank, every device and every resumed run draws the same numbers from it, whatever else
    has consumed the global generators.

    Args:
        seed: the seed of the run.
        step: when the numbers are drawn.
        name: for which parameter.
    """
    mixed = zlib.crc32(f"{seed}/{step}/{name}".encode())
    return torch.Generator().manual_seed((mixed << 32) | zlib.crc32(name.encode(), mixed))


def random_score(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform random numbers in the shape of the weight, on the CPU so that devices agree.

    In float64, because float32 has only 2^24 values in [0, 1): ties would favour early entries. Not every device has it.
    """
    return torch.rand(weight.shape, generator=generator, dtype=torch.float64)


def hashed_score(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in the shape of the weight, computed where it lies from two numbers that the generator draws.

    Whole-number arithmetic, so that devices agree as they do on `random_score`, without drawing every number on the CPU:
    each entry's index and the two keys go through a hash (C. Wellons, "Prospecting for Hash Functions", lowbias32,
    https://nullprogram.com/blog/2018/07/31/). Float32 with 2^24 different values: enough to choose by, too coarse for more
    than a choice.
    """
    first, second = torch.randint(-(1 << 31), 1 << 31, (2,), generator=generator).tolist()
    value = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device).add_(first)
    # The shifts of a signed type carry the sign along; the masks take it away again.
    value ^= (value >> 16) & 0xFFFF
    value *= 0x7FEB352D
    value ^= second
    value ^= (value >> 15) & 0x1FFFF
    value *= 0x846CA68B - (1 << 32)
    value ^= (value >> 16) & 0xFFFF
    return (value >> 8).float().view(weight.shape)
