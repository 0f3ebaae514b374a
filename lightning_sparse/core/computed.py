"""Layers whose weight is computed anew in every forward pass, so that zeros in what is stored do not reach what is used."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_sparse.core.layers import kind_of, weight_names

__all__ = ["uses_its_zeros", "why_computed"]

_HOOK_SUFFIX = re.compile(r"(.+)_(orig|g|v)")  # of torch.nn.utils.prune, spectral_norm and weight_norm
_seen: dict[type[nn.Module], bool] = {}


def why_computed(layer: nn.Module) -> str | None:
    """What computes a weight of a layer, or None if its weights are used as they are stored.

    Example:
        >>> why_computed(nn.Linear(2, 2)), why_computed(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        (None, 'a parametrization')
    """
    patterns = weight_names(layer)
    if not patterns:
        return None
    if parametrize.is_parametrized(layer):
        return "a parametrization"
    for name, _ in layer.named_parameters(recurse=False):
        hooked = _HOOK_SUFFIX.fullmatch(name)
        if hooked and any(re.fullmatch(pattern, hooked[1]) for pattern in patterns):
            return "a hook of torch.nn.utils"
    return None if uses_its_zeros(layer) else f"the forward pass of {type(layer).__name__}"


def uses_its_zeros(layer: nn.Module) -> bool:
    """Whether a zero in the weight is a zero in what the layer multiplies its inputs by, found by trying.

    Standardized convolutions subtract the mean, low-rank adapters add a product: there a removed connection works on. Only
    linear layers and convolutions with a forward pass of their own are tried, once per class, on a copy: weights behind
    one input become zero, and then that input must not matter. Where a trial fails the layer gets the benefit of the doubt.
    """
    cls, own = type(layer), dict(layer.named_parameters(recurse=False))
    if (
        _is_of_torch(cls) or "weight" not in own or own["weight"].is_meta
    ):  # one that only passes on its base's holds no zeros
        return True
    if cls not in _seen:
        try:
            found = _try(layer)
        except Exception:
            return True
        if found is None:
            return True
        _seen[cls] = found
    return _seen[cls]


def _is_of_torch(cls: type[nn.Module]) -> bool:
    forwards = [getattr(cls, name) for name in ("forward", "_conv_forward") if hasattr(cls, name)]
    return all(str(forward.__module__).startswith("torch.") for forward in forwards)


@torch.no_grad()
def _try(layer: nn.Module) -> bool | None:
    kind = kind_of(layer)
    weight = layer.weight
    if kind is None or kind.stack_dims or not isinstance(weight, nn.Parameter) or weight.ndim < 2:
        return None
    groups = int(getattr(layer, "groups", 1))
    if weight.shape[kind.input_dim] < 2:
        return None
    probe = copy.deepcopy(layer).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    # Everything else is random too: some of what is added starts at zero.
    for parameter in probe.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = weight.shape[kind.input_dim] * (groups if kind.input_dim == 1 else 1)
    probe.get_parameter("weight").select(kind.input_dim, 0).zero_()
    sizes = [_extent(probe, axis) for axis in range(weight.ndim - 2)]
    x = torch.randn(2, inputs, *sizes, generator=generator)
    other = x.clone()
    other[:, :: weight.shape[kind.input_dim]] += 1  # the first input of every group
    forward = type(layer).forward  # without hooks
    return bool(torch.allclose(forward(probe, x), forward(probe, other), rtol=1e-4, atol=1e-4))


def _extent(layer: nn.Module, axis: int) -> int:
    """Enough positions for one output."""
    kernel, dilation = layer.kernel_size[axis], layer.dilation[axis]  # type: ignore[index]
    return int(dilation * (kernel - 1) + 2)
