"""Where connections grow: by gradient (RigL), at random (SET), and by gradient with a batch norm that cannot amplify.

    python -m benchmarks desk-growth --data DIR

The network is a half-width ResNet-20 on CIFAR-10 at 98%, with the recipe of `desk-resnet20` in two epochs. At every update,
over the layers with at least 16 outputs, three fractions are recorded: new connections that go to outputs without any
remaining connection, outputs of this kind, and new connections of a layer that go to a single output.

A batch norm divides by the standard deviation of its input, or by the square root of `eps` where the deviation is zero. This
makes the gradients of an output without connections up to 316 times larger than at a deviation of one. With eps = 0.1, the
factor is three.
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
    """Set `eps`, which is added to the variance, in every batch norm."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = self.eps


class Growth(L.Callback):
    """Record where connections have grown since the previous batch."""

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
        """Means over all updates, weighted by growth, and the final fraction of outputs without connections."""
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
    """The outputs that new connections go to, from the masks of each layer before and after an update."""
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
    """A setting that records growth. Appending `, eps=0.1` to the name of a method sets `eps` in every batch norm."""

    def callbacks(self, method: str, sparsity: float) -> list[L.Callback]:
        name, comma, _ = method.partition(", eps=0.1")
        callbacks = METHODS[name](sparsity) + ([Epsilon(0.1)] if comma else [])
        return [*callbacks, Growth(callbacks[0])]

    def read(self, module: nn.Module, callbacks: Sequence[L.Callback], *rest: Any) -> dict[str, Any]:
        return callbacks[-1].shares()
