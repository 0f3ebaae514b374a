"""Batch normalization after training: re-estimate its statistics, or fold it into layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_sparse.core import (
    BATCH_NORMS,
    Call,
    copy_model,
    find_networks,
    is_linear,
    out_count,
    replace_module,
    shared_parameters,
)
from lightning_sparse.export.blueprint import Blueprint, add_bias
from lightning_sparse.export.compare_models import difference, runner
from lightning_sparse.functional import fold_batch_norm

__all__ = ["fold_norms", "recalibrate"]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], network: str | None = None) -> int:
    """Re-estimate the running statistics of batch normalization in place, with the current weights.

    Pruning changes the outputs of layers, and the running averages lag behind. Each batch counts the same. Everything except
    batch normalization stays in evaluation mode.

    Args:
        model: the model whose normalizations are re-estimated.
        batches: inputs of the training set, without labels; a few hundred samples are enough. A tuple holds positional
            arguments, a dict holds keyword arguments.
        network: name of the submodule that takes the inputs; None finds it.

    Returns:
        The number of layers re-estimated; 0 if the model has none.

    Raises:
        ValueError: if there are no batches.
    """
    norms = [part for part in model.modules() if isinstance(part, BATCH_NORMS) and part.running_mean is not None]
    modes = [(part, part.training) for part in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the plain mean of all batches
    count = 0
    try:
        for batch in batches:
            count += 1
            if norms:
                Call.of(batch, network)(model)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for part, mode in modes:
            part.training = mode
    if not count:
        raise ValueError("batches is empty: statistics need at least one batch of training inputs.")
    return len(norms)


@torch.no_grad()
def fold_norms(model: nn.Module, inputs: Any = None, network: str | None = None) -> tuple[nn.Module, Blueprint]:
    """A copy in evaluation mode in which each batch normalization right after a layer is folded into that layer.

    The normalization becomes an `nn.Identity`, and its layer gets a bias if it had none. Zeros stay zeros. Only
    normalizations that are called once, in a module that torch.fx can trace, are folded. One that follows a linear layer
    also needs an input of two dimensions: from inputs, or from a network that flattens its own.

    Args:
        model: the model to copy.
        inputs: a batch; a tuple holds positional arguments, a dict holds keyword arguments. If given, folds only if outputs
            on it stay the same.
        network: name of the submodule that takes the inputs; None finds it.

    Returns:
        The copy, and the blueprint with which its weights can be loaded into a new model.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)).eval()
        >>> folded, _ = fold_norms(net)
        >>> folded[1], folded[0].bias.shape
        (Identity(), torch.Size([2]))
    """
    whole, model = model, copy_model(model).eval()
    call = None if inputs is None else Call.of(inputs, network)
    flat = set() if call is None else _flat_norms(model, call)
    shared = shared_parameters(model)
    networks = find_networks(model)[0]
    used: Counter[nn.Module] = Counter()
    for part in networks:
        used.update(part.module.get_submodule(str(node.target)) for node in part.graph.nodes if node.op == "call_module")
    folded: list[str] = []
    biased: list[str] = []
    for part in networks:
        modules = dict(part.module.named_modules(remove_duplicate=False))
        calls = [node for node in part.graph.nodes if node.op == "call_module"]
        prefix = f"{part.path}." if part.path else ""
        for node in calls:
            norm, source = modules[str(node.target)], node.args[0] if node.args else None
            ours = isinstance(source, fx.Node) and source in calls and len(source.users) == 1
            if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None or not ours:
                continue
            name = str(source.target)  # type: ignore[union-attr]
            layer: Any = modules[name]
            tied = any(id(p) in shared for one in (layer, norm) for p in one.parameters())
            twice = used[layer] > 1 or used[norm] > 1
            if not is_linear(layer) or tied or twice or out_count(layer) != norm.num_features:
                continue
            # A normalization counts channels in the second dimension, a linear layer in the last.
            if isinstance(layer, nn.Linear) and not (norm in flat or _is_flat(source, modules)):
                continue
            if layer.bias is None:
                biased.append(f"{prefix}{name}")
            _take_in(layer, norm)
            folded.append(f"{prefix}{node.target}")
    for name in folded:
        model = replace_module(model, name, nn.Identity())
    if folded and call is not None and not _agree(copy_model(whole).eval(), model, call):
        return copy_model(whole).eval(), Blueprint()
    return model, Blueprint(folded=tuple(folded), biased=tuple(biased))


def _flat_norms(model: nn.Module, call: Call) -> set[nn.Module]:
    """The normalizations whose inputs have two dimensions."""
    seen: dict[nn.Module, set[int]] = {}

    def look(norm: nn.Module, args: Any, output: Tensor) -> None:
        seen.setdefault(norm, set()).add(output.ndim)

    handles = [part.register_forward_hook(look) for part in model.modules() if isinstance(part, BATCH_NORMS)]
    try:
        runner(model, call)()
    finally:
        for handle in handles:
            handle.remove()
    return {norm for norm, dimensions in seen.items() if dimensions == {2}}


_SAME_SHAPE = ("activation", "dropout")
"""Modules of `torch.nn` whose layers leave shapes as they are."""


def _is_flat(node: Any, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a graph shows that a node has two dimensions: it flattens its input, or follows such a node."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if node.op == "call_module":
        layer: Any = modules[str(node.target)]
        if isinstance(layer, nn.Flatten):
            return (layer.start_dim, layer.end_dim) == (1, -1)
        same = isinstance(layer, (nn.Linear, nn.Identity, *BATCH_NORMS)) or (
            type(layer).__module__ in {f"torch.nn.modules.{kind}" for kind in _SAME_SHAPE}
        )
        return same and _is_flat(node.args[0], modules)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name == "flatten":
        return node.args[1:] == (1,) or (not node.args[1:] and dict(node.kwargs) == {"start_dim": 1})
    if name in ("view", "reshape") and node.op == "call_method":
        return len(node.args) == 3
    return name in _ELEMENTWISE and _is_flat(node.args[0], modules)


_ELEMENTWISE = ("dropout", "elu", "gelu", "hardswish", "leaky_relu", "mish", "relu", "relu6", "sigmoid", "silu", "tanh")
"""Functions and methods that leave shapes as they are."""


def _agree(before: nn.Module, after: nn.Module, call: Call) -> bool:
    """Whether outputs are equal up to the rounding of folded weights."""
    change, largest = difference(runner(before, call)(), runner(after, call)())
    rounding = 16 * max(torch.finfo(p.dtype).eps for p in before.parameters())
    return change <= max(1e-3, rounding) * max(largest, torch.finfo(torch.float32).tiny)


def _take_in(layer: Any, norm: Any) -> None:
    bias, gamma, beta = (None if t is None else t.double() for t in (layer.bias, norm.weight, norm.bias))
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight, bias = fold_batch_norm(layer.weight.double(), bias, mean, var, norm.eps, gamma, beta)
    add_bias(layer)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
