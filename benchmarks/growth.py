"""Where connections grow: by gradient (RigL), by chance (SET), and by gradient behind a batch norm that cannot amplify.

    python -m benchmarks desk-growth --data DIR

A half-width ResNet-20 on CIFAR-10 at 98 %, the recipe of `desk-resnet20` in two epochs. At every update, over the layers
with 16 outputs or more: how much of what grows goes into outputs that have no connection left, how many outputs those are,
and how much of what a layer grows goes into one output. A batch norm divides by the deviation of its input, and by the root
of `eps` where that is zero, which makes the gradients of an output without connections up to 316 times larger than at a
deviation of one. With eps = 0.1 it is three times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor, nn

from benchmarks.accuracy import METHODS, Setting
from lightning_sparse.families import Rewiring


class Epsilon(L.Callback):
    """Every batch norm adds this to the variance."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = self.eps


class Growth(L.Callback):
    """Records where connections have grown since the previous batch."""

    def __init__(self, method: Rewiring) -> None:
        self.method = method
        self.masks: dict[str, Tensor] = {}
        self.updates: list[dict[str, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        masks = {name: self.method.masks[name] for name, weight in self.method.weights.items() if len(weight) >= 16}
        pairs = [(self.masks[name], masks[name]) for name in masks] if self.masks else []
        if any((new & ~old).any() for old, new in pairs):
            self.updates.append(where(pairs))
        self.masks = masks

    def shares(self) -> dict[str, float]:
        """Growth over all updates, and the final number of outputs without connections."""
        total = sum(update["grown"] for update in self.updates)
        empty = [~mask.flatten(1).any(1) for mask in self.masks.values()]
        return {
            **{
                key: round(sum(update["grown"] * update[key] for update in self.updates) / total, 4)
                for key in self.updates[0]
                if key != "grown"
            },
            "in the end": round(sum(int(none.sum()) for none in empty) / sum(len(none) for none in empty), 4),
        }


def where(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Of the masks of each layer before and after an update: which outputs its new connections go into."""
    stay = [(old & new).flatten(1).sum(1) for old, new in pairs]
    grown = [(new & ~old).flatten(1).sum(1) for old, new in pairs]
    total = sum(int(g.sum()) for g in grown)
    return {
        "grown": total,
        "into outputs without connections": sum(int(g[s == 0].sum()) for g, s in zip(grown, stay, strict=True)) / total,
        "outputs without connections": sum(int((s == 0).sum()) for s in stay) / sum(len(s) for s in stay),
        "into one output": sum(int(g.max()) for g in grown) / total,
    }


@dataclass(frozen=True)
class Watched(Setting):
    """A setting in which growth is recorded; `, eps=0.1` after the name of a method sets it for every batch norm."""

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        name, comma, _ = method.partition(", eps=0.1")
        callbacks = METHODS[name](sparsity) + ([Epsilon(0.1)] if comma else [])
        return [*callbacks, Growth(callbacks[0])]

    def read(self, module: nn.Module, callbacks: Sequence[L.Callback], *rest: Any) -> dict[str, Any]:
        return callbacks[-1].shares()
