"""What the penalty on similar layers costs: a step of ResNet-20 without it, with it, and with the pairwise formula.

    python -m benchmarks.cka_regularization                     batch 128, all variants take turns
    python -m benchmarks.cka_regularization --quick             a small network, to see that it runs

Variants take turns, step by step, on one model; each step is compared with the plain step of its round. The pairwise
formula is the one the tests compare with: two Gram matrices in float64 for every ordered pair, as in the published code.
The term alone is its forward and backward pass from features that are leaves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.record import ratios, save, show
from lightning_sparse.core import FeatureTap, feature_layers, group_features
from lightning_sparse.functional import linear_cka_matrix, similarity_penalty
from lightning_sparse.models import ResNet
from tests.functional.test_cka import slow_penalty

Groups = list[list[Tensor]]


def ours(groups: Groups, dtype: torch.dtype = torch.float32) -> Tensor:
    return similarity_penalty([linear_cka_matrix(group, dtype=dtype) for group in groups])


def pairwise(groups: Groups) -> Tensor:
    return torch.stack([slow_penalty(group) for group in groups]).sum()


def seconds(function: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter() - start


class Net:
    """ResNet-20 with its features, and SGD with momentum."""

    def __init__(self, quick: bool, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.net = ResNet(depth=8 if quick else 20, width=0.5 if quick else 1).to(device).train()
        self.tap = FeatureTap(feature_layers(self.net))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.x, self.y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)

    def groups(self, samples: int | None) -> Groups:
        seen = self.tap.take()
        members = group_features(
            [layer for layer, _ in seen], [f.shape for _, f in seen], "all" if len(seen) < 4 else "stage"
        )
        return [[seen[i][1] if samples is None else seen[i][1][:samples] for i in group] for group in members.values()]

    def step(self, term: Callable[[Groups], Tensor] | None, samples: int | None) -> None:
        self.tap.open = term is not None
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.net(self.x), self.y)
        if term is not None:
            loss = loss + 1e-4 * term(self.groups(samples))
        loss.backward()
        self.optimizer.step()

    def leaves(self, samples: int | None) -> Groups:
        self.tap.open = True
        self.net(self.x)
        return [[feature.detach().requires_grad_() for feature in group] for group in self.groups(samples)]


def turns(
    title: str,
    steps: dict[str, tuple[Callable[[Groups], Tensor] | None, int | None]],
    net: Net,
    device: str,
    rounds: int,
    numbers: dict[str, Any],
) -> None:
    """Steps of each kind, forwards and backwards through the list; the ratio to the first."""
    seen = []
    for number in range(rounds + 2):
        order = list(steps.items())
        times = {
            name: seconds(lambda way=way: net.step(*way), device) for name, way in (order if number % 2 else order[::-1])
        }
        if number > 1:
            seen.append({name: times[name] for name in steps})
    numbers[title] = ratios(seen, next(iter(steps)))
    show(title, numbers[title])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    device, rounds = arguments.device, 3 if arguments.quick else arguments.rounds
    net = Net(arguments.quick, arguments.batch, device)
    numbers: dict[str, Any] = {}

    size = f"{'a small ResNet' if arguments.quick else 'ResNet-20'}, batch {arguments.batch}, {device}"
    steps: dict[str, tuple[Callable[[Groups], Tensor] | None, int | None]] = {
        "plain step": (None, None),
        "8 samples": (ours, 8),
        "all samples": (ours, None),
    }
    turns(f"step of {size}, ratio to the plain step", steps, net, device, rounds, numbers)
    # By itself, because it is slow and leaves caches and memory to the others in another state.
    steps = {"all samples": (ours, None), "all samples, pairwise in float64": (pairwise, None)}
    turns(f"step of {size}, ratio to all samples", steps, net, device, max(3, rounds // 5), numbers)

    for samples in (8, None):
        groups = net.leaves(samples)
        flat = [feature for group in groups for feature in group]
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda groups=groups, flat=flat: torch.autograd.grad(ours(groups), flat),
            "ours in float64": lambda groups=groups, flat=flat: torch.autograd.grad(ours(groups, torch.float64), flat),
            "pairwise in float64": lambda groups=groups, flat=flat: torch.autograd.grad(pairwise(groups), flat),
        }
        seen = []
        for number in range(rounds + 2):
            times = {name: seconds(way, device) for name, way in ways.items()}
            if number > 1:
                seen.append({**times, "plain step": seconds(lambda: net.step(None, None), device)})
        title = f"the term alone, {samples or 'all'} samples"
        numbers[title] = ratios(seen, "ours")
        numbers[f"{title}, share of a step"] = ratios(seen, "plain step")["ours"]
        show(f"{title}, ratio to ours", numbers[title])
        print(f"  share of a plain step: {numbers[f'{title}, share of a step']['ratio']:.4f}")
    if arguments.save:
        save(f"cka_{device}", numbers)


if __name__ == "__main__":
    main()
