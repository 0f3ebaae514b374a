"""Channels of a network that do nothing, found on its dependency graph and verified on the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Call,
    CouplingEngine,
    Dependencies,
    Group,
    in_count,
    is_depthwise,
    is_layer,
    out_count,
    padding_of,
    torch_pruning,
)

__all__ = ["DeadGroup", "Round", "bias_is_exact", "constants_of", "fed_outputs"]


@dataclass
class DeadGroup(Group):
    """Coupled channels that are removed together.

    Args:
        removed: channels of the root that are removed.
        carriers: dead channels that stay.
        constants: layer -> input -> its constant value, unless it is multiplied by zeros.
    """

    removed: list[int] = field(default_factory=list)
    carriers: list[int] = field(default_factory=list)
    constants: dict[str, dict[int, float]] = field(default_factory=dict)


class Round:
    """Everything that can be removed from a model in its current form."""

    def __init__(
        self, model: nn.Module, inputs: list[Call], refused: dict[str, str], engine: CouplingEngine = torch_pruning
    ) -> None:
        self.model, self.refused = model, refused
        self.graph = Dependencies(model, inputs[0], engine)
        self.constants = constants_of(self.graph.network, [replace(call, network="") for call in inputs])
        self.fed = {name: fed_outputs(layer).tolist() for name, layer in self.graph.layers.items()}
        self.read = {name: _read(layer).tolist() for name, layer in self.graph.layers.items()}

    def groups(self) -> Iterator[DeadGroup]:
        """Groups with something to remove."""
        seen: dict[str, set[int]] = {}
        for name, layer in self.graph.layers.items():
            if is_depthwise(layer):
                continue
            left = [channel for channel in range(out_count(layer)) if channel not in seen.get(name, ())]
            for member in self.graph.members(name, left) if left else ():
                if member.produces and member.name is not None:
                    seen.setdefault(self.graph.path(member.name), set()).update(*member.channels.values())
            group = self._dead(name, left) if left else None
            if group is not None:
                yield group

    def _dead(self, root: str, chosen: list[int]) -> DeadGroup | None:
        """Shrink a set of channels of a root until each of them is dead wherever it is read."""
        while True:
            found, foreign = self.graph.group(root, chosen)
            if foreign:
                if not all(self.fed[root][channel] for channel in chosen):
                    self.refused[root] = foreign
                return None
            group = DeadGroup(root, found.outputs, found.readers)
            own = group.outputs[root]
            twins = {index for channel in chosen for index in own[channel] if index > channel and index in own}
            alive = self._alive(group) | twins or self._uneven(group, chosen)
            if not alive:
                break
            chosen = [channel for channel in chosen if channel not in alive]
            if not chosen:
                return None
        group.removed = chosen
        self._carry(group)
        self._leave_one(group)
        while stay := self._uneven(group, group.removed):  # carriers may have made them so
            group.removed = [channel for channel in group.removed if channel not in stay]
        return group if group.removed else None

    def _alive(self, group: DeadGroup) -> set[int]:
        """Channels that are both read and fed; records the constants of the others."""
        alive: set[int] = set()
        for name, channels in group.readers.items():
            layer, read = self.graph.layers[name], self.read[name]
            fixed = self.constants.get(layer)
            if is_depthwise(layer):
                continue  # it passes its channel on; the reader decides
            sources = [self.graph.sources(name, through) for through in (True, False)]
            for channel, indices in channels.items():
                used = [index for index in indices if read[index]]
                if not used:
                    continue
                fed = all(any(self._feeds(group, source, channel) for source in found) for found in sources)
                if fed or fixed is None or any(index not in fixed for index in used):
                    alive.add(channel)
                else:
                    group.constants.setdefault(name, {}).update({index: fixed[index] for index in used})
        return alive

    def _feeds(self, group: DeadGroup, source: str, channel: int) -> bool:
        """Whether a layer has a nonzero weight for a channel."""
        return any(self.fed[source][index] for index in group.outputs.get(source, {}).get(channel, []))

    def _uneven(self, group: DeadGroup, going: list[int]) -> set[int]:
        """Channels that must stay so that the groups of a convolution remain equal in size and none is empty."""
        stay: set[int] = set()
        for side, count in ((group.outputs, out_count), (group.readers, in_count)):
            for name, channels in side.items():
                layer = self.model.get_submodule(name)
                if not isinstance(layer, CONVOLUTIONS) or layer.groups == 1 or is_depthwise(layer):
                    continue
                size = count(layer) // layer.groups
                by_group: list[list[int]] = [[] for _ in range(layer.groups)]
                for channel in going:
                    for index in channels.get(channel, ()):
                        by_group[index // size].append(channel)
                fewest = min(size - 1, *(len(set(members)) for members in by_group))
                stay |= {channel for members in by_group for channel in sorted(set(members))[fewest:]}
        return stay

    # ---- constants --------------------------------------------------------------------------------------------------------

    def _carry(self, group: DeadGroup) -> None:
        """Choose dead channels to keep: one with a nonzero constant for each layer without an exact bias."""
        needing: dict[str, dict[int, float]] = {}
        for name, constants in group.constants.items():
            layer = self.model.get_submodule(name)
            if bias_is_exact(layer):
                continue
            by_channel = {
                channel: max((constants.get(index, 0.0) for index in indices), key=abs)
                for channel, indices in group.readers[name].items()
            }
            if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:  # one group's channel cannot carry another's
                group.carriers += [channel for channel, value in by_channel.items() if value]
            elif any(by_channel.values()):
                largest = max(map(abs, by_channel.values()))
                needing[name] = {channel: abs(value) / largest for channel, value in by_channel.items()}
        while needing:
            shares = [sum(share.get(channel, 0.0) for share in needing.values()) for channel in group.removed]
            best = group.removed[max(range(len(shares)), key=shares.__getitem__)]
            if all(share.get(best, 0.0) < 0.1 for share in needing.values()):
                first = next(iter(needing.values()))
                best = max(first, key=first.__getitem__)
            group.carriers.append(best)
            needing = {name: share for name, share in needing.items() if share.get(best, 0.0) < 0.1}
        group.carriers = sorted(set(group.carriers))
        group.removed = [channel for channel in group.removed if channel not in group.carriers]

    def _leave_one(self, group: DeadGroup) -> None:
        """A layer needs at least one output: if all are dead, the last one stays."""
        for name, channels in (*group.outputs.items(), *group.readers.items()):
            layer = self.model.get_submodule(name)
            whole = in_count(layer) if name in group.readers and is_layer(layer) else out_count(layer)
            gone = {index for channel in group.removed for index in channels.get(channel, [])}
            if len(gone) >= whole:
                group.carriers.append(group.removed.pop())


def fed_outputs(layer: Any) -> Tensor:
    """Which outputs have a nonzero weight."""
    weight: Tensor = layer.weight.detach() != 0
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        per_group: Tensor = weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel()).any(-1).any(1)
        return per_group.flatten()
    return weight.flatten(1).any(1)


def _read(layer: Any) -> Tensor:
    """Which inputs are multiplied by a nonzero weight."""
    weight: Tensor = layer.weight.detach() != 0
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        return weight.flatten(1).any(1)
    groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).any(-1).any(1).flatten()


def bias_is_exact(layer: Any) -> bool:
    """Whether a constant input adds the same value at every position of an output."""
    if layer.bias is None or isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        return False
    return isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or not any(padding_of(layer) or (1,))


@torch.no_grad()
def constants_of(model: nn.Module, inputs: Sequence[Any]) -> dict[nn.Module, dict[int, float]]:
    """Layer -> input channel -> its value, for channels that are constant."""
    low: dict[nn.Module, Tensor] = {}
    high: dict[nn.Module, Tensor] = {}

    def look(layer: Any, args: Any, named: Any) -> None:
        x = args[0] if args else named["input"]
        channels = x.movedim(1 - layer.weight.ndim, 0).reshape(in_count(layer), -1)
        least, most = channels.aminmax(dim=1)
        low[layer] = torch.minimum(low.get(layer, least), least)
        high[layer] = torch.maximum(high.get(layer, most), most)

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.modules() if is_layer(layer)]
    try:
        for x in inputs:
            Call.of(x)(model)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer in low:
        a, b = low[layer].double(), high[layer].double()
        same = (b - a) <= 1e-6 * torch.maximum(a.abs(), b.abs())  # kernels round the ends of a row differently
        middle = ((a + b) / 2).tolist()
        found[layer] = {int(index): middle[int(index)] for index in same.nonzero().flatten()}
    return found
