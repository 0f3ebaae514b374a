"""SynFlow: synaptic flow at initialization, without data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sparse.core import (
    AllocationName,
    BudgetName,
    Call,
    StructureName,
    check_whole,
    lent_gradients,
    local,
    tensors_in,
    trained_part,
)
from lightning_sparse.families import PruningAtInit
from lightning_sparse.functional import connection_sensitivity, exponential
from lightning_sparse.loop import Shards
from lightning_sparse.loop.dry_run import dry_run, record_calls, refuse_unrepeatable_data, training_outputs

__all__ = ["SynFlow"]

# Scores are only rounding noise if those of the whole layer add up to less than this share of the flow, in units of the last
# place. Values up to 30 were seen behind a layer norm; if anything flows, at least one layer carries a substantial part of
# it.
_ROUNDING = 1000


@final
class SynFlow(PruningAtInit):
    r"""Before the first batch, keep the weights that carry the flow from inputs to outputs; then train with a fixed mask.

    $$ s = |w \, \partial R / \partial w|, \qquad R = \mathbf 1^\top f(\mathbf 1;\, |\theta|) $$

    in evaluation mode and float64, with every parameter and statistic made positive and an input of ones. This is repeated
    on the remaining weights while the density falls geometrically to its target, so no layer is emptied while others have
    weights to spare. It uses no data, only the shape of the input. Integer inputs, such as token ids, labels and timesteps,
    keep their values from the first sample; scalars beside other outputs, such as a loss, do not count. Costs `iterations`
    forward and backward passes of one sample, once. Meanwhile it needs 16 bytes of memory per weight, and more during
    ranking: R grows by the size of a row with every layer and overflows float32 in a perceptron of forty wide layers, so the
    copy, its gradients and scores are in 64 bits.

    Source: Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow",
    https://arxiv.org/abs/2006.05467, algorithm 1.

    Args:
        sparsity: the fraction removed, in [0, 1); optional with `structure='n:m'`.
        iterations: number of rounds of scoring and pruning.
        input_shape: shape of one sample as the network takes it, without the batch; None uses the network's inputs in the
            first batch of the training set.
        network: name of the submodule that is scored; None is the innermost one that holds all trainable parameters.
        allocation: how sparsity is distributed over the layers: `global` (scores of all layers compete), `uniform`,
            `uniform+`, `er`, `erk`, `erk+`, `owl` (layers with more outliers among their scores keep more).
        structure: what is removed: `unstructured`, `channel` (whole outputs; sparsity counts channels), `coupled` (channels
            across all layers that additions tie together, with biases and norms, so that they can be cut out of the
            network), `heads` (whole attention heads, which can be cut out too), `fan_in` (the same number of weights in
            every output), `block:RxC` (outputs by inputs), `n:m` or `transposable n:m` (in both directions).
        layer_sparsity: glob -> sparsity for individual layers; they count toward the total.
        max_layer_sparsity: the largest fraction that one layer may lose where layers compete, in (0, 1].
        budget: what sparsity counts: `units` (weights, channels or heads) or, with `coupled` or `heads`, the `macs` or
            `parameters` of the whole network, to within one channel.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> SynFlow(sparsity=0.98, input_shape=[3, 32, 32]).label
        'SynFlow'
    """

    shards: ClassVar[Shards] = "any"

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        iterations: int = 100,
        input_shape: Sequence[int] | None = None,
        network: str | None = None,
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
        self.iterations, self.input_shape, self.network = iterations, input_shape, network
        check_whole("iterations", iterations, 1)

    def choose_masks(self) -> None:
        path = trained_part(self.run.module, self.network, self.label)
        ones = self._ones(path)
        with dry_run(self.run.trainer, self.run.module) as twin:
            if self.spread is None:
                twin.float() if twin.device.type == "mps" else twin.double()  # R is a product over all layers
            twin.eval()
            for tensor in itertools.chain(twin.parameters(), twin.buffers()):
                if tensor.is_floating_point():
                    values = local(tensor).data
                    values.abs_().masked_fill_(values.isneginf(), -torch.inf)  # attention masks stay
            masks = self._iterate(twin, lambda: ones(twin))
        self.set_masks(dict(zip(self.weights, masks, strict=True)))  # only after all temporary changes are undone

    def _iterate(self, twin: LightningModule, flow: Callable[[], Any]) -> list[Tensor]:
        weights = self.twin_weights(twin)
        masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        for iteration in range(1, self.iterations + 1):
            scores = self._scores(twin, weights, flow)
            if iteration == 1:
                self.check_scores(scores)
            for score, mask in zip(scores, masks, strict=True):
                score.masked_fill_(~mask, -torch.inf)
            sparsity = exponential(iteration / self.iterations, 0.0, self.quota.sparsity)
            numbers = [mask.count_nonzero() for mask in masks]
            kept = [int(number) for number in numbers] if self.spread is None else self.spread.sums(numbers)
            masks = self.plan.masks(scores, sparsity, kept)
            for weight, mask in zip(weights, masks, strict=True):
                weight.data.mul_(mask)
        return masks

    def _scores(self, twin: LightningModule, weights: Sequence[nn.Parameter], flow: Callable[[], Any]) -> list[Tensor]:
        twin.zero_grad()
        try:
            outputs = [output for output in tensors_in(flow()) if output.is_floating_point()]
            outputs = [output for output in outputs if output.ndim] or outputs
        except Exception as error:
            raise ValueError(
                f"{self.label} could not send ones through the network; set the input_shape of one sample, or the network "
                f"that takes it ({error})."
            ) from error
        torch.stack([output.sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        reduce = self.run.trainer.strategy.reduce
        scores, named = [], dict(zip(self.weights, weights, strict=True))
        with lent_gradients(named):
            for name, weight in named.items():
                if weight.grad is None:
                    raise ValueError(
                        f"{self.label}: nothing flows through '{name}'; exclude it with targets=['!{name}'], or set "
                        f"network to the "
                        "submodule that it belongs to."
                    )
                # Gradients of shards are already means over ranks.
                gradient = weight.grad if self.layouts else reduce(weight.grad, reduce_op="mean")
                scores.append(connection_sensitivity(weight, gradient))
                weight.grad = None  # 64 bits for every weight, no longer needed
        size = reduce(torch.stack([output.detach().abs().sum() for output in outputs]).sum(), reduce_op="mean")
        sums = [float(self.total(name)(score.sum())) for name, score in zip(named, scores, strict=True)]
        if max(sums) < _ROUNDING * torch.finfo(size.dtype).eps * float(size):
            return [torch.zeros_like(score) for score in scores]  # as behind a layer norm, whose sum is constant
        return scores

    def _ones(self, path: str) -> Call:
        """A call of the network with one sample, all ones except for integers."""
        trainer, module = self.run.trainer, self.run.module
        if self.input_shape is not None:
            return Call((torch.ones(1, *self.input_shape, device=module.device),), network=path)
        refuse_unrepeatable_data(trainer, module, f"{self.label} without input_shape")
        with dry_run(trainer, module) as twin, torch.no_grad():
            calls = record_calls(twin, [path], lambda: next(training_outputs(trainer, twin), None))
        if not calls:
            raise ValueError(
                f"{self.label} saw no call of the network '{path or type(module).__name__}' in the first batch's "
                "training_step; set the input_shape of one sample, or the network that takes it."
            )
        return calls[0].first(1).map(lambda tensor: torch.ones_like(tensor) if tensor.is_floating_point() else tensor)
