"""The penalty on similar layers (CKA-SR): its cost, and tests of its claims.

    python -m benchmarks cost-cka-regularization     time of a step of ResNet-20
    python -m benchmarks claim-cka --data DIR        accuracy and similarity by form and strength, with random masks
    python -m benchmarks claim-prunable --data DIR   whether networks with less similar layers can be pruned further

Cost: steps without the penalty, with it, and with the pairwise formula are interleaved on one model. The pairwise formula is
the one that the tests compare with: two Gram matrices in float64 for every ordered pair, as in the published code. The
penalty alone is its forward and backward pass, starting from features that are leaf tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy import METHODS, Setting
from benchmarks.record import Options, Parts
from benchmarks.trainers import Pause, quiet
from benchmarks.turns import in_turns, ratios
from lightning_sparse import CKARegularization, MagnitudePruning
from lightning_sparse.core import FeatureTap, feature_layers, find_targets, group_features
from lightning_sparse.data import ImageData
from lightning_sparse.functional import exact_count, linear_cka_matrix, similarity_penalty, top_k_masks
from lightning_sparse.models import Classifier, ResNet

Groups = list[list[Tensor]]


def ours(groups: Groups, dtype: torch.dtype = torch.float32) -> Tensor:
    return similarity_penalty([linear_cka_matrix(group, dtype=dtype) for group in groups])


def pairwise(groups: Groups) -> Tensor:
    from tests.functional.test_cka import slow_penalty

    return torch.stack([slow_penalty(group) for group in groups]).sum()


class Net:
    """ResNet-20 with access to its features, trained by SGD with momentum."""

    def __init__(self, quick: bool, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.net = ResNet(depth=8 if quick else 20, width=0.5 if quick else 1).to(device).train()
        self.tap = FeatureTap(feature_layers(self.net))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.x, self.y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)

    def groups(self, samples: int | None) -> Groups:
        seen = self.tap.take()
        pairs = "all" if len(seen) < 4 else "stage"
        members = group_features([layer for layer, _ in seen], [feature.shape for _, feature in seen], pairs)
        return [[seen[i][1][:samples] for i in group] for group in members.values()]

    def step(self, term: Callable[[Groups], Tensor] | None = None, samples: int | None = None) -> None:
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


def alone(net: Net, samples: int | None, rounds: int, device: str) -> dict[str, Any]:
    """Time the penalty without the network, and a plain step."""
    groups = net.leaves(samples)
    flat = [feature for group in groups for feature in group]
    terms = {"ours": ours, "ours in float64": partial(ours, dtype=torch.float64), "pairwise in float64": pairwise}
    ways = {name: lambda term=term: torch.autograd.grad(term(groups), flat) for name, term in terms.items()}
    seen = in_turns({**ways, "plain step": net.step}, rounds, device)
    return {**ratios(seen, "ours"), "ours, share of a step": ratios(seen, "plain step")["ours"]}


# ---- effect ---------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "8 samples of every fifth batch": {"samples": 8, "every_n_batches": 5},
    "all samples of every batch": {"samples": None, "every_n_batches": 1},
}
"""The default of the published code, and the form of the best result in the appendix."""
STRENGTHS = (8e-4, 0.01, 0.03)


def penalty(words: str) -> list[L.Callback]:
    """The penalty from a text with its form and strength (`all samples of every batch, 0.01`), or none for an empty text."""
    form, _, strength = words.rpartition(", ")
    return [CKARegularization(strength=float(strength), **FORMS[form])] if words else []


def with_and_without(base: str, forms: Sequence[str], strengths: Sequence[float]) -> list[str]:
    """Method names: the base alone, and with each form and strength of the penalty."""
    return [base, *(f"{base}, {form}, {strength:g}" for form in forms for strength in strengths)]


@dataclass(frozen=True)
class Dissimilar(Setting):
    """A setting in which method names end in a form and a strength of the penalty."""

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        base, _, words = method.partition(", ")
        return [*METHODS[base](sparsity), *penalty(words)]


@dataclass(frozen=True)
class Prunable(Dissimilar):
    """Dense training runs, each followed by one-shot pruning by global magnitude and fine-tuning without a penalty.

    Args:
        sparsities: sparsities to prune to, each starting from the trained network.
        tuning: epochs of fine-tuning, starting at a tenth of the learning rate.
    """

    sparsities: Sequence[float] = (0.7, 0.8, 0.9, 0.95, 0.98)
    tuning: int = 2

    def read(
        self, module: Classifier, callbacks: Sequence[L.Callback], data: ImageData, stop: Path | None
    ) -> dict[str, Any]:
        state, slower = copy.deepcopy(module.state_dict()), replace(self, lr=self.lr / 10)
        curve: dict[str, list[float]] = {"pruned": [], "fine-tuned": []}
        for sparsity in self.sparsities:
            network = slower.module("dense", data, annealing=1.0).to(memory_format=self.memory_format)
            network.load_state_dict(state)
            weights = [target.weight for target in find_targets(network)]
            total = sum(weight.numel() for weight in weights)
            masks = top_k_masks([weight.detach().abs() for weight in weights], total - exact_count(sparsity, total))
            for weight, mask in zip(weights, masks, strict=True):
                weight.data *= mask
            curve["pruned"].append(self.tested(network, data, stop))
            keeping = [MagnitudePruning(sparsity, start=0.0, end=0.0), Pause(stop)]
            quiet(keeping, max_epochs=self.tuning, precision=self.precision).fit(network, data)
            curve["fine-tuned"].append(self.tested(network, data, stop))
        return curve

    def tested(self, network: Classifier, data: ImageData, stop: Path | None) -> float:
        [scores] = quiet([Pause(stop)], precision=self.precision).test(network, data, verbose=False)
        return float(scores["test/accuracy"])


# ---- cost -----------------------------------------------------------------------------------------------------------


def parts(options: Options) -> Parts:
    device, rounds = options.device, options.times(40)
    net = cache(lambda: Net(options.quick, 128, device))
    size = f"{'a small ResNet' if options.quick else 'ResNet-20'}, batch 128, {device}"

    def turns(ways: dict[str, tuple[Any, ...]], rounds: int) -> dict[str, Any]:
        steps = {name: partial(net().step, *way) for name, way in ways.items()}
        return ratios(in_turns(steps, rounds, device), next(iter(ways)))

    ways: dict[str, tuple[Any, ...]] = {"plain step": (), "8 samples": (ours, 8), "all samples": (ours,)}
    yield (f"step of {size}, ratio to the plain step",), partial(turns, ways, rounds)
    if device == "cpu":  # separate, because it is slow and disturbs caches and memory for the others
        ways = {"all samples": (ours,), "all samples, pairwise in float64": (pairwise,)}
        yield (f"step of {size}, ratio to all samples",), partial(turns, ways, max(3, rounds // 5))
        for samples in (8, None):
            title = f"the term alone, {samples or 'all'} samples"
            yield (title,), lambda samples=samples: alone(net(), samples, rounds, device)
