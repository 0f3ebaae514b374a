"""Where connections grow: by gradient (RigL), by chance (SET), and by gradient behind a batch norm that cannot amplify.

    python -m benchmarks.growth --data DIR           two epochs, three seeds; goes on where it was interrupted
    python -m benchmarks.growth --data DIR --table   print the table of what is there
    python -m benchmarks.growth --quick              on scikit-learn's digits, to see that it runs

A half-width ResNet-20 on CIFAR-10 at 98 %, the recipe of `--suite desk-resnet20`, shortened. At every update, over the
layers with 16 outputs or more: how much of what grows goes into outputs that have no connection left, how many outputs those
are, and how much of what a layer grows goes into one output. A batch norm divides by the deviation of its input, and by the
root of `eps` where that is zero, which makes the gradients of an output without connections up to 316 times larger than at a
deviation of one. With eps = 0.1 it is three times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.accuracy import METHODS, SETTINGS, have_data, load, refuse_other_results, train
from benchmarks.record import RESULTS, machine
from lightning_sparse import SET, RigL
from lightning_sparse.data import Digits
from lightning_sparse.families import Rewiring

WAYS: dict[str, Callable[[], list[L.Callback]]] = {
    "RigL": lambda: [RigL(0.98)],
    "RigL, eps=0.1": lambda: [RigL(0.98), Epsilon(0.1)],
    "SET": lambda: [SET(0.98)],
}


class Epsilon(L.Callback):
    """Every batch norm adds this to the variance."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = self.eps


class Growth(L.Callback):
    """Notes where connections have grown since the batch before."""

    def __init__(self, method: Rewiring) -> None:
        self.method = method
        self.masks: dict[str, Tensor] = {}
        self.updates: list[dict[str, float]] = []
        self.outputs = self.without = 0

    def on_train_batch_end(self, *args: Any) -> None:
        wide = [name for name, weight in self.method.weights.items() if len(weight) >= 16]
        masks = {name: self.method.masks[name] for name in wide}
        pairs = [(self.masks[name], masks[name]) for name in wide] if self.masks else []
        if any((new & ~old).any() for old, new in pairs):
            self.updates.append(where(pairs))
        self.masks = masks
        self.outputs = sum(len(mask) for mask in masks.values())
        self.without = sum(int((~mask.flatten(1).any(1)).sum()) for mask in masks.values())


def where(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of the masks of each layer before and after an update: which outputs its new connections go into.

    Example:
        >>> old, new = torch.tensor([[True, False], [False, False]]), torch.tensor([[True, True], [False, True]])
        >>> where([(old, new)])
        {'grown': 2, 'into outputs without connections': 0.5, 'outputs without connections': 0.5, 'into one output': 0.5}
    """
    stay = [(old & new).flatten(1).sum(1) for old, new in pairs]
    grown = [(new & ~old).flatten(1).sum(1) for old, new in pairs]
    total = sum(int(g.sum()) for g in grown)
    return {
        "grown": total,
        "into outputs without connections": sum(int(g[s == 0].sum()) for g, s in zip(grown, stay, strict=True)) / total,
        "outputs without connections": sum(int((s == 0).sum()) for s in stay) / sum(len(s) for s in stay),
        "into one output": sum(int(g.max()) for g in grown) / total,
    }


def measure(way: str, seed: int, root: str, quick: bool) -> dict[str, Any]:
    """One training."""
    callbacks = WAYS[way]()
    method = next(callback for callback in callbacks if isinstance(callback, Rewiring))
    growth = Growth(method)
    setting = SETTINGS["resnet20-half-cifar10"]
    METHODS[f"{way}, watched"] = lambda sparsity: [*callbacks, growth]
    if quick:
        setting = replace(setting, data=Digits)  # type: ignore[type-var]
    numbers = train(setting, f"{way}, watched", 0.98, seed, root, epochs=2)
    total = sum(update["grown"] for update in growth.updates)
    shares = {
        key: round(sum(update["grown"] * update[key] for update in growth.updates) / total, 4)
        for key in growth.updates[0]
        if key != "grown"
    }
    return {**shares, "in the end": round(growth.without / growth.outputs, 4), "test": numbers["test"]}


def table(runs: list[dict[str, Any]]) -> str:
    keys = ["into outputs without connections", "outputs without connections", "into one output", "in the end", "test"]
    lines = []
    for way in WAYS:
        found = [run for run in runs if run["way"] == way]
        if found:
            cells = [f"{key} {statistics.mean(100 * run[key] for run in found):.1f} %" for key in keys]
            lines.append(f"{way:15s} {', '.join(cells)} ({len(found)})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch the data if they are not in that folder")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", ".*does not have many workers|.*tensorboard")
    path = RESULTS / "growth.json"
    found = {"runs": []} if options.quick else load(path)
    refuse_other_results(found, {})
    runs: list[dict[str, Any]] = found["runs"]
    if not (options.table or options.quick):
        have_data(SETTINGS["resnet20-half-cifar10"], options.data, options.download)
    for seed in () if options.table else (0,) if options.quick else (0, 1, 2):
        for way in WAYS:
            if any((run["way"], run["seed"]) == (way, seed) for run in runs):
                continue
            runs.append({"way": way, "seed": seed, **measure(way, seed, options.data, options.quick)})
            if not options.quick:
                command = {"command": "python -m benchmarks.growth --data DIR", "machine": machine()}
                path.write_text(json.dumps({**command, "runs": runs}, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
