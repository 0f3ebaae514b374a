"""The cost of applying a mask once: `python -m benchmarks cost-masking`.

A pass over one tensor is compared with a copy of the tensor, in and out of the cache. The cost per step is measured on
chains of 16 x 16 linear layers, which are so small that only the calls take time. All variants are interleaved in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import overhead
from benchmarks.record import Options, Parts
from benchmarks.turns import WARM_UP, in_turns, ratios, timed
from lightning_sparse.core import MaskSet, Mold
from lightning_sparse.functional import apply_bits_, mask_bits

OUT_OF_CACHE = 20_000_000
"""Number of values that are read between two passes, so that no pass finds its tensor in the cache."""


def one_pass(n: int, rounds: int, cold: bool, device: str = "cpu") -> dict[str, Any]:
    """Time a mask on a tensor of n numbers, stored as bits and in other forms, as ratios to a copy of the tensor."""
    weight, mask = torch.randn(n, device=device), torch.rand(n, device=device) > 0.9
    bits, dropped, floats, other = mask_bits(mask), ~mask, mask.float(), torch.randn(n, device=device)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = weight
    masks = MaskSet({"weight": weight})
    masks.replace({"weight": mask})
    mold = Mold(masks, {"weight": parameter})
    between = torch.randn(OUT_OF_CACHE if cold else 1, device=device)
    ways: dict[str, Callable[[], Any]] = {
        "copy_": lambda: other.copy_(weight),
        "apply_bits_": lambda: apply_bits_(weight, bits),
        "Mold": mold.press_gradients,
        "masked_fill_": lambda: weight.masked_fill_(dropped, 0),
        "mul_ by a float mask": lambda: weight.mul_(floats),
        "mul_ by a boolean mask": lambda: weight.mul_(mask),
    }

    def after_others(way: Callable[[], Any]) -> float:
        between.mul_(1.0)
        if not cold:
            way()
        return timed(way, device)

    return ratios(in_turns({name: partial(after_others, way) for name, way in ways.items()}, rounds, device), "copy_")


def chain(layers: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Time steps of a chain with and without masks, and the time inside stations."""
    turns = overhead.train(f"chain of {layers}", 32, WARM_UP + rounds, ["dense", "MagnitudePruning"], device)
    table = turns.table("dense")
    table["inside MagnitudePruning's stations"] = turns.inside_of("MagnitudePruning", table["dense"]["seconds"])
    return table


def parts(options: Options) -> Parts:
    rounds = options.times(60)
    for n in [10_000] if options.quick else [100_000, 1_600_000, 11_000_000]:
        for cold in (False, True):
            where = "out of the cache" if cold else "as often as it may"
            yield (f"pass, {n:,} weights, {where}",), partial(one_pass, n, rounds, cold, options.device)
    for layers in [3] if options.quick else [3, 50, 300]:
        yield (f"chain of {layers} layers",), partial(chain, layers, rounds, options.device)
