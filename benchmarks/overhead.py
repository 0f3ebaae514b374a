"""Time and memory that masks and penalties add to a training step, compared with common implementations.

    python -m benchmarks cost-overhead         a perceptron, ResNet-18 and a small ViT, batches of 32 and 128
    python -m benchmarks memory-overhead       peak memory of a few steps, each variant in a separate process (on Linux)

fasterai has its own trainer, so two of its parts are used without fastai: `Sparsifier` (masks, multiplied after each step),
and the term that its `RegularizeCallback` adds to the loss. To install it without fastai:

    pip install --no-deps fasterai fastcore einops

Of Torch-Pruning, the sparse training is used: `GroupNormPruner.regularize`. Packages that are not installed are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.competitors import PEERS, SPARSITY, layers
from benchmarks.record import LeftOut, Options, Parts
from benchmarks.trainers import Net
from benchmarks.turns import WARM_UP, Turns, Way, alone, growth
from lightning_sparse import MagnitudePruning, WeightPenalty
from lightning_sparse.loop import Sparsifier

OURS: dict[str, Callable[[], Sparsifier]] = {
    "MagnitudePruning": lambda: MagnitudePruning(SPARSITY, start=0, end=0),
    "WeightPenalty, L1": lambda: WeightPenalty(strength=1e-4, end=1.0, name="l1"),
    "WeightPenalty, group lasso": lambda: WeightPenalty(strength=1e-4, penalty="group_lasso", end=1.0, name="group"),
}
WAYS = ["dense", *OURS, *PEERS]
ROUNDS = {("mlp", 32): 100, ("mlp", 128): 100, ("resnet18", 32): 60, ("vit", 32): 60}
"""Rounds on a CPU by model and batch size. The other steps are so long that 6 rounds take ten minutes."""


def train(
    model: str, batch: int, rounds: int, names: list[str], device: str = "cpu", in_a_row: int = 1, **options: Any
) -> Turns:
    """Train one model with the named variants interleaved."""
    methods = {name: make() for name, make in OURS.items() if name in names}

    def make(module: Net) -> dict[str, Way]:
        found = {layer: torch.rand_like(layer.weight) >= SPARSITY for layer in layers(module)}
        if "MagnitudePruning" in methods:
            masks = methods["MagnitudePruning"].masks
            found = {layer: masks[f"{name}.weight"] for name, layer in module.named_modules() if layer in found}
        ways = {"dense": Way()} if "dense" in names else {}
        ways |= {name: Way([method]) for name, method in methods.items()}
        for name in PEERS:
            try:
                if name in names:
                    ways[name] = PEERS[name](module, found)
            except Exception as error:  # a peer that is not installed, or does not support this model
                print(f"  {name} is left out: {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
        if not ways:
            raise LeftOut(f"{names[0]} cannot train {model}")
        return ways

    turns = Turns(list(methods.values()), make, device=device, in_a_row=in_a_row)
    turns.fit(Net(model), batch, len(names) * rounds, **options)
    return turns


def steps(model: str, batch: int, rounds: int, device: str = "cpu", precision: Any = "32-true") -> dict[str, Any]:
    """Time a step of every variant."""
    turns = train(model, batch, WARM_UP + rounds, takes(model), device, in_a_row=2, precision=precision)
    table = turns.table("dense")
    if device == "cpu":
        table["inside MagnitudePruning's stations"] = turns.inside_of("MagnitudePruning", table["dense"]["seconds"])
    return table


def peak(name: str, model: str, batch: int) -> float:
    """Peak memory growth in MiB over six steps of one variant."""
    return growth(lambda: train(model, batch, 6, [name]))


def places(options: Options) -> list[tuple[str, int]]:
    """Models and batch sizes to measure."""
    if options.quick:
        return [("quick", 32)]
    models, batches = (("mlp", "resnet18", "vit"), (32, 128)) if options.device == "cpu" else (("resnet18", "vit"), (128,))
    return [(model, batch) for model in models for batch in batches]


def parts(options: Options) -> Parts:
    for model, batch in places(options):
        for precision in ["32-true"] if options.device == "cpu" else ["32-true", "16-mixed"]:
            title = f"step, {model}, batch {batch}, {precision}, {options.device}"
            rounds = ROUNDS.get((model, batch), 6) if options.device == "cpu" else 40
            yield (title,), partial(steps, model, batch, options.times(rounds), options.device, precision)


def takes(model: str) -> list[str]:
    """The variants that can train a model.

    `MultiheadAttention` reads the weight of its last layer without calling that layer. A product computed before each
    forward pass is therefore not recomputed, and the second backward pass fails.
    """
    return [way for way in WAYS if model != "vit" or way not in ("ModelPruning", "torch.nn.utils.prune")]


def memory_parts(options: Options, module: str = "benchmarks.overhead", takes: Callable[[str], list[str]] = takes) -> Parts:
    """Measure the peak memory of all variants, interleaved, several times. The first variant is `dense`."""
    for turn in range(options.times(2, quick=1)):
        for model, batch in places(options):
            for name in takes(model):
                yield (f"{model}, batch {batch}", name, turn), partial(alone, module, name, model, str(batch))


if __name__ == "__main__":
    print(peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))
