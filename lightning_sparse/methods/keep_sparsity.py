"""Fine-tune a model that is already sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, final

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sparse.core import RunLength, Target, add_up, check_sparsity, read_masks
from lightning_sparse.families import Masked
from lightning_sparse.functional import find_n_m
from lightning_sparse.loop import Shards

__all__ = ["KeepSparsity"]


@final
class KeepSparsity(Masked):
    """Fine-tune a model that is already sparse, and keep its zeros at zero.

    Runs at station `begin`; afterwards it costs what every mask costs. Weights that are zero when training starts (after a
    checkpoint was loaded, whatever pruned it) stay zero; or a file specifies the zeros. Before the first batch a table shows
    what was found in each layer, n:m patterns included.

    Two kinds of weights stay dense: those with fewer zeros than `min_sparsity`, which are zeros by chance, and those that
    are entirely zero, which is an initialization (the second matrix of an adapter, the last layer of a residual branch).
    Frozen weights keep their zeros at no cost, also after they are unfrozen.

    Args:
        source: a file that specifies which weights are zero: a checkpoint, a state dict, safetensors, or masks (True =
            kept); None uses the zeros in the weights themselves.
        min_sparsity: the minimum fraction of zeros for a weight to count as sparse, in [0, 1).
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: at the start of fit, if no weight is sparse, or the file does not fit the model.

    Example:
        >>> KeepSparsity(min_sparsity=0.2).label
        'KeepSparsity'
    """

    takes_frozen: ClassVar[bool] = True
    shards: ClassVar[Shards] = "any"
    refused: ClassVar = dict.fromkeys(
        ("sparsity", "allocation", "structure", "layer_sparsity"),
        "it keeps the zeros that are there; to remove more, use a method that prunes, such as MagnitudePruning",
    )

    def __init__(
        self,
        *,
        source: str | Path | None = None,
        min_sparsity: float = 0.01,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.source = None if source is None else str(source)
        self.min_sparsity = min_sparsity
        check_sparsity("min_sparsity", min_sparsity)
        self._found: dict[str, Tensor] = {}
        self._zeros: dict[str, int] = {}

    def check(self, run: RunLength, until: float = 1.0) -> None:
        if self.brought is not None or self.goes_on:
            return
        weights = self.weights
        if self.source is None:
            self._found = {name: weight.detach() != 0 for name, weight in weights.items()}
        else:
            masks = read_masks(self.source, {target.name: target.shape for target in self.chosen}, "source")
            for target in self.chosen:
                mask = masks[target.name] if target.layout is None else target.layout.local(masks[target.name])
                self._found[target.name] = mask.to(weights[target.name].device)
        self._zeros = self._counted({name: ~mask for name, mask in self._found.items()})
        if not any(map(self._is_sparse, self.chosen)):
            self._refuse_dense()

    def begin(self) -> None:
        super().begin()
        rank_zero_info("\n".join([f"{self.label} found:", *self._table()]))
        self.set_masks({target.name: self._found[target.name] for target in self.chosen if self._is_sparse(target)})
        self._found = {}
        counts = self.masks.counts
        self.promise(sum(counts.values()), counts)

    def release(self) -> None:
        self._found = {}
        super().release()

    def _counted(self, flags: Mapping[str, Tensor]) -> dict[str, int]:
        """How many entries of whole weights are flagged; all ranks must call it."""
        return add_up({name: flag.count_nonzero() for name, flag in flags.items()}, self.layouts.get("entries", {}))

    def _is_sparse(self, target: Target) -> bool:
        zeros = self._zeros[target.name]
        return 0 < zeros < target.size and zeros / target.size >= self.min_sparsity

    def _refuse_dense(self) -> None:
        zeros = {target.name: self._zeros[target.name] / target.size for target in self.chosen}
        partly = {name: share for name, share in zeros.items() if share < 1}
        name = max(partly or zeros, key=lambda name: zeros[name])
        where = "the model" if self.source is None else f"source='{self.source}'"
        raise ValueError(
            f"{self.label} found no sparse weight in {where}: '{name}' has the most zeros, {zeros[name]:.2%}, and "
            f"min_sparsity={self.min_sparsity}; load a sparse checkpoint before training, or prune with a method such as "
            "MagnitudePruning."
        )

    def _table(self) -> list[str]:
        written = {name: weight.detach()[~self._found[name]] != 0 for name, weight in self.weights.items()}
        changed = self._counted(written) if self.source else {}
        rows = [("layer", "zeros", "sparsity", "pattern", "")]
        rows += [self._row(target, changed.get(target.name, 0)) for target in self.chosen]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _row(self, target: Target, written: int) -> tuple[str, str, str, str, str]:
        zeros, sparse, mask = self._zeros[target.name], self._is_sparse(target), self._found[target.name]
        pattern = None
        if sparse and target.layout_known:
            whole = mask if target.layout is None else target.layout.gather(mask)
            pattern = find_n_m(whole, target.input_dim) if whole.numel() else None  # only the first rank holds it
        notes = []
        if zeros == target.size:
            notes.append("left dense: entirely zero, an initialization")
        elif not sparse:
            notes.append("left dense" + (": zeros by chance" if zeros else ""))
        if not target.weight.requires_grad:
            notes.append("frozen")
        if sparse and written:
            notes.append(f"{written:,} of them are now set to zero")
        share, counts = f"{zeros / target.size:.2%}", f"{zeros:,} of {target.size:,}"
        return target.name, counts, share, ":".join(map(str, pattern or ())), "; ".join(notes)
