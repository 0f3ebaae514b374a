"""The cost of the HyperSparse penalty per optimizer step: `python -m benchmarks cost-hypersparse`.

The penalty over the weights of a VGG-19 (20 M) is compared with the published implementation, which sorts all magnitudes for
the quantile and differentiates the normalized sum with autograd. Steps of a ResNet-32 are timed with and without the
penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.record import Options, Parts
from benchmarks.turns import in_turns, peak_memory, ratios, share, timed
from lightning_sparse.core import find_targets
from lightning_sparse.functional import hypersparse_gradient, hypersparse_scale
from lightning_sparse.models import VGG, ResNet

SPARSITY, STRENGTH = 0.99, 1e-4


def published(weights: Sequence[nn.Parameter]) -> None:
    """Sort, scale, and differentiate (1/A) sum_i |w_i| sum_j tanh(s |w_j|) - sum_i |w_i| with autograd."""
    flat = torch.cat([weight.flatten() for weight in weights]).abs()
    slope = math.atanh(3**-0.5) / flat.detach().sort().values[int(SPARSITY * flat.numel())]
    saturation = (slope * flat).tanh()
    loss = flat.sum() * saturation.sum() / saturation.sum().detach() - flat.sum()
    (STRENGTH * loss).backward()


@torch.no_grad()
def closed_form(weights: Sequence[nn.Parameter]) -> None:
    """Add the penalty to the gradients layer by layer, as the penalty station of the callbacks does."""
    scale = hypersparse_scale(weights, SPARSITY)
    for weight in weights:
        [gradient] = hypersparse_gradient([weight], SPARSITY, scale)
        weight.grad.add_(gradient, alpha=STRENGTH)


def penalty(width: float, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Time and memory of one penalty over all weights of a VGG-19."""
    torch.manual_seed(0)
    weights = [target.weight for target in find_targets(VGG(width=width).to(device))]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    ways = {"closed form": lambda: closed_form(weights), "published": lambda: published(weights)}
    table: dict[str, Any] = ratios(in_turns(ways, rounds, device, warm_up=1), "published")
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if device == "cpu":
        for name, way in ways.items():
            table[name]["peak memory, copies of the weights"] = peak_memory(way) / size
    return table


def step(depth: int, width: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """A training step with and without the penalty, interleaved on one model."""
    torch.manual_seed(0)
    net = ResNet(depth=depth, width=width).to(device)
    weights = [target.weight for target in find_targets(net)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.rand(64, 3, 32, 32, device=device), torch.randint(0, 10, (64,), device=device)

    def train(*penalties: Callable[[Any], None]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        for penalize in penalties:
            penalize(weights)
        optimizer.step()

    ways = {"dense": train, "with penalty": lambda: train(closed_form)}
    table = ratios(in_turns(ways, rounds, device), "dense")
    alone = [timed(lambda: closed_form(weights), device) for _ in range(rounds)]
    return {**table, "penalty alone": share(alone, table["dense"]["seconds"])}


def parts(options: Options) -> Parts:
    rounds, device = options.times(15), options.device
    yield ("penalty over 20 M weights",), partial(penalty, 0.1 if options.quick else 1, rounds, device)
    for width in (1, 2):
        title = f"step of a ResNet-32 of width {width}, batch 64"
        yield (title,), partial(step, 8 if options.quick else 32, width, rounds, device)
