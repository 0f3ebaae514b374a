"""Which channels of a network do nothing, found on Torch-Pruning's dependency graph and proven on the weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_sparse.core import padding_of, shared_parameters
from lightning_sparse.export.blueprint import in_count, out_count
from lightning_sparse.export.running import callee, copy_model, fit_to

__all__ = ["Channels", "Group", "Round", "bias_is_exact", "constants_of"]

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
                self.graph.build_dependency(called, fit_to(called, inputs[0][:2]), verbose=False)
                if not any(map(is_layer, self.graph.module2node)):
                    raise ValueError("no layer is found behind its output")
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                raise ValueError(
                    f"{type(model).__name__} cannot be traced by Torch-Pruning ({reason}); export it without removal."
                ) from None
        self.names = {layer: name for name, layer in called.named_modules()}
        self.shared = shared_parameters(called)
        layers = [layer for layer in self.names if is_layer(layer)]
        self.fed: dict[Any, list[bool]] = {layer: _fed(layer).tolist() for layer in layers}
        self.read: dict[Any, list[bool]] = {layer: _read(layer).tolist() for layer in layers}

    def groups(self) -> Iterator[Group]:
        """Groups with something to remove."""
        seen: set[nn.Module] = set()
        for layer in list(self.graph.module2node):
            if is_layer(layer) and layer not in seen and layer in self.names and not _is_depthwise(layer):
                seen |= self._members(layer, range(out_count(layer)))[1]
                group = self._dead(layer)
                if group is not None:
                    yield group

    def outputs(self) -> Iterator[tuple[str, dict[str, Channels], str]]:
        """Every layer: its outputs and what is coupled with them, layer -> positions; and why they must stay, if so."""
        for layer in list(self.graph.module2node):
            if is_layer(layer) and layer in self.names:
                items, _ = self._members(layer, range(out_count(layer)))
                group, foreign = self._sorted(self._path(layer), items)
                yield self._path(layer), group.outputs, foreign

    def _dead(self, root: Any) -> Group | None:
        """Shrink the set of all channels of a root until every one left is dead wherever it is read."""
        path = self._path(root)
        chosen = list(range(out_count(root)))
        while True:
            items, _ = self._members(root, chosen)
            group, foreign = self._sorted(path, items)
            if foreign:
                if self._looks_dead(root):
                    self.refused[path] = foreign
                return None
            alive = self._alive(group, items) | self._uneven(group, chosen)
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

    def _members(self, root: Any, chosen: Any) -> tuple[list[Any], set[nn.Module]]:
        """What is pruned with channels of a root."""
        function = self.graph.get_pruner_of_module(root).prune_out_channels
        items = list(self.graph.get_pruning_group(root, function, list(chosen)))
        producers = {i.dep.target.module for i in items if self.graph.is_out_channel_pruning_fn(i.dep.handler)}
        return items, producers

    def _sorted(self, root: str, items: list[Any]) -> tuple[Group, str]:
        """The members as outputs and inputs of layers, or why the group cannot be cut."""
        group = Group(root, {}, {})
        for item in items:
            node, layer = item.dep.target, item.dep.target.module
            channels: Channels = {}
            for index, channel in zip(item.idxs, item.root_idxs, strict=True):
                channels.setdefault(channel, []).append(index)
            produces = self.graph.is_out_channel_pruning_fn(item.dep.handler)
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
            elif is_layer(layer):
                if not produces or _is_depthwise(layer):
                    group.readers.setdefault(self._path(layer), {}).update(channels)
                if produces:
                    group.outputs.setdefault(self._path(layer), {}).update(channels)
            elif isinstance(layer, nn.modules.batchnorm._NormBase | nn.PReLU):
                group.outputs.setdefault(self._path(layer), {}).update(channels)
            else:
                return group, f"{type(layer).__name__} '{self._path(layer)}' takes them all together"
        return group, "" if group.readers else "no layer that reads it was found"

    def _alive(self, group: Group, items: list[Any]) -> set[int]:
        """Channels that somebody reads and something feeds; notes the constants of the others."""
        alive: set[int] = set()
        nodes = {self._path(i.dep.target.module): i.dep.target for i in items if i.dep.target.module in self.names}
        group.constants = {}
        for name, channels in group.readers.items():
            layer, node = nodes[name].module, nodes[name]
            read = self.read[layer]
            fixed = self.constants.get(layer)
            if _is_depthwise(layer):
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
            if is_layer(ahead.module) and not (through and _is_depthwise(ahead.module)):
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
                if not isinstance(layer, _ConvNd) or layer.groups == 1 or _is_depthwise(layer):
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

    def _looks_dead(self, layer: Any) -> bool:
        return not all(self.fed[layer])

    def _path(self, layer: nn.Module) -> str:
        return f"{self.prefix}.{self.names[layer]}".strip(".")


def _is_product_of_a_layer(node: Any) -> bool:
    """Whether it is the product inside a linear layer that reshapes what it is given: the reshaping stands for the layer."""
    return bool(node.outputs) and all(
        isinstance(after.module, nn.Linear) and "View" in after.grad_fn.name() for after in node.outputs
    )


def is_layer(layer: Any) -> bool:
    return isinstance(layer, nn.Linear | _ConvNd)


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, _ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def _fed(layer: Any) -> Tensor:
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

    def look(layer: nn.Module, args: Any) -> None:
        channels = args[0].flatten(0, -2).T if isinstance(layer, nn.Linear) else args[0].transpose(0, 1).flatten(1)
        least, most = channels.aminmax(dim=1)
        low[layer] = torch.minimum(low.get(layer, least), least)
        high[layer] = torch.maximum(high.get(layer, most), most)

    handles = [layer.register_forward_pre_hook(look) for layer in model.modules() if is_layer(layer)]
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
