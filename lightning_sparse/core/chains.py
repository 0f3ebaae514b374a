"""Which layers of a network may merge into the next one, found in its `torch.fx` graph, and why others may not."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_sparse.core.bounds import ANY, Bounds, find_bounds, name_of, role_of
from lightning_sparse.core.linear import BATCH_NORMS, PLAIN_CONVOLUTIONS, is_linear, padding_of
from lightning_sparse.core.networks import Network, find_networks, shared_parameters
from lightning_sparse.functional import Convolution, fold_batch_norm, shift_input

__all__ = [
    "Chains",
    "Link",
    "analyze",
    "convolution_of",
    "effective_pair",
    "find_chains",
    "is_collapsed",
]


@dataclass(frozen=True)
class Link:
    """A layer that merges into its successor once its activation has no effect.

    Args:
        name: name of the layer in the module that was searched.
        layer: the layer itself.
        norm: the batch normalization between it and its activation, if any.
        activated: whether there is an activation to remove; without one the two layers are already linear.
        low: the smallest value that its inputs take; finite.
        high: the largest value that its inputs take.
        successor: the name of the next layer.
        nodes: nodes of the graph: the layer, everything in between, the successor.
        norm_name: name of `norm`.
    """

    name: str
    layer: nn.Module
    norm: nn.Module | None
    activated: bool
    low: float
    high: float
    successor: str
    nodes: tuple[fx.Node, ...] = field(repr=False, default=())
    norm_name: str | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that determine whether the layer is linear: weight, bias, and those of its normalization."""
        found = {f"{self.name}.{name}": p for name, p in self.layer.named_parameters(recurse=False)}
        if self.norm is not None:
            found |= {f"{self.norm_name}.{name}": p for name, p in self.norm.named_parameters(recurse=False)}
        return found


@dataclass(frozen=True)
class Chains:
    """All links of a module, and why its other layers are not links.

    Args:
        links: in the order of the graph.
        obstacles: layer -> reason.
    """

    links: list[Link]
    obstacles: dict[str, str]


def find_chains(module: nn.Module, input_range: Sequence[float] | None = None) -> Chains:
    """Find all layers of a module that may merge into the next one, by name, and the reason for each that may not.

    Args:
        module: a network, or a LightningModule that contains networks.
        input_range: the smallest and the largest input of the networks; None: unknown, so the first layer of each is left
            alone.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> chains = find_chains(net)
        >>> [link.name for link in chains.links], chains.obstacles["0"]
        (['2'], 'its input may be negative; give input_range if it is not')
    """
    networks, obstacles = find_networks(module)
    links: list[Link] = []
    shared = shared_parameters(module)
    for network in networks:
        found = analyze(network, input_range, shared)
        links += found.links
        obstacles |= found.obstacles
    return Chains(links, obstacles)


def analyze(
    network: Network, input_range: Sequence[float] | None = None, shared: Collection[int] = (), padded: bool = False
) -> Chains:
    """The links of one traced network; see `find_chains`.

    Args:
        network: a network from `find_networks`.
        input_range: range of its inputs.
        shared: ids of parameters that several layers hold.
        padded: whether pairs of convolutions with zero padding between them count as links too.
    """
    modules = dict(network.module.named_modules(remove_duplicate=False))
    bounds = find_bounds(
        network.graph, modules, ANY if input_range is None else (float(input_range[0]), float(input_range[1]))
    )
    calls: dict[int, int] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            calls[id(modules[node.target])] = calls.get(id(modules[node.target]), 0) + 1
    links: list[Link] = []
    obstacles: dict[str, str] = {}
    for node in network.graph.nodes:
        layer = modules[node.target] if node.op == "call_module" else None
        if layer is None or not is_linear(layer):
            continue
        name = f"{network.path}.{node.target}".lstrip(".")
        found = _follow(node, modules, bounds, network.path, padded)
        if isinstance(found, Link) and (
            calls[id(layer)] > 1 or any(id(p) in shared for p in layer.parameters(recurse=False))
        ):
            found = "its weights are shared with another layer"
        if isinstance(found, Link):
            links.append(found)
        else:
            obstacles[name] = found
    return Chains(links, obstacles)


def _follow(
    node: fx.Node, modules: Mapping[str, nn.Module], bounds: Mapping[fx.Node, Bounds], path: str, padded: bool
) -> Link | str:
    """Follow the graph from a layer to the next one; returns the link, or the obstacle."""
    layer = modules[str(node.target)]
    before = node.args[0] if node.args else None
    low, high = bounds.get(before, ANY) if isinstance(before, fx.Node) else ANY
    if isinstance(layer, PLAIN_CONVOLUTIONS) and any(padding_of(layer) or ()):
        low, high = min(low, 0.0), max(high, 0.0)  # zeros are padded
    low = min(low, 0.0)
    nodes, norm_node, activated = [node], None, False
    while True:
        users = list(nodes[-1].users)
        if len(users) != 1:
            if any(user.op == "output" for user in users) or not users:
                return "it is an output layer"
            return "what it computes is used more than once, as by a skip connection"
        current = users[0]
        part = modules[str(current.target)] if current.op == "call_module" else None
        if current.op == "output":
            return "it is an output layer"
        if is_linear(part):
            break
        kind, described = role_of(current, part), type(part).__name__ if part is not None else name_of(current)
        if isinstance(part, BATCH_NORMS) and norm_node is None and not activated:
            if part.running_mean is None:
                return f"'{current.target}' keeps no running statistics, so it cannot be folded"
            norm_node = current
        elif kind == "activation" and not activated:
            activated = True
        elif kind != "transparent":
            if kind == "add":
                return "what it computes is added to something else: a skip connection"
            return f"{described} between it and the next layer is not linear, or cannot be merged across"
        nodes.append(current)
    assert part is not None
    obstacle = _between(layer, part, norm_node is not None, padded)
    if obstacle is not None:
        return obstacle
    if activated and low == -math.inf:
        first = isinstance(before, fx.Node) and before.op == "placeholder"
        return "its input may be negative" + ("; give input_range if it is not" if first else "")
    target = None if norm_node is None else str(norm_node.target)
    return Link(
        f"{path}.{node.target}".lstrip("."),
        layer,
        None if target is None else modules[target],
        activated,
        low,
        high,
        f"{path}.{current.target}".lstrip("."),
        (*nodes, current),
        None if target is None else f"{path}.{target}".lstrip("."),
    )


def _between(first: nn.Module, second: nn.Module, shifted: bool, padded: bool) -> str | None:
    """Why two adjacent layers cannot be merged, if they cannot."""
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return None
    if not isinstance(first, PLAIN_CONVOLUTIONS) or type(first) is not type(second):
        return f"a {type(first).__name__} does not merge with a {type(second).__name__}"
    one, two = padding_of(first), padding_of(second)
    if one is None or two is None:
        return "padding='same' with more on one side cannot be merged"
    pads = [conv for conv, padding in ((first, one), (second, two)) if any(padding)]
    modes = {str(conv.padding_mode) for conv in pads}
    if modes - {"zeros", "circular"}:
        return f"padding_mode {sorted(modes)} cannot be merged"
    if not any(two):
        return None
    if modes == {"circular"}:
        reach = [d * (k - 1) for d, k in zip(first.dilation, first.kernel_size, strict=True)]
        if all(s == 1 for s in first.stride) and all(2 * p == r for p, r in zip(one, reach, strict=True)):
            return None
    bare = all(k == 1 for k in first.kernel_size) and not any(one) and first.bias is None and not shifted
    if modes == {"zeros"} and (bare or padded):
        return None
    return "the next layer pads between the two, and a merge would be wrong at the border; use pad_in_front first"


def convolution_of(layer: nn.Module) -> Convolution:
    """A convolution layer, or a linear one as a convolution without pixels, in float64."""
    bias = None if layer.bias is None else layer.bias.detach().double()  # type: ignore[operator]
    weight: Tensor = layer.weight.detach().double()  # type: ignore[operator]
    if isinstance(layer, nn.Linear):
        return Convolution(weight, bias, (), (), ())
    assert isinstance(layer, PLAIN_CONVOLUTIONS)
    return Convolution(weight, bias, layer.stride, padding_of(layer) or (), layer.dilation, layer.groups)


def effective_pair(link: Link, tensors: Mapping[str, Tensor] | None = None, shifted: bool = True) -> list[Tensor]:
    """Weight and bias of a link as its activation sees them: normalization folded, inputs counted from their lower bound.

    Args:
        link: of `find_chains`.
        tensors: stand-ins for its parameters by name, to differentiate by; None takes the parameters.
        shifted: whether to count inputs from their lower bound; then no negative entry means linear.
    """
    given = link.parameters() if tensors is None else tensors
    weight, bias = given[f"{link.name}.weight"], given.get(f"{link.name}.bias")
    if link.norm is not None:
        norm: Any = link.norm
        gamma, beta = (given.get(f"{link.norm_name}.{name}") for name in ("weight", "bias"))
        weight, bias = fold_batch_norm(weight, bias, norm.running_mean, norm.running_var, norm.eps, gamma, beta)
    if shifted:
        weight, bias = shift_input(weight, bias, link.low)
    return [weight] if bias is None else [weight, bias]


def is_collapsed(link: Link, smallest: float = 1e-3) -> bool:
    """Whether a layer's weights are so small that it cuts off the signal: below 1e-3 on the scale of usual initial values.

    Such a layer also has almost no negative part, but merging it would not be a success.

    Args:
        link: from `find_chains`.
        smallest: the Frobenius norm per square root of the number of outputs.
    """
    weight = effective_pair(link, shifted=False)[0].detach()
    size = float(torch.linalg.vector_norm(weight.double()))
    return size <= smallest * math.sqrt(weight.shape[0])
