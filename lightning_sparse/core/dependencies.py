"""Channels of a network that can only be removed together: an engine's answers, checked, by the names of layers.

Additions, concatenations, depthwise layers and normalization couple the channels of one layer with those of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core.calls import Call
from lightning_sparse.core.coupling import Coupling, Place
from lightning_sparse.core.coupling_engine import CouplingEngine, Member, Positions
from lightning_sparse.core.linear import CHANNEL_NORMS, CONVOLUTIONS, in_count, is_depthwise, is_layer, out_count
from lightning_sparse.core.networks import callee, copy_model, shared_parameters
from lightning_sparse.core.torch_pruning_engine import torch_pruning
from lightning_sparse.core.trial import Appearance, why_channels_stay

__all__ = ["Dependencies", "Group", "coupled_outputs", "find_coupling"]


@dataclass
class Group:
    """Channels of a layer, the root, and the channels that are coupled with them.

    Args:
        root: the layer whose outputs number the channels.
        outputs: layer -> its outputs, by channel of the root.
        readers: layer -> its inputs, by channel of the root.
    """

    root: str
    outputs: dict[str, Positions]
    readers: dict[str, Positions]


class Dependencies:
    """The layers of a model, and what the outputs of each layer are coupled with.

    Args:
        model: a network, or a LightningModule that holds one.
        inputs: a batch for it; a tuple holds positional arguments, a dictionary holds keyword arguments.
        engine: finds the coupled channels.

    Raises:
        ValueError: if the engine is missing or cannot trace the model.
    """

    def __init__(self, model: nn.Module, inputs: Any, engine: CouplingEngine = torch_pruning) -> None:
        call = Call.of(inputs)
        traced = copy_model(model).eval().requires_grad_(True)
        self.prefix, self.network = callee(traced, call.network)
        """A copy of the network; results for it also hold for the model."""
        self.call = replace(call, network="").fit(self.network)
        self.coupled = engine(self.network, self.call)
        self.roots = {self.path(name): name for name in self.coupled}
        self.layers: dict[str, Any] = {path: self.network.get_submodule(name) for path, name in self.roots.items()}
        """All layers that the model's outputs depend on, by their names in the model."""
        self.shared = shared_parameters(self.network)
        self._sources: dict[bool, dict[str, set[str]]] = {}

    def groups(self) -> Iterator[tuple[Group, str]]:
        """Yield the group of all outputs of every layer, and why it cannot be removed; the reason is empty if it can."""
        for name, layer in self.layers.items():
            yield self.group(name, range(out_count(layer)))

    def group(self, root: str, chosen: Iterable[int]) -> tuple[Group, str]:
        """Return the group of some outputs of a root, and why it cannot be removed; the reason is empty if it can."""
        group = Group(root, {}, {})
        for member in self.members(root, chosen):
            if member.stays:
                return group, member.stays
            if member.name is None:
                continue
            path, layer, channels = self.path(member.name), self.network.get_submodule(member.name), member.channels
            if any(id(p) in self.shared for p in layer.parameters()):
                return group, f"'{path}' shares its weight with another layer"
            if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
                continue
            if not is_layer(layer) and not isinstance(layer, (*CHANNEL_NORMS, nn.PReLU)):
                return group, f"{type(layer).__name__} '{path}' mixes its channels"
            whole = out_count(layer) if member.produces else in_count(layer)
            if any(index >= whole for indices in channels.values() for index in indices):
                return group, f"its channels do not match those of '{path}' one to one"
            if member.produces:
                group.outputs[path] = channels
            if not member.produces or is_depthwise(layer):
                group.readers[path] = channels
        return group, "" if group.readers else "no layer that reads it was found"

    def members(self, root: str, chosen: Iterable[int]) -> list[Member]:
        """Return the parts that are coupled with some outputs of a root."""
        left = set(chosen)
        narrowed = [
            replace(member, channels={channel: member.channels[channel] for channel in member.channels if channel in left})
            for member in self.coupled[self.roots[root]]
        ]
        return [member for member in narrowed if member.channels]

    def sources(self, reader: str, through: bool) -> set[str]:
        """Return the layers whose outputs a layer reads; `through` looks past depthwise layers to the layers before them."""
        if through not in self._sources:
            self._sources[through] = self._find_sources(through)
        return self._sources[through].get(reader, set())

    def _find_sources(self, through: bool) -> dict[str, set[str]]:
        """Find sources by gradients: every layer's output starts a new graph, and each input is traced back to them."""
        ends: list[tuple[str, Tensor]] = []
        found: dict[str, set[str]] = {}

        def look(path: str) -> Callable[..., None]:
            def hook(layer: nn.Module, args: Any, named: Any) -> None:
                given: Tensor = args[0] if args else named["input"]
                if ends and given.requires_grad:
                    slopes = torch.autograd.grad(given.sum(), [end for _, end in ends], retain_graph=True, allow_unused=True)
                    came = {name for (name, _), slope in zip(ends, slopes, strict=True) if slope is not None}
                    found.setdefault(path, set()).update(came)

            return hook

        def end(path: str) -> Callable[..., Tensor]:
            def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
                ends.append((path, output.detach().requires_grad_()))
                return ends[-1][1].clone()  # later operations may work in place

            return hook

        handles = []
        for path, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(look(path), with_kwargs=True))
            if not (through and is_depthwise(layer)):
                handles.append(layer.register_forward_hook(end(path)))
        try:
            with torch.enable_grad():
                self.call(self.network)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def path(self, name: str) -> str:
        """Return the name in the model of a layer of the network."""
        return f"{self.prefix}.{name}".strip(".")


def coupled_outputs(
    model: nn.Module, inputs: Any, network: str | None = None, *, engine: CouplingEngine = torch_pruning
) -> list[list[str]]:
    """Return groups of layers whose outputs can only be removed together, because additions or depthwise layers couple them.

    If masks remove the same outputs in all layers of a group, `remove_dead` can shrink these layers and the layers that read
    them. Masks chosen layer by layer rarely agree along a residual stream.

    Args:
        model: a network, or a model that holds one.
        inputs: a batch for it; a tuple holds positional arguments, a dictionary holds keyword arguments.
        network: the part of the model that takes the inputs, by name; None finds it.
        engine: finds the coupled channels.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
        >>> coupled_outputs(net, torch.randn(2, 1, 8, 8))
        [['0', '2']]
    """
    found: list[list[str]] = []
    for group, foreign in Dependencies(model, Call.of(inputs, network), engine).groups():
        if not foreign and not any(group.root in names for names in found):
            found.append(sorted(name for name in group.outputs if is_layer(model.get_submodule(name))))
    return sorted(found)


def find_coupling(
    model: nn.Module, calls: Sequence[Call], weights: Mapping[str, int], engine: CouplingEngine = torch_pruning
) -> Coupling:
    """Find which channels of the given weights can only be removed together, with their biases and norms.

    The graph does not show everything that depends on the number of channels, such as `x.view(-1, 400)`, so one channel of
    every group is removed from a copy. Groups without which the model does not run, or returns something else, stay.

    Args:
        model: the model that holds the weights.
        calls: calls of its networks; no network may contain another.
        weights: weight -> its number of output channels.
        engine: finds the coupled channels.

    Raises:
        ValueError: if the engine is missing or cannot trace the model, or if no channel can be removed.
    """
    parameters = {name: len(parameter) for name, parameter in model.named_parameters() if parameter.ndim == 1}
    holders = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    staying = {
        name: "the outputs do not depend on it" if is_layer(holder) else f"channels of {type(holder).__name__} stay"
        for name, holder in holders.items()
    }
    groups: list[list[Place]] = []
    vectors: dict[str, int] = {}
    readers: dict[str, list[Place | None]] = {}
    cuts: list[Appearance] = []
    for group, foreign in (found for call in calls for found in Dependencies(model, call, engine).groups()):
        weight = f"{group.root}.weight"
        staying.pop(weight, None)
        if foreign or weight not in weights:
            staying[weight] = foreign or "it is not among the targets"
            continue
        channels: dict[int, list[Place]] = {}
        for name, positions in group.outputs.items():
            module = model.get_submodule(name)
            mine = [] if isinstance(module, nn.PReLU) else [f"{name}.weight", f"{name}.bias"]
            vectors.update({one: parameters[one] for one in mine if one in parameters})
            places = [one for one in mine if one in parameters or (is_layer(module) and one == mine[0])]
            for channel, indices in positions.items():
                channels.setdefault(channel, []).extend((one, index) for one in places for index in indices)
        groups += channels.values()
        for produces, members in ((True, group.outputs), (False, group.readers)):
            for name, positions in members.items():
                cuts += [
                    Appearance(channels[channel][0], name, produces, indices)
                    for channel, indices in positions.items()
                    if channels.get(channel)
                ]
        for name, positions in group.readers.items():
            module = model.get_submodule(name)
            if not is_depthwise(module):
                read = readers.setdefault(f"{name}.weight", [None] * in_count(module))
                for channel, indices in positions.items():
                    for index in indices:
                        read[index] = channels[channel][0] if channels.get(channel) else None
    groups += _equal_groups(model, weights, readers, staying)
    coupling = Coupling(groups, weights, vectors, staying, readers)
    failed = why_channels_stay(model, calls, coupling, cuts) if coupling.count else {}
    if failed:
        staying |= failed
        coupling = Coupling(groups, weights, vectors, staying, readers)
    if not coupling.count:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(staying.items())[:2])
        raise ValueError(f"structure='coupled' finds no channel of {type(model).__name__} that can be removed ({reasons}).")
    return coupling


def _equal_groups(
    model: nn.Module, weights: Mapping[str, int], readers: Mapping[str, Sequence[Place | None]], staying: Mapping[str, str]
) -> Iterator[list[Place]]:
    """Yield the channels that a grouped convolution couples: those at one position of every group, so groups stay equal."""
    for name, layer in model.named_modules():
        if not isinstance(layer, CONVOLUTIONS) or layer.groups == 1 or is_depthwise(layer):
            continue
        weight = f"{name}.weight"
        made: list[Place | None] = [(weight, channel) for channel in range(out_count(layer))] if weight in weights else []
        for side in (made, readers.get(weight, ())):
            size = len(side) // layer.groups
            for place in range(size):
                there = side[place::size]
                coupled = [one for one in there if one is not None]
                if len(coupled) < len(there) and staying:
                    coupled.append((next(iter(staying)), 0))  # one of them stays, so all do
                if coupled:
                    yield coupled
