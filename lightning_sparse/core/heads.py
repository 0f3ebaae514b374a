"""Heads of attention: what query, key and value compute for one, and what the output reads of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_sparse.core.attention import Attention, find_attentions, places_of, why_they_stay
from lightning_sparse.core.calls import Call
from lightning_sparse.core.costs import between_activations_of
from lightning_sparse.core.coupled import Coupled
from lightning_sparse.core.coupling import Coupling, Place
from lightning_sparse.core.target import Target

__all__ = ["Heads"]


@final
class Heads(Coupled):
    """Whole heads of attention: their rows of query, key and value with the biases, and their columns of the output.

    A head counts by the mean over all of these, each divided by the mean of its weight. Heads that share a key and a value,
    as in grouped queries, leave together. Each attention keeps one. Weights that belong to no head are left alone.
    """

    text = "heads"
    noun = "heads"
    counted = "attention heads"
    holders = "attentions"

    def find(self, model: nn.Module, calls: Sequence[Call], weights: Mapping[str, int]) -> Coupling:
        found = find_attentions(model, calls)
        staying = {f"{layer}.weight": reason for layer, reason in found.obstacles.items()}
        parameters = dict(model.named_parameters())
        leaving = []
        for attention in found.attentions:
            names = {name for head in places_of(model, attention) for name, _ in head} | {f"{attention.out}.weight"}
            missing = sorted(name for name in names if parameters[name].ndim > 1 and name not in weights)
            if missing:
                staying[f"{attention.out}.weight"] = f"'{missing[0]}' is not among the targets"
            else:
                leaving.append(attention)
        if leaving and why_they_stay(model, calls, leaving):
            reasons = {f"{one.out}.weight": why_they_stay(model, calls, [one]) for one in leaving}
            staying |= {name: reason for name, reason in reasons.items() if reason}
            leaving = [one for one in leaving if not reasons[f"{one.out}.weight"]]
        if not leaving:
            said = "; ".join(f"'{name}': {reason}" for name, reason in list(staying.items())[:2])
            raise ValueError(
                f"structure='heads' finds no attention in {type(model).__name__} whose heads can leave "
                f"({said or LOOKED_FOR}); write 'coupled' or 'channel', or choose other weights."
            )
        return _coupling(model, leaving, weights, staying)

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, int]) -> Coupling | None:
        units = state.get("units", {})
        if not units:
            return None
        return Coupling.restore(state, {name: size for name, size in weights.items() if name in units})

    def parts(self, coupling: Coupling) -> list[str]:
        prefix = between_activations_of("")
        return [name.removeprefix(prefix) for name in coupling.inputs if name.startswith(prefix)]

    def spread(self, kept: Sequence[Tensor], targets: Sequence[Target], scores: Sequence[Tensor]) -> list[Tensor]:
        masks = super().spread(kept, targets, scores)
        whole = self.together(kept)
        for mask, target in zip(masks, targets, strict=True):
            units = self.coupling.inputs.get(target.name)
            if units is not None:
                read = (whole[units.clamp(min=0)] | (units < 0)).to(mask.device)
                mask.logical_and_(read.view([-1 if dim == target.input_dim else 1 for dim in range(mask.ndim)]))
        return masks

    def entries(self, kept: Mapping[int, int], targets: Sequence[Target]) -> dict[int, int]:
        found = {}
        for layer, target in enumerate(targets):
            units, inputs = self.coupling.units[target.name], self.coupling.inputs.get(target.name)
            size = target.size
            for held in (units, inputs):
                if held is None or bool((held < 0).all()):
                    continue
                mine = [index for index, (_, pool) in enumerate(self.coupling.pools) if torch.isin(held, pool).any()]
                if any(index not in kept for index in mine):
                    break
                all_units = sum(len(self.coupling.pools[index][1]) for index in mine)
                size = size * sum(kept[index] for index in mine) // all_units
            else:
                found[layer] = size
        return found


LOOKED_FOR = (
    "looked for nn.MultiheadAttention, and for layers that read blocks of inputs, each of which depends on the same outputs "
    "of the layers before it"
)


def _coupling(
    model: nn.Module, attentions: Sequence[Attention], weights: Mapping[str, int], staying: Mapping[str, str]
) -> Coupling:
    parameters = dict(model.named_parameters())
    groups: list[list[Place]] = []
    readers: dict[str, list[Place | None]] = {}
    for attention in attentions:
        places = places_of(model, attention)
        groups += places
        read: list[Place | None] = [None] * sum(map(len, attention.columns))
        for columns, head in zip(attention.columns, places, strict=True):
            for column in columns:
                read[column] = head[0]
        readers[f"{attention.out}.weight"] = read
        readers[between_activations_of(attention.name)] = [head[0] for head in places]
    names = {name for places in groups for name, _ in places}
    mine = {name: weights[name] for name in weights if name in names or name in readers}
    vectors = {name: len(parameters[name]) for name in parameters if name in names and name not in weights}
    return Coupling(groups, mine, vectors, staying, readers)
