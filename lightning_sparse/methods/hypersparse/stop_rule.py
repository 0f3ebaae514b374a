"""When a pruned copy has caught up with the dense model it was taken from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_sparse.core import Piece, whole

__all__ = ["Attempt", "StopRule"]


@dataclass(frozen=True, eq=False)
class Attempt:
    """A pruned copy, kept on the CPU.

    Args:
        epoch: the epoch after which it was taken.
        score: score of its predictions; higher is better.
        state: its whole state dict.
        masks: what `MaskSet.pieces` returns.
    """

    epoch: int
    score: float
    state: dict[str, Tensor | Piece]
    masks: dict[str, Any]


class StopRule:
    """The stop rule of adaptive regularized training, with the quirks of the official code.

    The last 2 * radius + 1 attempts are kept. If their mean score exceeds the score of the best attempt so far, the attempt
    in the middle becomes the best. It has caught up as soon as its mean exceeds the dense score of the current epoch. Two
    quirks: a mean is compared with a single score, and the best attempt may be an old one (`stale`), which happens when the
    dense model has fallen below it.

    Source: Glandorf, Kaiser and Rosenhahn 2023, https://arxiv.org/abs/2308.07163, as in the official repository.

    Args:
        radius: number of attempts on each side of the middle.

    Example:
        >>> rule = StopRule()
        >>> [rule.add(Attempt(epoch, score, {}, {}), dense=0.9) for epoch, score in enumerate([0.2, 0.6, 0.95, 0.97])]
        [None, None, None, None]
        >>> rule.add(Attempt(4, 0.96, {}, {}), dense=0.9)
        'fresh'
        >>> rule.best.epoch
        3
    """

    def __init__(self, radius: int = 1) -> None:
        self.radius = radius
        self.reset()

    def reset(self) -> None:
        """Forget all attempts."""
        self.window: list[Attempt] = []
        self.best: Attempt | None = None
        self.mean = float("-inf")

    def add(self, attempt: Attempt, dense: float) -> str | None:
        """Add this epoch's attempt.

        Returns:
            None to continue; `fresh` if the best attempt was found in this epoch and has caught up; `stale` if it was found
            earlier.
        """
        self.window = [*self.window, attempt][-(2 * self.radius + 1) :]
        mean = sum(one.score for one in self.window) / len(self.window)
        fresh = self.best is None or mean > self.best.score
        if fresh:
            self.best, self.mean = self.window[min(len(self.window) - 1, self.radius)], mean
        if self.mean > dense:
            return "fresh" if fresh else "stale"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint; if the best attempt is also in the window, its tensors are stored once.

        With sharded weights, all ranks must call it.
        """
        attempts = [*self.window, *([] if self.best is None or self.best in self.window else [self.best])]
        best = None if self.best is None else next(i for i, one in enumerate(attempts) if one is self.best)
        return {
            "attempts": [whole(vars(one)) for one in attempts],
            "window": len(self.window),
            "best": best,
            "mean": self.mean,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        attempts = [Attempt(**saved) for saved in state["attempts"]]
        self.window = attempts[: state["window"]]
        self.best = None if state["best"] is None else attempts[state["best"]]
        self.mean = state["mean"]

    def to(self, weights: Mapping[str, Tensor]) -> None:
        """Attempts stay on the CPU."""
