"""Which channels of a network can only leave together, found on Torch-Pruning's dependency graph.

Additions, concatenations, depthwise layers and normalization couple the channels of one layer with those of others
(Fang et al. 2023, https://arxiv.org/abs/2301.12900).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse.core.calls import Call
from lightning_sparse.core.costs import tensors_in
from lightning_sparse.core.coupling import Coupling, Place
from lightning_sparse.core.libraries import first_line, need
from lightning_sparse.core.linear import CHANNEL_NORMS, in_count, is_depthwise, is_layer, out_count
from lightning_sparse.core.networks import callee, copy_model, shared_parameters

__all__ = ["Dependencies", "Group", "Positions", "coupled_outputs", "find_coupling"]

Positions = dict[int, list[int]]
"""Positions in a layer, by the channel of the root that they are coupled with."""

Member = tuple[Any, bool, Positions]
"""A node of the graph, whether by its outputs, and its positions."""

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
    """Channels of a layer, the root, and what is coupled with them.

    Args:
        root: the layer by whose outputs they are counted.
        outputs: layer -> its outputs, by channel of the root.
        readers: layer -> its inputs, by channel of the root.
    """

    root: str
    outputs: dict[str, Positions]
    readers: dict[str, Positions]


class _Index(NamedTuple):
    """A channel of the root, and where it is in another layer; named as the graph's mappings have it."""

    idx: int
    root_idx: int


class Dependencies:
    """The layers of a model, and what the outputs of each are coupled with.

    Args:
        model: a network, or a LightningModule that holds one.
        inputs: a batch for it; a tuple holds positional arguments, a dictionary named ones.

    Raises:
        ValueError: if Torch-Pruning is missing or cannot trace the model.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        call = Call.of(inputs)
        traced = copy_model(model).eval().requires_grad_(True)
        self.prefix, self.network = callee(traced, call.network)
        """The network is a copy; what is said of it goes for the model."""
        call = call.fit(self.network)
        library = need("torch_pruning", "torch-pruning")
        try:
            self.graph = _trace(library, self.network, call.first(2))
        except Exception:
            try:  # a tensor may have as many rows as there are samples, and need them all
                if len(call.tensors) == 1:
                    raise
                self.graph = _trace(library, self.network, call)
            except Exception as error:
                said = f"{type(model).__name__} cannot be traced by Torch-Pruning ({first_line(error)})"
                raise ValueError(f"{said}; train it with structure='channel', or export it without removal.") from None
        self.names = {layer: name for name, layer in self.network.named_modules()}
        self.layers: dict[str, Any] = {self.path(part): part for part in self.graph.module2node if self._is_ours(part)}
        """All layers that the outputs depend on, by their names in the model."""
        self.shared = shared_parameters(self.network)
        self.widest = max(max(in_count(layer), out_count(layer)) for layer in self.names if is_layer(layer))

    def groups(self) -> Iterator[tuple[Group, str]]:
        """Of every layer its outputs, what is coupled with them and what reads them; and why they must stay, if so."""
        for name, layer in self.layers.items():
            yield self.group(name, *self.members(name, range(out_count(layer))))

    def members(self, root: str, chosen: Iterable[int]) -> tuple[list[Member], str]:
        """What goes with outputs of a root, and why they cannot be followed, if so."""
        layer = self.layers[root]
        start = self.graph.module2node[layer], self.graph.get_pruner_of_module(layer).prune_out_channels
        places = [_Index(channel, channel) for channel in chosen]
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
            channels: Positions = {}
            for index, channel in sorted(known):
                channels.setdefault(channel, []).append(index)
            if channels:
                members.append((node, bool(self.graph.is_out_channel_pruning_fn(function)), channels))
        return members, lost

    def group(self, root: str, members: list[Member], lost: str = "") -> tuple[Group, str]:
        """The members as outputs and inputs of layers, or why the group cannot be cut."""
        group = Group(root, {}, {})
        for node, produces, channels in members:
            layer = node.module
            if not node.outputs and (produces or layer not in self.names):
                return group, "it is an output of the model"
            if layer in self.names and any(id(p) in self.shared for p in layer.parameters()):
                return group, f"'{self.path(layer)}' shares its weight with another layer"
            if layer not in self.names:
                operation = node.grad_fn.name().partition("Backward")[0] if node.grad_fn is not None else ""
                if isinstance(layer, nn.Parameter):
                    return group, f"a parameter of shape {tuple(layer.shape)} is added to it"
                if not _CHANNELWISE.fullmatch(operation) and not _is_product_of_a_layer(node):
                    return group, f"{operation or node.name} may mix its channels"
                continue
            if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
                continue
            if not is_layer(layer) and not isinstance(layer, (*CHANNEL_NORMS, nn.PReLU)):
                return group, f"{type(layer).__name__} '{self.path(layer)}' mixes its channels"
            whole = out_count(layer) if produces else in_count(layer)
            if any(index >= whole for indices in channels.values() for index in indices):
                return group, f"its channels do not match those of '{self.path(layer)}' one to one"
            if produces:
                group.outputs[self.path(layer)] = channels
            if not produces or is_depthwise(layer):
                group.readers[self.path(layer)] = channels
        return group, lost or ("" if group.readers else "no layer that reads it was found")

    def sources(self, reader: str, through: bool) -> list[str]:
        """Layers whose outputs a layer is given; depthwise ones are passed through, or count themselves."""
        found, stack, seen = [], list(self.graph.module2node[self.layers[reader]].inputs), set()
        while stack:
            ahead = stack.pop()
            if ahead in seen:
                continue
            seen.add(ahead)
            if is_layer(ahead.module) and not (through and is_depthwise(ahead.module)):
                found.append(self.path(ahead.module))
            else:
                stack += ahead.inputs
        return found

    def path(self, layer: nn.Module) -> str:
        """The name of a layer of the network in the model."""
        return f"{self.prefix}.{self.names[layer]}".strip(".")

    def _is_ours(self, part: Any) -> bool:
        return is_layer(part) and part in self.names


def _trace(library: Any, network: nn.Module, call: Call) -> Any:
    """The dependency graph of a network, as one call of it goes through."""
    graph = library.DependencyGraph()

    def forward(net: nn.Module, given: Call) -> list[Tensor]:
        outputs = tensors_in(net(*given.args, **given.kwargs))
        return [output for output in outputs if output.requires_grad]

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        graph.build_dependency(network, call, forward_fn=forward, verbose=False)
    if not any(map(is_layer, graph.module2node)):
        raise ValueError("its output depends on no layer")
    return graph


def _is_product_of_a_layer(node: Any) -> bool:
    """Whether it is the product inside a linear layer that reshapes what it is given: the reshaping stands for the layer."""
    return bool(node.outputs) and all(
        isinstance(after.module, nn.Linear) and "View" in after.grad_fn.name() for after in node.outputs
    )


def coupled_outputs(model: nn.Module, inputs: Any, network: str | None = None) -> list[list[str]]:
    """Layers whose outputs can only be removed together, since additions or depthwise layers couple them.

    A mask that removes the same outputs of all of them makes a network that `remove_dead` can cut in both directions; masks
    chosen layer by layer rarely agree along a residual stream.

    Args:
        model: a network, or a model that holds one.
        inputs: a batch for it; a tuple holds positional arguments, a dictionary named ones.
        network: the part of the model that takes the inputs, by name; None finds it.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
        >>> coupled_outputs(net, torch.randn(2, 1, 8, 8))
        [['0', '2']]
    """
    found: list[list[str]] = []
    for group, foreign in Dependencies(model, Call.of(inputs, network)).groups():
        if not foreign and not any(group.root in names for names in found):
            found.append(sorted(name for name in group.outputs if is_layer(model.get_submodule(name))))
    return sorted(found)


def find_coupling(model: nn.Module, calls: Sequence[Call], weights: Mapping[str, int]) -> Coupling:
    """Which channels of the given weights can only leave together, and what goes with them: biases and norms.

    Args:
        model: that holds the weights.
        calls: of its networks, of which none holds another.
        weights: weight -> how many output channels it has.

    Raises:
        ValueError: if Torch-Pruning is missing or cannot trace the model, or if no channel can leave.
    """
    parameters = {name: len(parameter) for name, parameter in model.named_parameters() if parameter.ndim == 1}
    staying = dict.fromkeys(weights, "the outputs do not depend on it")
    groups: list[list[Place]] = []
    vectors: dict[str, int] = {}
    readers: dict[str, list[Place | None]] = {}
    for group, foreign in (found for call in calls for found in Dependencies(model, call).groups()):
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
        for name, positions in group.readers.items():
            module = model.get_submodule(name)
            if not is_depthwise(module):
                read = readers.setdefault(f"{name}.weight", [None] * in_count(module))
                for channel, indices in positions.items():
                    for index in indices:
                        read[index] = channels[channel][0] if channels.get(channel) else None
    coupling = Coupling(groups, weights, vectors, staying, readers)
    if not coupling.count:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(staying.items())[:2])
        raise ValueError(f"structure='coupled' finds no channel of {type(model).__name__} that can be removed ({reasons}).")
    return coupling
