"""A set of masks: one bit of knowledge per weight, a byte in memory, a bit on disk."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional import pack, unpack

__all__ = ["MaskSet"]


class MaskSet:
    """The masks of named weights; True = kept.

    Example:
        >>> masks = MaskSet({"fc.weight": torch.ones(2, 2)})
        >>> masks.replace({"fc.weight": torch.tensor([[True, False], [True, True]])})
        >>> masks.kept, masks.total, masks.sparsity
        (3, 4, 0.25)
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        # Stored the other way round, because filling where True is the fast direction: multiplying a float tensor
        # by a boolean one takes ten times as long on a CPU, and would turn an infinite gradient into NaN.
        self._dropped = {
            name: torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            for name, weight in (weights or {}).items()
        }
        self._kept = {name: dropped.numel() for name, dropped in self._dropped.items()}
        self.changed = False
        """Set by `replace` and `load_state_dict`; whoever has looked after the change sets it back."""

    def __getitem__(self, name: str) -> Tensor:
        return ~self._dropped[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dropped)

    def __len__(self) -> int:
        return len(self._dropped)

    def __contains__(self, name: object) -> bool:
        return name in self._dropped

    def dropped(self, name: str) -> Tensor:
        """The complement of the mask, without a copy; not to be written to."""
        return self._dropped[name]

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Exchange the masks of some weights."""
        for name, mask in masks.items():
            if mask.shape != self._dropped[name].shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"The mask of '{name}' must be boolean of shape {tuple(self._dropped[name].shape)}, "
                    f"not {mask.dtype} of shape {tuple(mask.shape)}."
                )
            self._dropped[name] = (~mask).to(self._dropped[name].device)
            self._kept[name] = int(mask.count_nonzero())
            self.changed = True

    @torch.no_grad()
    def apply_(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Set dropped entries of the given tensors to zero, in place; names without a mask pass through."""
        for name, tensor in tensors.items():
            if tensor is not None and name in self._dropped:
                tensor.masked_fill_(self._dropped[name], 0)

    @property
    def counts(self) -> dict[str, int]:
        """How many entries of each weight are kept."""
        return dict(self._kept)

    @property
    def kept(self) -> int:
        """How many entries are kept."""
        return sum(self._kept.values())

    @property
    def total(self) -> int:
        """How many entries there are."""
        return sum(dropped.numel() for dropped in self._dropped.values())

    @property
    def sparsity(self) -> float:
        """The fraction of entries that are dropped."""
        return 1 - self.kept / self.total if self.total else 0.0

    def to(self, weights: Mapping[str, Tensor]) -> None:
        """Move each mask to the device of its weight."""
        self._dropped = {name: dropped.to(weights[name].device) for name, dropped in self._dropped.items()}

    def fingerprint(self) -> Tensor:
        """One number per mask, in order; two sets with equal numbers have, but for rare chance, equal masks."""
        sums = [zlib.crc32(pack(dropped).cpu().numpy().tobytes()) for dropped in self._dropped.values()]
        return torch.tensor(sums, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Masks at one bit per weight."""
        return {
            name: {"shape": list(dropped.shape), "kept": pack(~dropped).cpu()} for name, dropped in self._dropped.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, on the CPU."""
        self._dropped = {name: ~unpack(saved["kept"], tuple(saved["shape"])) for name, saved in state.items()}
        self.changed = True
        self._kept = {name: dropped.numel() - int(dropped.count_nonzero()) for name, dropped in self._dropped.items()}
