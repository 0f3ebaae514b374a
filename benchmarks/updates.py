"""What a global mask update costs, beside the ways people use now, and what a mask weighs.

    python -m benchmarks.updates                      from one to a hundred million weights
    python -m benchmarks.updates --weights 1000000 1000000000 --save
    python -m benchmarks.updates --quick              small, to see that it runs

All ways take turns in one run; each time is a ratio to ours of the same round.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from benchmarks.competitors import SPARSITY, layers
from benchmarks.record import ratios, save, show, timed
from lightning_sparse.core import Budget, MaskSet, find_targets
from lightning_sparse.functional import magnitude


def updates(weights: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """A global mask update over many weights; on a CPU the others up to 300 M: they need more than 20 bytes per weight."""
    torch.manual_seed(0)

    def fresh() -> nn.Module:
        return nn.Sequential(*[nn.Linear(1000, weights // 5000, bias=False, device=device) for _ in range(5)])

    net = fresh()
    targets = find_targets(net)
    budget = Budget(SPARSITY)
    masks = MaskSet({target.name: target.weight for target in targets})

    def ours() -> None:
        made = budget.masks(targets, [magnitude(target.weight) for target in targets])
        masks.replace({target.name: mask for target, mask in zip(targets, made, strict=True)})

    def by_kthvalue() -> None:
        flat = torch.cat([target.weight.detach().abs().flatten() for target in targets])
        threshold = flat.kthvalue(round(SPARSITY * flat.numel())).values
        for target in targets:
            _ = target.weight.detach().abs() > threshold

    def by_prune(module: nn.Module) -> Callable[[], None]:
        chosen = [(layer, "weight") for layer in layers(module)]
        return lambda: prune.global_unstructured(chosen, prune.L1Unstructured, amount=SPARSITY)

    def by_lightning(module: nn.Module) -> Callable[[], None]:
        callback = ModelPruning("l1_unstructured", amount=SPARSITY, use_global_unstructured=True)
        callback.setup(None, module, "fit")  # type: ignore[arg-type]
        return lambda: callback.apply_pruning(SPARSITY)

    seen = []
    for number in range(rounds + 1):
        times = {"MagnitudePruning": timed(ours, device)}
        if device != "cpu" or weights <= 300_000_000:
            times["prune.global_unstructured"] = timed(by_prune(fresh()), device)
            times["ModelPruning"] = timed(by_lightning(fresh()), device)
            times["cat, kthvalue, compare"] = timed(by_kthvalue, device)
        if number:
            seen.append(times)
    return ratios(seen, "MagnitudePruning")


def memory() -> dict[str, float]:
    """Bytes per targeted weight, in memory while training and in the checkpoint."""
    net = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    masks = MaskSet(dict(net.named_parameters()))
    kept = torch.rand(1000, 1000) > SPARSITY
    masks.replace({"0.weight": kept})
    ours = sum(bits.numel() * bits.element_size() for bits in masks._bits.values())
    saved = sum(entry["kept"].numel() for entry in masks.state_dict().values())
    pruned = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    prune.l1_unstructured(pruned[0], "weight", SPARSITY)
    extra = pruned[0].weight_mask.numel() * pruned[0].weight_mask.element_size()
    return {
        "ours in memory": ours / 1e6,
        "ours in the checkpoint": saved / 1e6,
        "torch.nn.utils.prune, mask alone": extra / 1e6,
        "torch.nn.utils.prune in the checkpoint": len(pickle.dumps(pruned[0].weight_mask)) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, nargs="*", default=[1_000_000, 10_000_000, 25_000_000, 100_000_000])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results")
    options = parser.parse_args()
    numbers: dict[str, Any] = {}
    for weights in [1_000_000] if options.quick else options.weights:
        title = f"mask update, {weights:,} weights"
        numbers[title] = updates(weights, 3 if weights > 30_000_000 else 5, options.device)
        show(f"{title}, ratio to ours", numbers[title])
    numbers["memory, bytes per weight"] = memory()
    print()
    for name, value in numbers["memory, bytes per weight"].items():
        print(f"  {name:40s} {value:.3f} bytes per weight")
    if options.save:
        save(f"updates_{options.device}", numbers)


if __name__ == "__main__":
    main()
