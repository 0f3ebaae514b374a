"""Find coupled channels with Torch-Pruning's dependency graph (Fang et al. 2023).

Source: https://arxiv.org/abs/2301.12900. This is the only file that uses the library.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from lightning_sparse.core.calls import Call
from lightning_sparse.core.costs import tensors_in
from lightning_sparse.core.coupling_engine import Member, Positions
from lightning_sparse.core.libraries import first_line, need
from lightning_sparse.core.linear import CHANNEL_NORMS, in_count, is_layer, out_count

__all__ = ["torch_pruning"]

# Operations in which channels are independent. All other operations may mix channels, so their channels stay.
_CHANNELWISE = re.compile(
    "(Abs|Add|Alias|AsStrided|AvgPool|AdaptiveAvgPool|AdaptiveMaxPool|Cat|Celu|Clamp|Clone|ConstantPad|Div|Elu|Exp|Expand|Gelu|"
    "Hardsigmoid|Hardswish|Hardtanh|LeakyRelu|LogSigmoid|MaxPool|Mean|MkldnnMaxPool|Mish|Mul|NativeDropout|Neg|Permute|Pow|"
    "PreluKernel|ReflectionPad|Relu|ReplicationPad|ReshapeAlias|Rsqrt|Rsub|Selu|Sigmoid|Silu|Slice|Softplus|Split|Sqrt|"
    "Squeeze|Sub|T|Tanh|Threshold|ToCopy|Transpose|UnsafeView|Unsqueeze|UpsampleBilinear|UpsampleNearest|View)"
    r"([123]D)?(WithIndices|Nd)?\d*"
)


def torch_pruning(network: nn.Module, call: Call) -> Mapping[str, Sequence[Member]]:
    """Return what is coupled with the outputs of each layer, found from the autograd graph.

    Raises:
        ValueError: if Torch-Pruning is missing or cannot trace the network.
    """
    library = need("torch_pruning", "torch-pruning")
    try:
        graph = _trace(library, network, call.first(2))
    except Exception:
        try:  # a tensor may need all of its rows although their number equals that of the samples
            if len(call.tensors) == 1:
                raise
            graph = _trace(library, network, call)
        except Exception as error:
            said = f"{type(network).__name__} cannot be traced by Torch-Pruning ({first_line(error)})"
            raise ValueError(f"{said}; train it with structure='channel', or export it without removal.") from None
    return _Answers(network, graph)


class _Index(NamedTuple):
    """A channel of the root and its position in another layer; the fields are named as the graph's mappings expect."""

    idx: int
    root_idx: int


class _Answers(Mapping[str, Sequence[Member]]):
    """What is coupled with each layer; computed on access, because traversing a large network takes seconds."""

    def __init__(self, network: nn.Module, graph: Any) -> None:
        self.graph = graph
        self.names = {layer: name for name, layer in network.named_modules()}
        self.layers = {self.names[part]: part for part in graph.module2node if is_layer(part) and part in self.names}
        self.widest = max(max(in_count(layer), out_count(layer)) for layer in self.names if is_layer(layer))
        self.found: dict[str, list[Member]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, root: str) -> list[Member]:
        if root not in self.found:
            self.found[root] = self._walk(self.layers[root])
        return self.found[root]

    def _walk(self, layer: Any) -> list[Member]:
        """Traverse the graph from the outputs of a layer, along its edges and the edges that these trigger."""
        start = self.graph.module2node[layer], self.graph.get_pruner_of_module(layer).prune_out_channels
        places = [_Index(channel, channel) for channel in range(out_count(layer))]
        reached = {start: set(places)}
        lost: set[int] = set()
        stack = [(*start, places)]
        while stack:
            node, function, places = stack.pop()
            for edge in node.dependencies:
                there: Any = places if edge.is_triggered_by(function) else []
                try:
                    for mapping in filter(None, edge.index_mapping):
                        there = mapping(there)
                except IndexError:  # the graph splits the outputs of recurrent layers at wrong places
                    lost |= {place.root_idx for place in places}
                    continue
                if any(place.root_idx is None for place in there):  # mappings of repeated heads lose the root's channel
                    lost |= {place.root_idx for place in places}
                    continue
                known = reached.setdefault((edge.target, edge.handler), set())
                lost |= {place.root_idx for place in there if place.idx >= self.widest}
                new = [place for place in there if place not in known and place.root_idx not in lost]
                if new:
                    known.update(new)
                    stack.append((edge.target, edge.handler, new))
        members = [self._member(node, function, known) for (node, function), known in reached.items() if known]
        if lost:
            channels = {channel: [channel] for channel in sorted(lost)}
            members.append(Member(None, False, channels, "its channels cannot be followed through the network"))
        return members

    def _member(self, node: Any, function: Any, places: set[_Index]) -> Member:
        channels: Positions = {}
        for index, channel in sorted(places):
            channels.setdefault(channel, []).append(index)
        produces = bool(self.graph.is_out_channel_pruning_fn(function))
        return Member(self.names.get(node.module), produces, channels, self._why_it_stays(node, produces))

    def _why_it_stays(self, node: Any, produces: bool) -> str:
        layer = node.module
        if not node.outputs and (produces or layer not in self.names):
            return "it is an output of the model"
        if layer in self.names:
            return ""
        if isinstance(layer, nn.Parameter):
            return f"a parameter of shape {tuple(layer.shape)} is added to it"
        operation = node.grad_fn.name().partition("Backward")[0] if node.grad_fn is not None else ""
        known = _CHANNELWISE.fullmatch(operation) or _is_product_of_a_layer(node) or _is_norm_before_activation(node)
        if not known:
            return f"{operation or node.name} may mix its channels"
        return ""


def _trace(library: Any, network: nn.Module, call: Call) -> Any:
    """Return the dependency graph of a network, traced with one call."""
    graph = library.DependencyGraph()

    def forward(net: nn.Module, given: Call) -> list[Tensor]:
        outputs = tensors_in(net(*given.args, **given.kwargs))
        return [output for output in outputs if output.requires_grad]

    with warnings.catch_warnings(), torch.enable_grad(), _constant_slopes(network):
        warnings.simplefilter("ignore")
        graph.build_dependency(network, call, forward_fn=forward, verbose=False)
    if not any(map(is_layer, graph.module2node)):
        raise ValueError("its output depends on no layer")
    return graph


@contextmanager
def _constant_slopes(network: nn.Module) -> Iterator[None]:
    """Run each PReLU that has one slope without its weight, which the graph would take for an input with channels."""
    parts = [p for p in network.modules() if isinstance(p, nn.PReLU) and p.num_parameters == 1 and "forward" not in vars(p)]
    for part in parts:
        vars(part)["forward"] = leaky_relu
    try:
        yield
    finally:
        for part in parts:
            del vars(part)["forward"]


def _is_product_of_a_layer(node: Any) -> bool:
    """Whether a node is the product in a linear layer that reshapes its input; the reshape node represents the layer."""
    return bool(node.outputs) and all(
        isinstance(after.module, nn.Linear) and "View" in after.grad_fn.name() for after in node.outputs
    )


def _is_norm_before_activation(node: Any) -> bool:
    """Whether a node is the normalization in a layer that ends in an activation, whose node represents the layer."""
    name = node.grad_fn.name() if node.grad_fn is not None else ""
    return "BatchNorm" in name and any(isinstance(after.module, CHANNEL_NORMS) for after in node.outputs)
