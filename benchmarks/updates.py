"""Global mask updates compared with other implementations, and memory of masks: `python -m benchmarks cost-updates`.

All variants are interleaved in one run. Each time is a ratio to ours in the same round.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from benchmarks.competitors import SPARSITY, layers
from benchmarks.record import Options, Parts
from benchmarks.turns import held, in_turns, ratios, timed
from lightning_sparse.core import Budget, MaskSet, find_targets, lay_out
from lightning_sparse.functional import magnitude


def updates(weights: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Time a global mask update over `weights` weights.

    On a CPU, the other implementations run only up to 300 M weights, because they need more than 20 bytes per weight.
    """
    torch.manual_seed(0)

    def fresh() -> nn.Module:
        return nn.Sequential(*[nn.Linear(1000, weights // 5000, bias=False, device=device) for _ in range(5)])

    targets = find_targets(fresh())
    plan = lay_out(Budget(SPARSITY), targets)
    masks = MaskSet({target.name: target.weight for target in targets})

    def ours() -> None:
        made = plan.masks([magnitude(target.weight) for target in targets])
        masks.replace({target.name: mask for target, mask in zip(targets, made, strict=True)})

    def by_kthvalue() -> None:
        flat = torch.cat([target.weight.detach().abs().flatten() for target in targets])
        threshold = flat.kthvalue(round(SPARSITY * flat.numel())).values
        for target in targets:
            _ = target.weight.detach().abs() > threshold

    def by_prune() -> float:
        chosen = [(layer, "weight") for layer in layers(fresh())]
        return timed(lambda: prune.global_unstructured(chosen, prune.L1Unstructured, amount=SPARSITY), device)

    def by_lightning() -> float:
        callback = ModelPruning("l1_unstructured", amount=SPARSITY, use_global_unstructured=True)
        callback.setup(None, fresh(), "fit")
        return timed(lambda: callback.apply_pruning(SPARSITY), device)

    ways: dict[str, Callable[[], Any]] = {"MagnitudePruning": ours}
    if device != "cpu" or weights <= 300_000_000:
        ways |= {"prune.global_unstructured": by_prune, "ModelPruning": by_lightning, "cat, kthvalue, compare": by_kthvalue}
    return ratios(in_turns(ways, rounds, device, warm_up=1), "MagnitudePruning")


def memory() -> dict[str, float]:
    """Bytes per targeted weight, in memory while training and in the checkpoint."""
    net = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    masks = MaskSet(dict(net.named_parameters()))
    masks.replace({"0.weight": torch.rand(1000, 1000) > SPARSITY})
    pruned = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    prune.l1_unstructured(pruned[0], "weight", SPARSITY)
    theirs = pruned[0].weight_mask
    return {
        "ours in memory": held(masks, net) / 1e6,
        "ours in the checkpoint": sum(entry["kept"].numel() for entry in masks.state_dict().values()) / 1e6,
        "torch.nn.utils.prune, mask alone": theirs.numel() * theirs.element_size() / 1e6,
        "torch.nn.utils.prune in the checkpoint": len(pickle.dumps(theirs)) / 1e6,
    }


def parts(options: Options) -> Parts:
    for weights in [1_000_000] if options.quick else [1_000_000, 10_000_000, 25_000_000, 100_000_000, 1_000_000_000]:
        rounds = options.times(3 if weights > 30_000_000 else 5)
        yield (f"mask update, {weights:,} weights",), partial(updates, weights, rounds, options.device)
    yield ("memory, bytes per weight",), memory
