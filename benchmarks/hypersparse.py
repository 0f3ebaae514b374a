"""What the HyperSparse penalty costs per optimizer step, beside the way it was published.

    python -m benchmarks.hypersparse             VGG-19 size (20 M weights), and steps of a ResNet-32 at batch 64
    python -m benchmarks.hypersparse --quick     small, to see that it runs

The published way sorts all magnitudes for the quantile and differentiates the normalized sum by autograd. Ratios are of
neighbors in time, in one run; the median over rounds is the number.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.record import ratios, save, show, timed
from lightning_sparse.core import find_targets
from lightning_sparse.functional import hypersparse_gradient, hypersparse_scale
from lightning_sparse.models import VGG, ResNet

SPARSITY, STRENGTH = 0.99, 1e-4


def published(weights: Sequence[nn.Parameter]) -> None:
    """Sort, scale, and let autograd differentiate (1/A) sum_i |w_i| sum_j tanh(s |w_j|) - sum_i |w_i|."""
    flat = torch.cat([weight.flatten() for weight in weights]).abs()
    slope = math.atanh(3**-0.5) / flat.detach().sort().values[int(SPARSITY * flat.numel())]
    saturation = (slope * flat).tanh()
    loss = flat.sum() * saturation.sum() / saturation.sum().detach() - flat.sum()
    (STRENGTH * loss).backward()


def closed_form(weights: Sequence[nn.Parameter]) -> None:
    """As the callbacks' station for penalties adds it: layer by layer into the gradient."""
    with torch.no_grad():
        scale = hypersparse_scale(weights, SPARSITY)
        for weight in weights:
            [gradient] = hypersparse_gradient([weight], SPARSITY, scale)
            assert weight.grad is not None
            weight.grad.add_(gradient, alpha=STRENGTH)


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of tensors alive at once beyond those before, by the profiler's own account."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def penalty(quick: bool, rounds: int, device: str = "cpu") -> tuple[dict[str, Any], dict[str, float]]:
    """Time and memory of one penalty over all weights of a VGG-19."""
    torch.manual_seed(0)
    net = (VGG(width=0.1) if quick else VGG()).to(device)
    weights = [target.weight for target in find_targets(net)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    ways = {"closed form": lambda: closed_form(weights), "published": lambda: published(weights)}
    seen = [{name: timed(way, device) for name, way in ways.items()} for _ in range(rounds + 1)][1:]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    memory = {} if device != "cpu" else {name: peak_memory(way) / size for name, way in ways.items()}
    return ratios(seen, "published"), {f"{name}, copies of the weights": copies for name, copies in memory.items()}


def step(quick: bool, rounds: int, width: int, device: str = "cpu") -> dict[str, Any]:
    """A training step of a ResNet-32 with and without the penalty, taking turns on one model."""
    torch.manual_seed(0)
    net = ResNet(depth=8 if quick else 32, width=width).to(device)
    weights = [target.weight for target in find_targets(net)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.rand(64, 3, 32, 32, device=device), torch.randint(0, 10, (64,), device=device)

    def train(penalize: bool) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        if penalize:
            closed_form(weights)
        optimizer.step()

    seen: list[dict[str, float]] = []
    for number in range(rounds + 3):
        order = (False, True) if number % 2 else (True, False)
        times = {("with penalty" if penalize else "dense"): timed(lambda p=penalize: train(p), device) for penalize in order}
        if number >= 3:
            seen.append({name: times[name] for name in ("dense", "with penalty")})
    table = ratios(seen, "dense")
    alone = sorted(timed(lambda: closed_form(weights), device) for _ in range(rounds))
    dense = table["dense"]["seconds"]
    middle, quarter = alone[len(alone) // 2], len(alone) // 4
    row = {"ratio": middle / dense, "low": alone[quarter] / dense, "high": alone[-1 - quarter] / dense, "seconds": middle}
    table["penalty alone"] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    table, memory = penalty(arguments.quick, arguments.rounds)
    numbers: dict[str, Any] = {"penalty over 20 M weights": table, "peak extra memory": memory}
    show("one penalty over all weights of a VGG-19, ratio to the published way", table)
    for name, copies in memory.items():
        print(f"  {name:40s} {copies:.3f}")
    for width in (1, 2):
        title = f"step of a ResNet-32 of width {width}, batch 64"
        numbers[title] = step(arguments.quick, arguments.rounds, width)
        show(f"{title}, ratio to dense", numbers[title])
    if arguments.save:
        save("hypersparse_cpu", numbers)


if __name__ == "__main__":
    main()
