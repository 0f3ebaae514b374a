"""SparseGPT on one layer compared with a plain version of its published loop: `python -m benchmarks cost-sparsegpt`.

The weight is 4096 x 4096, with 2,048 rows of inputs. Half of the weights are removed, or two of every four are kept. Both
implementations start from the products of the inputs and end with a pruned weight. They are interleaved in one run, each
time is a ratio to ours in the same round, and each peak is measured in a separate process. The results of both are compared
too, in float32 and in float64; in float64, the masks are the same.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Options, Parts
from benchmarks.turns import alone, growth, in_turns, ratios
from lightning_sparse.functional import compensate, inverse_factor

BLOCK, DAMPING = 128, 0.01


def layer(size: int) -> tuple[Tensor, Tensor]:
    """A weight, and the sums of products of its inputs, which are correlated like those of a trained network."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    mix = torch.eye(size) + torch.randn(size, size, generator=generator) / size**0.5
    rows = torch.randn(size // 2, size, generator=generator) @ mix
    return weight, rows.T @ rows


def ours(weight: Tensor, products: Tensor, n_m: tuple[int, int] | None) -> Tensor:
    matrix = weight.clone()[None]
    compensate(matrix, inverse_factor(products.clone()[None], DAMPING), weight.numel() // 2, n_m=n_m, block_size=BLOCK)
    return matrix[0]


def published(weight: Tensor, products: Tensor, n_m: tuple[int, int] | None) -> Tensor:
    """Algorithm 1 as printed, with the blocks of the published code: rows first, column by column.

    Each block loses exactly half of its entries. A threshold that has ties, or is off by one entry, would give another mask.
    """
    matrix, hessian = weight.clone(), products.clone()
    columns, index = matrix.shape[1], torch.arange(matrix.shape[1])
    hessian[index, index] += DAMPING * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, corner = matrix[:, start:end].clone(), factor[start:end, start:end]
        kept_values, errors = torch.zeros_like(block), torch.zeros_like(block)
        removed = torch.zeros_like(block, dtype=torch.bool)
        if n_m is None:
            score = block**2 / corner.diagonal() ** 2
            removed = score <= score.flatten().sort().values[score.numel() // 2 - 1]
        for column in range(end - start):
            if n_m is not None and column % n_m[1] == 0:
                group = slice(column, column + n_m[1])
                score = block[:, group] ** 2 / corner.diagonal()[group] ** 2
                removed.scatter_(1, column + score.topk(n_m[1] - n_m[0], 1, largest=False).indices, True)
            old = block[:, column]
            new = old.clone()
            new[removed[:, column]] = 0
            kept_values[:, column] = new
            error = (old - new) / corner[column, column]
            block[:, column:] -= error[:, None] @ corner[None, column, column:]
            errors[:, column] = error
        matrix[:, start:end] = kept_values
        matrix[:, end:] -= errors @ factor[start:end, end:]
    return matrix


WAYS = {"ours": ours, "published loop": published}
PATTERNS: dict[str, tuple[int, int] | None] = {"50 %": None, "2:4": (2, 4)}


def times(size: int, pattern: str, rounds: int, device: str) -> dict[str, Any]:
    weight, products = (tensor.to(device) for tensor in layer(size))
    ways = {name: partial(way, weight, products, PATTERNS[pattern]) for name, way in WAYS.items()}
    return ratios(in_turns(ways, rounds, device, warm_up=0), "ours")


def agreement(size: int, pattern: str) -> dict[str, dict[str, float]]:
    """Compare the results of both implementations, by data type.

    The numbers are the entries that only one of the two removes, and the largest difference elsewhere, relative to the
    largest weight. If an entry at a threshold is rounded differently, the rest of its row changes. This can happen in both
    implementations.
    """
    weight, products = layer(size)
    found = {}
    for dtype in (torch.float32, torch.float64):
        mine, theirs = (way(weight.to(dtype), products.to(dtype), PATTERNS[pattern]) for way in WAYS.values())
        same = (mine == 0) == (theirs == 0)
        found[str(dtype).removeprefix("torch.")] = {
            "entries": weight.numel(),
            "other masks": float((~same).sum()),
            "largest difference": float((mine - theirs)[same].abs().max() / theirs.abs().max()),
        }
    return found


def peak(way: str, size: int, pattern: str, device: str = "cpu") -> float:
    """Peak memory in MiB beyond the weight and the products."""
    weight, products = (tensor.to(device) for tensor in layer(size))
    return growth(lambda: WAYS[way](weight, products, PATTERNS[pattern]), device)


def parts(options: Options) -> Parts:
    size = 256 if options.quick else 4096
    for pattern in PATTERNS:
        place = f"{size} x {size}, {size // 2} rows, {pattern}"
        yield (place, "time"), partial(times, size, pattern, options.times(3, quick=2), options.device)
        yield (place, "agreement"), partial(agreement, size, pattern)
        for way in WAYS:
            if options.device == "cpu":
                yield (place, "peak in MiB", way), partial(alone, "benchmarks.sparsegpt", way, str(size), pattern)
            else:
                yield (place, "peak in MiB", way), partial(peak, way, size, pattern, options.device)


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
