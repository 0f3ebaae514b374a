"""For a module that cannot be copied, because its weights are sharded: try something on it, and restore everything."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from lightning_sparse.core import local

__all__ = ["in_place"]


@contextmanager
def in_place(module: nn.Module) -> Iterator[None]:
    """Undo whatever happens to a module meanwhile: weights, buffers, gradients, metrics, modes, plain attributes.

    Costs a copy of this rank's shard of the weights, and of the gradients if there are any.

    Args:
        module: the module, whose weights may be sharded.
    """
    reshard(module)
    parts, parameters = list(module.modules()), list(module.parameters())
    attributes = [dict(vars(part)) for part in parts]
    metrics = {id(part): copy.deepcopy(vars(part)) for part in parts if isinstance(part, Metric)}
    gradients = [parameter.grad for parameter in parameters]
    tensors = [local(tensor) for tensor in (*parameters, *module.buffers())]
    values = [tensor.detach().clone() for tensor in tensors]
    trains = [part.training for part in parts]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        reshard(module)
        for part, attribute, training in zip(parts, attributes, trains, strict=True):
            vars(part).clear()
            vars(part).update(metrics.get(id(part), attribute))
            part.training = training
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        reshard(module)


def reshard(module: nn.Module) -> None:
    """Make every FSDP2 layer gather its weights anew: after a forward pass without gradients some still hold them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
