"""Batch normalization after training: re-estimate its statistics, or fold it into layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from lightning_sparse.core import (
    BATCH_NORMS,
    Call,
    copy_model,
    find_networks,
    is_linear,
    out_count,
    shared_parameters,
)
from lightning_sparse.export.blueprint import Blueprint, add_bias
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
def fold_norms(model: nn.Module) -> tuple[nn.Module, Blueprint]:
    """A copy in evaluation mode in which each batch normalization right after a layer is folded into that layer.

    The normalization becomes an `nn.Identity`, and its layer gets a bias if it had none. Zeros stay zeros. Only
    normalizations that are called once, in a module that torch.fx can trace, are folded.

    Returns:
        The copy, and the blueprint with which its weights can be loaded into a new model.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)).eval()
        >>> folded, _ = fold_norms(net)
        >>> folded[1], folded[0].bias.shape
        (Identity(), torch.Size([2]))
    """
    model = copy_model(model).eval()
    shared = shared_parameters(model)
    folded: list[str] = []
    biased: list[str] = []
    for network in find_networks(model)[0]:
        modules = dict(network.module.named_modules(remove_duplicate=False))
        calls = [node for node in network.graph.nodes if node.op == "call_module"]
        used = [id(modules[str(node.target)]) for node in calls]
        prefix = f"{network.path}." if network.path else ""
        for node in calls:
            norm, source = modules[str(node.target)], node.args[0] if node.args else None
            ours = isinstance(source, fx.Node) and source in calls and len(source.users) == 1
            if not isinstance(norm, BATCH_NORMS) or norm.running_mean is None or not ours:
                continue
            name = str(source.target)  # type: ignore[union-attr]
            layer: Any = modules[name]
            tied = any(id(p) in shared for part in (layer, norm) for p in part.parameters())
            twice = used.count(id(layer)) > 1 or used.count(id(norm)) > 1
            # A normalization counts channels in the second dimension, a linear layer in the last.
            if not is_linear(layer) or tied or twice or out_count(layer) != norm.num_features:
                continue
            if layer.bias is None:
                biased.append(f"{prefix}{name}")
            _take_in(layer, norm)
            folded.append(f"{prefix}{node.target}")
    for name in folded:
        model.set_submodule(name, nn.Identity())
    return model, Blueprint(folded=tuple(folded), biased=tuple(biased))


def _take_in(layer: Any, norm: Any) -> None:
    bias, gamma, beta = (None if t is None else t.double() for t in (layer.bias, norm.weight, norm.bias))
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight, bias = fold_batch_norm(layer.weight.double(), bias, mean, var, norm.eps, gamma, beta)
    add_bias(layer)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
