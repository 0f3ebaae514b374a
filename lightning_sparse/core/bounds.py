"""The least and the largest value that every operation of a traced network can give, as far as they are known."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

__all__ = ["ANY", "Bounds", "find_bounds", "name_of", "role_of"]

Bounds = tuple[float, float]
INF = math.inf
ANY: Bounds = (-INF, INF)

Rule = Callable[[Sequence[Bounds], Any], Bounds]


def _fixed(low: float, high: float) -> Rule:
    return lambda given, part: (low, high)


def _keep(given: Sequence[Bounds], part: Any) -> Bounds:
    return given[0]


def _with_zero(given: Sequence[Bounds], part: Any) -> Bounds:
    return min(given[0][0], 0.0), max(given[0][1], 0.0)


def _relu(given: Sequence[Bounds], part: Any) -> Bounds:
    return max(given[0][0], 0.0), max(given[0][1], 0.0)


def _elu(given: Sequence[Bounds], part: Any) -> Bounds:
    alpha = abs(float(getattr(part, "alpha", 1.0)))
    return max(-alpha, min(given[0][0], 0.0)), max(given[0][1], 0.0)


def _absolute(given: Sequence[Bounds], part: Any) -> Bounds:
    return 0.0, max(abs(bound) for bound in given[0])


def _leaky(given: Sequence[Bounds], part: Any) -> Bounds:
    return given[0] if given[0][0] >= 0 else ANY


def _add(given: Sequence[Bounds], part: Any) -> Bounds:
    return sum(low for low, _ in given), sum(high for _, high in given)


def _cat(given: Sequence[Bounds], part: Any) -> Bounds:
    return min(low for low, _ in given), max(high for _, high in given)


ACTIVATIONS: dict[Any, Rule] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    **dict.fromkeys((nn.ELU, nn.CELU), _elu),
    **dict.fromkeys((nn.LeakyReLU, nn.PReLU), _leaky),
    **dict.fromkeys((torch.abs, "abs", operator.abs), _absolute),
}
"""What equals its argument wherever that is not negative."""

TRANSPARENT: dict[Any, Rule] = dict.fromkeys(
    (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, F.dropout, "contiguous"), _keep
)
"""What is the identity in evaluation mode."""

OTHERS: dict[Any, Rule] = {
    **dict.fromkeys((nn.Flatten, nn.Unflatten, torch.flatten, "flatten", "view", "reshape", "permute", "transpose"), _keep),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d), _keep),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.adaptive_avg_pool2d), _keep),
    **dict.fromkeys(("mean", torch.mean, "squeeze", "unsqueeze", torch.squeeze, "detach", "clone", "amax", "size"), _keep),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d), _with_zero),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", nn.Hardsigmoid, nn.Softmax), _fixed(0.0, 1.0)),
    **dict.fromkeys((nn.Tanh, torch.tanh, "tanh"), _fixed(-1.0, 1.0)),
    **dict.fromkeys((nn.ReLU6, F.relu6), _fixed(0.0, 6.0)),
    **dict.fromkeys((nn.Softplus, torch.square, "square"), _fixed(0.0, INF)),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    torch.cat: _cat,
}
"""What bounds are known for; everything else may give anything."""


def _key(node: fx.Node, part: nn.Module | None) -> Any:
    if node.op == "call_module":
        return type(part)
    return node.target if node.op in ("call_function", "call_method") else None


def name_of(node: fx.Node) -> str:
    """What an operation is called."""
    return getattr(node.target, "__name__", str(node.target))


def role_of(node: fx.Node, part: nn.Module | None) -> str:
    """Whether an operation is an `activation`, `transparent`, an `add`, or something `other`."""
    key = _key(node, part)
    if key in ACTIVATIONS:
        return "activation"
    if key in TRANSPARENT:
        return "transparent"
    return "add" if OTHERS.get(key) is _add else "other"


def _operands(node: fx.Node) -> Iterator[Any]:
    for argument in node.args:
        yield from argument if isinstance(argument, list | tuple) else (argument,)


def find_bounds(graph: fx.Graph, modules: Mapping[str, nn.Module], given: Bounds) -> dict[fx.Node, Bounds]:
    """The least and the largest value of every node, as far as they are known."""
    known: dict[fx.Node, Bounds] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = given
            continue
        part = modules.get(str(node.target)) if node.op == "call_module" else None
        key = _key(node, part)
        rule = next((table[key] for table in (ACTIVATIONS, TRANSPARENT, OTHERS) if key in table), None)
        if rule is None:
            continue
        inputs = [known.get(value, ANY) for value in _operands(node) if isinstance(value, fx.Node)]
        if rule is _add and len(inputs) < 2:
            continue  # a number is added
        if inputs:
            # F.dropout while training scales what it keeps; that is the same for bounds of zero and infinity.
            known[node] = rule(inputs, part)
    return known
