"""Pruning at initialization: score once before the first batch, then train with a fixed mask."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sparse.core import (
    AllocationName,
    BudgetName,
    RunLength,
    StructureName,
    check_whole,
    lent_gradients,
    owner_of,
    parts_of,
)
from lightning_sparse.families.budgeted import Budgeted
from lightning_sparse.loop.dry_run import dry_run, loss_of, refuse_unrepeatable_data, size_of, training_outputs

__all__ = ["PruningAtInit", "PruningAtInitOnData"]


class PruningAtInit(Budgeted):
    """A method that chooses its mask at the beginning, by a score of the weights as they were initialized.

    At station `begin`; later at no cost but that of every mask. The scores are taken on a silent copy of the module, so
    weights, statistics, random numbers, data and logs stay as they are.

    Args:
        sparsity: the fraction removed, in [0, 1); may be left out for `structure='n:m'`.
        allocation: how sparsity is shared: `global` (scores of all layers compete), `uniform`, `uniform+`, `er`, `erk`,
            `erk+`, `owl` (more where scores have outliers). With `n:m` every layer has the same share.
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (the same,
            in all layers that additions couple, with biases and norms, so that they can leave the network), `heads` (of
            attention, which can leave too), `fan_in` (as many weights in every output), `block:RxC` (outputs by inputs),
            `n:m` or `transposable n:m` (both ways).
        layer_sparsity: layers with a sparsity of their own, glob -> sparsity, counted in the total.
        max_layer_sparsity: the largest share that a layer loses where layers compete, in (0, 1].
        budget: what sparsity counts: `units` (weights, or channels), or, with `coupled` or `heads`, the `macs` or the
            `parameters` of the whole network, to within one channel.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.
    """

    @abstractmethod
    def choose_masks(self) -> None:
        """Score the weights and set the masks; called once, gradients are enabled."""

    def begin(self) -> None:
        super().begin()
        with torch.enable_grad():
            self.choose_masks()

    def twin_weights(self, twin: nn.Module) -> list[nn.Parameter]:
        """The chosen weights of a copy of the module, in order."""
        parameters = parts_of(twin)
        return [parameters[name] for name in self.weights]

    def keep_best(self, scores: Sequence[Tensor]) -> None:
        """Remove the lowest scores, one tensor of them per weight, in order."""
        self.check_scores(scores)
        by_name = dict(zip(self.weights, scores, strict=True))
        self.prune(self.quota.sparsity, lambda name, weight: by_name[name])

    def check_scores(self, scores: Sequence[Tensor]) -> None:
        """Refuse scores that say nothing.

        Raises:
            ValueError: if one is infinite or NaN, or all are zero.
        """
        for name, bad in zip(self.weights, self._anywhere([~score.isfinite().all() for score in scores]), strict=True):
            if bad:
                raise ValueError(
                    f"{self.label}: the score of '{name}' at initialization is not finite; initialize smaller weights, or "
                    "prune by magnitude."
                )
        if not any(self._anywhere([score.any() for score in scores])):
            raise ValueError(
                f"{self.label}: every score at initialization is zero, so nothing flows through the network; initialize no "
                "layer with zeros, or prune by magnitude."
            )

    def _anywhere(self, flags: Sequence[Tensor]) -> list[bool]:
        """Whether each flag is true on any rank that holds a part of the weight."""
        return [bool(flag) for flag in flags] if self.spread is None else [n > 0 for n in self.spread.sums(flags)]


class PruningAtInitOnData(PruningAtInit):
    """A method whose score needs the user's own loss on batches of the user's own training set.

    In manual optimization the loss is the sum of all that `training_step` hands to `manual_backward`. Gradients are means
    over samples and ranks, as those of one large batch.

    Args:
        batches: how many batches of the training set are used, on every rank; where gradients are accumulated, how many
            times as many as one optimizer step takes.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        batches: int = 1,
        allocation: AllocationName = "global",
        structure: StructureName = "unstructured",
        layer_sparsity: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        budget: BudgetName = "units",
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(
            sparsity,
            allocation=allocation,
            structure=structure,
            layer_sparsity=layer_sparsity,
            max_layer_sparsity=max_layer_sparsity,
            budget=budget,
            targets=targets,
            name=name,
        )
        self.batches = batches
        check_whole("batches", batches, 1)

    def check(self, run: RunLength, until: float = 1.0) -> None:
        super().check(run, until)
        batches = self.run.trainer.num_training_batches
        if self.brought is None and self.batches > 1 and batches != float("inf"):
            most = -(-int(batches) // self.run.accumulation(self.run.trainer.current_epoch))
            if self.batches > most:
                raise ValueError(f"{self.label}: batches={self.batches} is more than an epoch has; write at most {most}.")

    def begin(self) -> None:
        refuse_unrepeatable_data(self.run.trainer, self.run.module, self.label)
        super().begin()

    def mean_over_data(self, derivatives: Callable[[LightningModule, Tensor], Iterable[Tensor]]) -> list[Tensor]:
        """The mean over samples and ranks of something that is computed from the loss of each batch.

        Every call goes through the same batches with the same random numbers.

        Args:
            derivatives: given a silent copy of the module and its loss, one tensor per chosen weight.

        Raises:
            ValueError: if there are no batches, or a loss cannot be differentiated.
        """
        sums = [torch.zeros_like(weight) for weight in self.weights.values()]
        count = 0
        for twin, loss, size in self._losses():
            count += size
            if self.spread is not None:  # the ranks' gradients are averaged before anybody sees them
                loss, size = loss * size, 1
            for total, tensor in zip(sums, derivatives(twin, loss), strict=True):
                total.add_(tensor.detach(), alpha=size)
        strategy = self.run.trainer.strategy
        everywhere = strategy.reduce(torch.tensor(float(count), device=strategy.root_device), reduce_op="sum")
        if float(everywhere) == 0:
            raise ValueError(
                f"{self.label} scores weights on batches of the training set, and it gave none; check the train_dataloader."
            )
        if self.spread is not None:  # gradients are means over ranks already
            return [total.mul_(self.run.trainer.world_size / everywhere) for total in sums]
        return [strategy.reduce(total, reduce_op="sum").div_(everywhere) for total in sums]

    def gradient(self, twin: LightningModule, loss: Tensor) -> list[Tensor]:
        """Of the loss of one batch by the chosen weights.

        Raises:
            ValueError: if the loss does not depend on one of them.
        """
        # Where weights are cut, the twin is the module itself, and shows other parameters between forward and backward.
        for weight in self.weights.values() if self.layouts else twin.parameters():
            owner_of(weight).grad = None
        loss.backward()  # type: ignore[no-untyped-call] # not autograd.grad: checkpointed activations refuse that
        weights = dict(zip(self.weights, self.twin_weights(twin), strict=True))
        with lent_gradients(weights):
            gradients = [weight.grad for weight in weights.values()]
        for name, gradient in zip(self.weights, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"{self.label}: the loss at initialization does not depend on '{name}'; exclude it with "
                    f"targets=['!{name}']."
                )
        return gradients  # type: ignore[return-value]

    def _losses(self) -> Iterator[tuple[LightningModule, Tensor, int]]:
        """A silent copy of the module, its loss on a batch, and the size of the batch."""
        trainer = self.run.trainer
        with dry_run(trainer, self.run.module) as twin:
            by_hand: list[Any] = []
            vars(twin)["manual_backward"] = lambda loss, *args, **kwargs: by_hand.append(loss)
            count = self.batches * self.run.accumulation(trainer.current_epoch)
            for batch, output in itertools.islice(training_outputs(trainer, twin), count):
                losses = [loss_of(output)] if twin.automatic_optimization else by_hand
                yield twin, self._total(losses), size_of(batch)
                by_hand.clear()

    def _total(self, losses: list[Any]) -> Tensor:
        wrong = [loss for loss in losses if not (isinstance(loss, Tensor) and loss.requires_grad)]
        if wrong or not losses:
            what = "no loss" if not losses else "a constant" if isinstance(wrong[0], Tensor) else repr(wrong[0])
            raise ValueError(
                f"{self.label} differentiates the loss at initialization, but training_step gave {what}; return a loss that "
                "depends on the weights, or prune without data (SynFlow)."
            )
        return torch.stack([loss.reshape(()) for loss in losses]).sum()
