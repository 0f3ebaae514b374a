"""SparseGPT: one-shot pruning in which the remaining weights compensate for the removed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_sparse.core import (
    InputTap,
    NOfM,
    Reading,
    ShapeAllocationName,
    StructureName,
    Target,
    Unstructured,
    as_matrix,
    check_whole,
    from_matrix,
)
from lightning_sparse.families.sees_inputs import Enough, SeesInputs
from lightning_sparse.functional import compensate, inverse_factor

__all__ = ["SparseGPT"]


@final
class SparseGPT(SeesInputs):
    r"""Before the first batch, remove weights so that the outputs of every layer change least; then train with a fixed mask.

    Prunes layer after layer, in the order in which they are called, each on the inputs that it gets from the layers already
    pruned. The products of a layer's inputs determine which weights can be removed and how the others compensate. Runs at
    station `begin`: one forward pass per batch and layer, up to that layer (layers that read the same input share one), and
    time of the order of columns cubed. Meanwhile, memory holds a copy of the module, the batches, and two matrices of
    columns by columns of one layer. Sums are in float32 and over all ranks. Afterwards it costs what every mask costs.

    Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    https://arxiv.org/abs/2301.00774, algorithm 1. There all layers of a transformer block read inputs from before the block
    was pruned.

    Args:
        sparsity: the fraction removed, in [0, 1); optional with `structure='n:m'`.
        batches: number of training batches used, on every rank. A layer needs more rows (tokens, positions) than it has
            columns, otherwise the damping dominates.
        damping: added to the diagonal, as a fraction of its mean; positive.
        block_size: number of columns whose mask is decided together.
        allocation: how sparsity is distributed over the layers: `uniform`, `uniform+`, `er`, `erk`, `erk+`.
        structure: what is removed: `unstructured`, or `n:m`.
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: at the start of fit, if a layer is never reached, such as an expert without tokens, or all its inputs are
            zero.

    Example:
        >>> SparseGPT(sparsity=0.5, batches=16).label
        'SparseGPT'
    """

    has_scores: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        batches: int = 8,
        damping: float = 0.01,
        block_size: int = 128,
        allocation: ShapeAllocationName = "uniform",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            targets=targets,
            name=name,
        )
        self.batches, self.damping, self.block_size = batches, damping, block_size
        check_whole("batches", batches, 1)
        check_whole("block_size", block_size, 1)
        if not (isinstance(damping, int | float) and 0 < damping < float("inf")):
            raise ValueError(f"damping={damping!r} must be a positive number, such as 0.01.")
        if self.quota.allocation == "global":
            raise ValueError(
                "allocation='global' would compare scores of layers that are pruned one after the other; use 'uniform', "
                "or another rule for layers."
            )
        if not isinstance(self.quota.structure, Unstructured | NOfM):
            raise ValueError(
                f"structure='{structure}' removes whole outputs, for which no other weight of a layer can compensate; use "
                "'unstructured' or 'n:m'."
            )

    def begin(self) -> None:
        super().begin()
        kept, weights = self.plan.kept_weights()[1], self.weights
        masks: dict[str, Tensor] = {}
        with self.calibration() as (twin, send):
            copies = dict(twin.named_parameters())
            order, repeated = self._order(twin, send)
            for names in order:
                products, dead = self._products(twin, send, names[0], names[0] in repeated)
                factor = self._factor(products, names[0])
                for name in names:
                    target = self.targets_by_name[name]
                    solved, masks[name] = self._solve(target, factor, dead, kept[name])
                    copies[name].copy_(solved)
            for name, weight in weights.items():  # only when all layers are done: one of them may be refused
                weight.copy_(copies[name])
        self.set_masks(masks)

    def _solve(self, target: Target, factor: Tensor, dead: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """The weights of a layer, and its mask."""
        structure = self.quota.structure
        matrix = as_matrix(target, target.weight.detach()).to(factor.dtype, copy=True)
        matrix = matrix.reshape(len(factor), -1, matrix.shape[-1])  # one group if all parts read the same input
        n_m = (structure.n, structure.m) if isinstance(structure, NOfM) else None
        mask = compensate(matrix, factor, keep, n_m=n_m, dead=dead, block_size=self.block_size)
        return from_matrix(target, matrix), from_matrix(target, mask)

    def _factor(self, products: Tensor, name: str) -> Tensor:
        try:
            return inverse_factor(products, self.damping)
        except ValueError as error:
            raise ValueError(
                f"{self.label}: '{name}' cannot be pruned on batches={self.batches}. {error} Use other batches, or leave "
                f"it dense with targets=['!{name.rpartition('.')[0]}']."
            ) from None

    def _products(
        self, twin: LightningModule, send: Callable[..., None], name: str, repeated: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums of products of the inputs of a layer, and which inputs are always zero."""
        target = self.targets_by_name[name]
        groups, _, columns = as_matrix(target, target.weight).shape
        dtype = torch.promote_types(target.weight.dtype, torch.float32)
        products = torch.zeros(groups, columns, columns, dtype=dtype, device=target.weight.device)

        def add(name: str, reading: Reading) -> None:
            for part, rows in reading.rows(dtype):
                rows = rows.expand(len(products[part]), -1, -1)
                products[part].baddbmm_(rows.transpose(1, 2), rows)
            if not repeated:
                raise Enough  # for this batch: nothing after the layer matters

        tap = InputTap(twin, [name], add)
        send()
        tap.remove()
        products = self.everywhere(products)
        if target.parts > 1 and all(part.equal(products[0]) for part in products[1:]):
            products = products[:1]
        return products, products.diagonal(dim1=-2, dim2=-1) == 0

    def _order(self, twin: LightningModule, send: Callable[..., None]) -> tuple[list[list[str]], set[str]]:
        """The order in which layers are called, the same on all ranks, and which are called more than once per batch.

        Raises:
            ValueError: if one is called on no rank.
        """
        notes = _Order()
        tap = InputTap(twin, [*self.weights], notes.note)
        send(notes.end_batch)
        tap.remove()
        calls = torch.tensor([float(notes.calls.get(name, 0)) for name in self.weights], device=self.run.module.device)
        for name, count in zip(self.weights, self.everywhere(calls).tolist(), strict=True):
            if count == 0:
                self.refuse_unreached(name)
        groups: list[list[str]] = self.run.trainer.strategy.broadcast(notes.groups)
        known = {name for names in groups for name in names}
        return [*groups, *([name] for name in self.weights if name not in known)], notes.repeated


class _Order:
    """Records which layers are called, in which order, and which of them read the same input."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.repeated: set[str] = set()
        """Layers that are called more than once per batch."""
        self._in_batch: set[str] = set()
        self._leaders: dict[str, str] = {}
        self._last: tuple[str, Tensor, int] | None = None

    def note(self, name: str, reading: Reading) -> None:
        """Record a call of a layer."""
        self.calls[name] = self.calls.get(name, 0) + 1
        if name in self._in_batch:
            self.repeated.add(name)
        self._in_batch.add(name)
        leader, inputs = name, reading.single
        if self._last is not None and inputs is not None:
            first, before, version = self._last
            same = inputs.data_ptr() == before.data_ptr() and inputs.shape == before.shape
            if same and inputs.stride() == before.stride() and inputs._version == version:
                leader = first
        if leader == name:  # kept, so that no other tensor can reuse its memory
            self._last = None if inputs is None else (name, inputs, inputs._version)
        if self._leaders.setdefault(name, leader) != leader:
            self._leaders[name] = name

    def end_batch(self) -> None:
        """All calls of a batch have been recorded."""
        self._in_batch.clear()
        self._last = None

    @property
    def groups(self) -> list[list[str]]:
        """Layers in the order of their first call; those that always read the same input are grouped."""
        found: dict[str, list[str]] = {}
        for name, count in self.calls.items():
            leader = self._leaders[name]
            follows = leader in found and self.calls[leader] == count and not {name, leader} & self.repeated
            found[leader].append(name) if follows else found.update({name: [name]})
        return [*found.values()]
