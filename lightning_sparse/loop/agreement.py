"""Checks that all ranks hold the same masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lightning_sparse.core import Masks, MaskSet
from lightning_sparse.loop.method import Method
from lightning_sparse.loop.run import Run

__all__ = ["Agreement"]


class Agreement:
    """Compares the masks of all ranks after each change.

    Args:
        run: the running fit.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._alone = run.trainer.world_size == 1
        self._compared: dict[int, int] = {}

    def compare(self, methods: Sequence[Method], live: bool = False) -> None:
        """After masks change: ranks that hold the same block of a weight must hold the same mask of it.

        Args:
            methods: methods that own the masks.
            live: also compare masks that change in every step.

        Raises:
            RuntimeError: naming the first weight whose masks differ.
        """
        for method, masks in self.changed(methods, live):
            if self._alone:
                continue
            strategy = self.run.trainer.strategy
            mine = torch.stack([masks.whereabouts(), masks.fingerprint()]).to(strategy.root_device)
            blocks, prints = strategy.all_gather(mine).unbind(1)
            same_block = blocks.unsqueeze(0) == blocks.unsqueeze(1)
            differ = prints.unsqueeze(0) != prints.unsqueeze(1)
            wrong = (same_block & differ).flatten(0, 1).any(0).nonzero().flatten().tolist()
            if wrong:
                raise RuntimeError(
                    f"{method.label}: the ranks hold different masks of '{list(masks)[wrong[0]]}'; a score or a random "
                    "choice was computed from the data of one rank only."
                )

    def changed(self, methods: Sequence[Method], live: bool) -> Iterator[tuple[Method, Masks]]:
        """Masks that have changed since the last comparison."""
        for method in methods:
            masks = method.mask_set
            if isinstance(masks, MaskSet):
                if masks.changes != self._compared.get(id(method)):
                    self._compared[id(method)] = masks.changes
                    yield method, masks
            elif masks is not None and live:
                yield method, masks
