"""Sparsity of weights measured by their magnitudes, with or without exact zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sparse.core import Target, describe
from lightning_sparse.functional import hoyer_sparsity
from lightning_sparse.metrics.drawing import curve

__all__ = ["HoyerSparsity"]


@final
class HoyerSparsity(Metric):
    r"""Hoyer's sparsity of a network: 0 if all weights of each output are equally large, 1 if only one is left of each.

    The mean over the outputs of a layer, and over layers weighted by their numbers of weights. Layers whose outputs have a
    single entry do not count. `functional.hoyer_sparsity` gives single outputs, `functional.expected_hoyer` the value that
    training on the unit Lp sphere is expected to reach.

    Source: Hoyer 2004, "Non-negative Matrix Factorization with Sparseness Constraints", JMLR 5, section 3; the mean as in
    Li et al. 2021, https://arxiv.org/abs/2103.16013, as in its official repository.

    Args:
        targets: patterns that select the weights; see `core.find_targets`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[0.0, 5.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
        >>> metric = HoyerSparsity()
        >>> metric.update(net)
        >>> metric.compute()
        tensor(0.5000)
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    weighted: Tensor
    entries: Tensor

    def __init__(self, targets: str | Sequence[str] = ("*",)) -> None:
        super().__init__()
        self.targets = [targets] if isinstance(targets, str) else list(targets)
        self.add_state("weighted", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("entries", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, module: nn.Module) -> None:
        """Read the current weights of a module.

        Raises:
            ValueError: if the patterns select nothing that has a sparsity.
        """
        seen = 0
        for candidate in describe(module, self.targets, frozen=True):
            if not candidate.chosen:
                continue
            weight = module.get_parameter(candidate.name)
            layer = module.get_submodule(candidate.name.rpartition(".")[0])
            dims = Target.of(candidate.name, weight, layer).output_dims
            if weight.numel() > math.prod(weight.shape[dim] for dim in dims):
                self.weighted += hoyer_sparsity(weight, dims).mean().to(self.weighted) * weight.numel()
                self.entries += weight.numel()
                seen += 1
        if not seen:
            name = type(module).__name__
            raise ValueError(f"targets={self.targets} chooses no weight of {name} whose outputs have at least two entries.")

    def compute(self) -> Tensor:
        """The mean over all that was taken in."""
        return self.weighted / self.entries

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """The current value, or a list of values as a curve; needs matplotlib."""
        return curve(self.compute() if val is None else val, "Hoyer sparsity", ax)
