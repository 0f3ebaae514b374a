"""Methods that exercise one station each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_sparse.loop import Sparsifier, Step


class L2Penalty(Sparsifier):
    """Exercises the station for penalties on weights: half the squared norm."""

    def __init__(self, strength: float, **options: Any) -> None:
        super().__init__(**options)
        self.strength = strength

    def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
        for name, weight in step.weights.items():
            yield name, self.strength * weight.detach()


class FeaturePenalty(Sparsifier):
    """Exercises the station for penalties on features: the mean square of the first layer's output."""

    def __init__(self, strength: float, **options: Any) -> None:
        super().__init__(**options)
        self.strength = strength
        self.feature: Tensor | None = None
        self.handle: Any = None

    def begin(self) -> None:
        self.resume()

    def resume(self) -> None:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.feature = output

        self.handle = self.run.module.net[0].register_forward_hook(keep)

    def feature_penalty(self) -> Tensor | None:
        return None if self.feature is None else self.strength * self.feature.float().square().mean()

    def release(self) -> None:
        self.feature = None
        if self.handle is not None:
            self.handle.remove()


class UnitNorm(Sparsifier):
    """Exercises the station for projections other than masks: every weight tensor on the unit sphere."""

    def begin(self) -> None:
        for weight in self.weights.values():
            weight.div_(weight.norm())

    def project(self, step: Step) -> None:
        for weight in step.weights.values():
            weight.div_(weight.norm())


class Swap(Sparsifier):
    """Takes gradients away before the step and notes what happened."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def before_step(self, step: Step) -> None:
        self.events.append("before")

    def after_step(self, step: Step) -> None:
        self.events.append("after")

    def undo_step(self, step: Step) -> None:
        self.events.append("undo")
