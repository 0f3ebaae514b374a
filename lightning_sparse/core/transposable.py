"""N:M in both directions: a weight and its transpose keep n of every m neighbors."""

from __future__ import annotations

from typing import final

from torch import Tensor

from lightning_sparse.core.layout import Layout
from lightning_sparse.core.structure import NOfM
from lightning_sparse.core.target import Target
from lightning_sparse.functional import transposable_mask

__all__ = ["Transposable"]


@final
class Transposable(NOfM):
    """n kept of every m consecutive inputs, and of every m consecutive outputs: the backward pass finds n:m too.

    Args:
        n: how many are kept.
        m: of how many, at most 4.
    """

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        if m > 4:
            raise ValueError(
                f"structure='transposable {n}:{m}' has more patterns than can be searched; take groups of at most 4, as "
                "'transposable 2:4'."
            )

    @property
    def text(self) -> str:
        return f"transposable {self.n}:{self.m}"

    def misfit(self, target: Target) -> str | None:
        reason = super().misfit(target)
        if reason is not None:
            return reason
        outputs = target.shape[target.output_dim]
        if outputs % self.m:
            return f"has {outputs} outputs, and structure='{self.text}' needs groups of {self.m} of them too"
        return None

    def best(self, score: Tensor, target: Target) -> Tensor:
        return transposable_mask(score, self.n, self.m, (target.output_dim, target.input_dim))

    def layout(self, target: Target) -> Layout | None:
        if target.layout is not None and target.output_dim in target.layout.cut:
            raise ValueError("needs all inputs and outputs on one rank")
        return super().layout(target)
