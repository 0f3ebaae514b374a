"""How much of a model a method works on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_sparse.core.targets import describe

__all__ = ["Coverage", "count_parameters", "coverage"]

TENTH = 0.1
"""Of the matrix weights; what is left out beyond it deserves a warning."""


@dataclass(frozen=True)
class Coverage:
    """How much of a model has been chosen.

    Args:
        model: how many numbers the whole model trains or holds, shared ones once.
        matrices: how many of them are trainable and in matrices, embeddings excepted.
        missed: how many of those are left out though no pattern says so.
        largest: the name of the largest parameter that is missed.
        layer: the type of its layer.
        reason: why it is left out.
    """

    model: int
    matrices: int
    missed: int = 0
    largest: str = ""
    layer: str = ""
    reason: str = ""

    @property
    def warning(self) -> str | None:
        """One sentence where more than a tenth is missed, else None."""
        if self.missed <= TENTH * self.matrices:
            return None
        share = self.missed / self.matrices
        return (
            f"leaves out {share:.0%} of the trainable weights in matrices, embeddings not counted; the largest is "
            f"'{self.largest}' ({self.reason}). register_layer makes {self.layer} known, targets=['*', 'type:{self.layer}'] "
            f"takes it as it is, and targets=['*', '!type:{self.layer}'] leaves it out without this warning."
        )


def coverage(module: nn.Module, patterns: Sequence[str], chosen: Collection[str]) -> Coverage:
    """How much of a model some weights are, and what is missed.

    Args:
        module: the whole model.
        patterns: that have chosen the weights.
        chosen: their names.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        >>> coverage(net, ["*"], ["0.weight", "1.weight"])
        Coverage(model=36, matrices=32, missed=0, largest='', layer='', reason='')
    """
    sizes = dict(module.named_parameters())
    embeddings = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
        for parameter in layer.parameters(recurse=False)
    }
    matrices, missed = 0, []
    for candidate in describe(module, patterns):
        parameter = sizes[candidate.name]
        if not parameter.requires_grad or id(parameter) in embeddings:
            continue
        if not candidate.chosen and not _is_matrix(candidate.name, candidate.shape):
            continue
        matrices += parameter.numel()
        if candidate.name not in chosen and not candidate.by_pattern:
            missed.append(candidate)
    model = count_parameters(module)
    if not missed:
        return Coverage(model, matrices)
    counts = {candidate.name: sizes[candidate.name].numel() for candidate in missed}
    largest = max(missed, key=lambda candidate: counts[candidate.name])
    return Coverage(model, matrices, sum(counts.values()), largest.name, largest.kind, largest.reason)


def count_parameters(module: nn.Module) -> int:
    """How many numbers a model holds in parameters, shared ones once; those without a shape yet do not count."""
    return sum([p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter)])


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Neither a vector in more dimensions, such as a gain per channel, nor an embedding or a token by its name."""
    leaf = name.rpartition(".")[2]
    return sum([size > 1 for size in shape]) >= 2 and not any(word in leaf for word in ("embed", "token", "bias"))
