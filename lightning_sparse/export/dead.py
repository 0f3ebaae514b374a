"""Which channels of a network do nothing, found on Torch-Pruning's dependency graph and proven on the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_sparse.core import padding_of, shared_parameters
from lightning_sparse.export.blueprint import in_count, out_count
from lightning_sparse.export.compare_models import callee, copy_model, first_line, fit_to

__all__ = ["Channels", "Group", "Round", "bias_is_exact", "constants_of", "fed_outputs", "is_depthwise", "is_layer"]

Channels = dict[int, list[int]]
"""Positions in a layer, by the channel of the root that they are coupled with."""

# Operations of which one channel never sees another. All others couple or mix, and their channels stay.
_CHANNELWISE = re.compile(
    "(Abs|Add|Alias|AsStrided|AvgPool|AdaptiveAvgPool|AdaptiveMaxPool|Cat|Celu|Clamp|Clone|ConstantPad|Div|Elu|Exp|Expand|Gelu|"
    "Hardsigmoid|Hardswish|Hardtanh|LeakyRelu|LogSigmoid|MaxPool|Mean|MkldnnMaxPool|Mish|Mul|NativeDropout|Neg|Permute|Pow|"
    "PreluKernel|ReflectionPad|Relu|ReplicationPad|ReshapeAlias|Rsqrt|Rsub|Selu|Sigmoid|Silu|Slice|Softplus|Split|SplitWithSizes|"
    "Sqrt|Squeeze|Sub|T|Tanh|Threshold|ToCopy|Transpose|UnsafeView|Unsqueeze|UpsampleBilinear|UpsampleNearest|View)"
    r"([123]D)?(WithIndices|Nd)?\d*"
)


@dataclass
class Group:
    """Coupled channels that go together.

    Args:
        root: the layer by whose outputs they are counted.
        outputs: layer -> its outputs, by channel of the root.
        readers: layer -> its inputs, by channel of the root.
        removed: channels of the root that go.
        carriers: dead channels that stay.
        constants: layer -> input -> the number it is given; where it is not multiplied by zeros.
    """

    root: str
    outputs: dict[str, Channels]
    readers: dict[str, Channels]
    removed: list[int] = field(default_factory=list)
    carriers: list[int] = field(default_factory=list)
    constants: dict[str, dict[int, float]] = field(default_factory=dict)


class Place(NamedTuple):
    """A channel of the root, and where it is in another layer; named as the graph's mappings have it."""

    idx: int
    root_idx: int


Member = tuple[Any, bool, Channels]
"""A node of the graph, whether by its outputs, and its positions."""


class Round:
    """Everything that can be removed from a model as it is."""

    def __init__(self, pruning: Any, model: nn.Module, inputs: list[Tensor], refused: dict[str, str]) -> None:
        self.model, self.refused = model, refused
        traced = copy_model(model).requires_grad_(True)
        self.prefix, called = callee(traced)
        self.constants = constants_of(called, inputs)
        self.graph = pruning.DependencyGraph()
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            try:
                two = fit_to(called, inputs[0][:2])
                self.graph.build_dependency(called, two, forward_fn=lambda net, x: net(x), verbose=False)
                if not any(map(is_layer, self.graph.module2node)):
                    raise ValueError("no layer is found behind its output")
            except Exception as error:
                said = f"{type(model).__name__} cannot be traced by Torch-Pruning ({first_line(error)})"
                raise ValueError(f"{said}; export it without removal.") from None
        self.names = {layer: name for name, layer in called.named_modules()}
        self.shared = shared_parameters(called)
        layers = [layer for layer in self.names if is_layer(layer)]
        self.widest = max(max(in_count(layer), out_count(layer)) for layer in layers)
        self.fed: dict[Any, list[bool]] = {layer: fed_outputs(layer).tolist() for layer in layers}
        self.read: dict[Any, list[bool]] = {layer: _read(layer).tolist() for layer in layers}

    def groups(self) -> Iterator[Group]:
        """Groups with something to remove."""
        seen: dict[nn.Module, set[int]] = {}
        for layer in list(self.graph.module2node):
            if not is_layer(layer) or layer not in self.names or is_depthwise(layer):
                continue
            left = [channel for channel in range(out_count(layer)) if channel not in seen.get(layer, ())]
            for node, produces, channels in self._members(layer, left)[0] if left else ():
                if produces:
                    seen.setdefault(node.module, set()).update(*channels.values())
            group = self._dead(layer, left) if left else None
            if group is not None:
                yield group

    def outputs(self) -> Iterator[tuple[str, dict[str, Channels], str]]:
        """Every layer: its outputs and what is coupled with them, layer -> positions; and why they must stay, if so."""
        for layer in list(self.graph.module2node):
            if is_layer(layer) and layer in self.names:
                group, foreign = self._sorted(self._path(layer), *self._members(layer, range(out_count(layer))))
                yield self._path(layer), group.outputs, foreign

    def _dead(self, root: Any, chosen: list[int]) -> Group | None:
        """Shrink a set of channels of a root until every one left is dead wherever it is read."""
        path = self._path(root)
        while True:
            members, lost = self._members(root, chosen)
            group, foreign = self._sorted(path, members, lost)
            if foreign:
                if not all(self.fed[root][channel] for channel in chosen):
                    self.refused[path] = foreign
                return None
            own = group.outputs[path]
            twins = {index for channel in chosen for index in own[channel] if index > channel and index in own}
            alive = self._alive(group, members) | self._uneven(group, chosen) | twins
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

    def _members(self, root: Any, chosen: Iterable[int]) -> tuple[list[Member], str]:
        """What goes with outputs of a root, and why they cannot be followed, if so."""
        start = self.graph.module2node[root], self.graph.get_pruner_of_module(root).prune_out_channels
        places = [Place(channel, channel) for channel in chosen]
        found = {start: set(places)}
        stack = [(*start, places)]
        lost = ""
        while stack and not lost:
            node, function, places = stack.pop()
            for edge in node.dependencies:
                there: Any = places if edge.is_triggered_by(function) else []
                for mapping in filter(None, edge.index_mapping):
                    there = mapping(there)
                known = found.setdefault((edge.target, edge.handler), set())
                new = [place for place in there if place not in known]
                if any(place.idx >= self.widest for place in new):
                    lost = "its channels cannot be followed through the network"
                elif new:
                    known.update(new)
                    stack.append((edge.target, edge.handler, new))
        members = []
        for (node, function), known in found.items():
            channels: Channels = {}
            for index, channel in sorted(known):
                channels.setdefault(channel, []).append(index)
            if channels:
                members.append((node, bool(self.graph.is_out_channel_pruning_fn(function)), channels))
        return members, lost

    def _sorted(self, root: str, members: list[Member], lost: str = "") -> tuple[Group, str]:
        """The members as outputs and inputs of layers, or why the group cannot be cut."""
        group = Group(root, {}, {})
        for node, produces, channels in members:
            layer = node.module
            if not node.outputs and (produces or layer not in self.names):
                return group, "the model puts it out"
            if layer in self.names and any(id(p) in self.shared for p in layer.parameters()):
                return group, f"'{self._path(layer)}' shares its weight with another layer"
            if layer not in self.names:
                operation = node.grad_fn.name().partition("Backward")[0] if node.grad_fn is not None else ""
                if isinstance(layer, nn.Parameter):
                    return group, f"a parameter of shape {tuple(layer.shape)} is added to it"
                if not _CHANNELWISE.fullmatch(operation) and not _is_product_of_a_layer(node):
                    return group, f"{operation or node.name} may mix its channels"
                continue
            if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
                continue
            if not is_layer(layer) and not isinstance(layer, nn.modules.batchnorm._NormBase | nn.PReLU):
                return group, f"{type(layer).__name__} '{self._path(layer)}' takes them all together"
            whole = out_count(layer) if produces else in_count(layer)
            if any(index >= whole for indices in channels.values() for index in indices):
                return group, f"its channels are not those of '{self._path(layer)}' one by one"
            if produces:
                group.outputs[self._path(layer)] = channels
            if not produces or is_depthwise(layer):
                group.readers[self._path(layer)] = channels
        return group, lost or ("" if group.readers else "no layer that reads it was found")

    def _alive(self, group: Group, members: list[Member]) -> set[int]:
        """Channels that somebody reads and something feeds; notes the constants of the others."""
        alive: set[int] = set()
        nodes = {self._path(node.module): node for node, _, _ in members if node.module in self.names}
        group.constants = {}
        for name, channels in group.readers.items():
            layer, node = nodes[name].module, nodes[name]
            read = self.read[layer]
            fixed = self.constants.get(layer)
            if is_depthwise(layer):
                continue  # it passes its channel on; who reads that decides
            sources = [self._sources(node, through) for through in (True, False)]
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

    def _sources(self, node: Any, through: bool) -> list[Any]:
        """Layers whose outputs a layer is given; depthwise ones are passed through, or count themselves."""
        found, stack, seen = [], list(node.inputs), set()
        while stack:
            ahead = stack.pop()
            if ahead in seen:
                continue
            seen.add(ahead)
            if is_layer(ahead.module) and not (through and is_depthwise(ahead.module)):
                found.append(ahead.module)
            else:
                stack += ahead.inputs
        return found

    def _feeds(self, group: Group, source: Any, channel: int) -> bool:
        """Whether a layer has a weight that is not zero for a channel."""
        outputs = group.outputs.get(self._path(source), {}).get(channel, [])
        return any(self.fed[source][index] for index in outputs)

    def _uneven(self, group: Group, going: list[int]) -> set[int]:
        """Channels that must not go so that the groups of a convolution remain equal in size, and none empty."""
        stay: set[int] = set()
        for side, count in ((group.outputs, out_count), (group.readers, in_count)):
            for name, channels in side.items():
                layer = self.model.get_submodule(name)
                if not isinstance(layer, _ConvNd) or layer.groups == 1 or is_depthwise(layer):
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

    def _carry(self, group: Group) -> None:
        """Choose dead channels that stay, one that each layer without an exact bias is given as a number other than zero."""
        needing: dict[str, dict[int, float]] = {}
        for name, constants in group.constants.items():
            layer = self.model.get_submodule(name)
            if bias_is_exact(layer):
                continue
            by_channel = {
                channel: max((constants.get(index, 0.0) for index in indices), key=abs)
                for channel, indices in group.readers[name].items()
            }
            if isinstance(layer, _ConvNd) and layer.groups > 1:  # one group's channel cannot carry another's
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

    def _leave_one(self, group: Group) -> None:
        """A layer without outputs is none: if all are dead, the last one stays."""
        for name, channels in (*group.outputs.items(), *group.readers.items()):
            layer = self.model.get_submodule(name)
            whole = in_count(layer) if name in group.readers and is_layer(layer) else out_count(layer)
            gone = {index for channel in group.removed for index in channels.get(channel, [])}
            if len(gone) >= whole:
                group.carriers.append(group.removed.pop())

    def _path(self, layer: nn.Module) -> str:
        return f"{self.prefix}.{self.names[layer]}".strip(".")


def _is_product_of_a_layer(node: Any) -> bool:
    """Whether it is the product inside a linear layer that reshapes what it is given: the reshaping stands for the layer."""
    return bool(node.outputs) and all(
        isinstance(after.module, nn.Linear) and "View" in after.grad_fn.name() for after in node.outputs
    )


def is_layer(layer: Any) -> bool:
    """Whether it is a linear layer or a convolution, transposed ones among them."""
    return isinstance(layer, nn.Linear | _ConvNd)


def is_depthwise(layer: Any) -> bool:
    """Whether each of its outputs reads the input of the same number, and no other."""
    return isinstance(layer, _ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def fed_outputs(layer: Any) -> Tensor:
    """Which outputs have a weight other than zero."""
    weight: Tensor = layer.weight.detach() != 0
    if isinstance(layer, _ConvTransposeNd):
        per_group: Tensor = weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel()).any(-1).any(1)
        return per_group.flatten()
    return weight.flatten(1).any(1)


def _read(layer: Any) -> Tensor:
    """Which inputs are multiplied by a weight other than zero."""
    weight: Tensor = layer.weight.detach() != 0
    if isinstance(layer, _ConvTransposeNd):
        return weight.flatten(1).any(1)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).any(-1).any(1).flatten()


def bias_is_exact(layer: Any) -> bool:
    """Whether a constant input adds the same to every place of an output."""
    if layer.bias is None or isinstance(layer, _ConvTransposeNd):
        return False
    return isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or not any(padding_of(layer) or (1,))


@torch.no_grad()
def constants_of(model: nn.Module, inputs: list[Tensor]) -> dict[nn.Module, dict[int, float]]:
    """Layer -> input channel -> the number it is given, for channels that are given only one."""
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
            model(fit_to(model, x))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer in low:
        a, b = low[layer].double(), high[layer].double()
        same = (b - a) <= 1e-6 * torch.maximum(a.abs(), b.abs())  # kernels round the ends of a row in another way
        middle = ((a + b) / 2).tolist()
        found[layer] = {int(index): middle[int(index)] for index in same.nonzero().flatten()}
    return found
