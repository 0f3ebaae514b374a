"""What is removed as one piece: a weight, all but n of m neighbours, or an output channel."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from lightning_sparse.core.targets import Target
from lightning_sparse.functional import channel_score, expand_channels, n_m_mask

__all__ = ["Channels", "NOfM", "Structure", "Unstructured", "parse_structure"]


class Structure(ABC):
    """Turns scores of weights into scores of units, and masks of units into masks of weights."""

    def check(self, target: Target) -> None:  # noqa: B027 - most structures fit every weight
        """Raise a ValueError if this weight cannot have the structure."""

    @abstractmethod
    def units(self, target: Target) -> int:
        """How many units the weight has."""

    @abstractmethod
    def score(self, score: Tensor, target: Target) -> Tensor:
        """One score per unit."""

    @abstractmethod
    def expand(self, kept: Tensor, target: Target) -> Tensor:
        """The mask of the weight from the mask of its units."""

    @property
    def sparsity(self) -> float | None:
        """The only sparsity the structure allows, or None if any."""
        return None


@final
class Unstructured(Structure):
    """Every weight by itself."""

    def units(self, target: Target) -> int:
        return target.weight.numel()

    def score(self, score: Tensor, target: Target) -> Tensor:
        return score

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return kept


@final
class NOfM(Structure):
    """At most n kept of every m consecutive inputs; `2:4` runs on sparse tensor cores.

    The n best of each group are out of reach, and the others compete as single weights: a gradual schedule thins
    the groups step by step and ends exactly at n of m.
    """

    def __init__(self, n: int, m: int) -> None:
        if not 0 < n < m:
            raise ValueError(f"structure='{n}:{m}' must keep some and remove some: write 'n:m' with 0 < n < m, as '2:4'.")
        self.n, self.m = n, m

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def check(self, target: Target) -> None:
        inputs = target.weight.shape[target.input_dim]
        if inputs % self.m:
            raise ValueError(
                f"structure='{self.n}:{self.m}' needs inputs in groups of {self.m}, but '{target.name}' has {inputs}; "
                f"exclude it with targets=['!{target.name}']."
            )

    def units(self, target: Target) -> int:
        return target.weight.numel()

    def score(self, score: Tensor, target: Target) -> Tensor:
        return score.masked_fill(n_m_mask(score, self.n, self.m, target.input_dim), torch.inf)

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return kept


@final
class Channels(Structure):
    """Whole output channels: filters of a convolution, neurons of a linear layer."""

    def check(self, target: Target) -> None:
        if target.transposed and target.groups > 1:
            raise ValueError(
                f"structure='channel' is not defined for the grouped transposed convolution '{target.name}', where one "
                f"row serves several outputs; exclude it with targets=['!{target.name}']."
            )

    def units(self, target: Target) -> int:
        return target.weight.shape[target.output_dim]

    def score(self, score: Tensor, target: Target) -> Tensor:
        return channel_score(score, target.output_dim)

    def expand(self, kept: Tensor, target: Target) -> Tensor:
        return expand_channels(kept, target.weight, target.output_dim)


def parse_structure(text: str | int) -> Structure:
    """`unstructured`, `channel`, or `n:m`.

    Raises:
        ValueError: if it is none of them.
    """
    if not isinstance(text, str):
        if isinstance(text, int) and text >= 60:
            meant = f"{text // 60}:{text % 60}"
            raise ValueError(f"structure={text} is how YAML reads {meant}; write '{meant}', in quotes.")
        raise ValueError(f"structure={text!r} is unknown; write 'unstructured', 'channel' or 'n:m' such as '2:4'.")
    if text == "unstructured":
        return Unstructured()
    if text == "channel":
        return Channels()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NOfM(int(match[1]), int(match[2]))
    raise ValueError(f"structure='{text}' is unknown; write 'unstructured', 'channel' or 'n:m' such as '2:4'.")
