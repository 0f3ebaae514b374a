"""Products of layers: two linear layers become one, and a normalization becomes part of the preceding layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Convolution",
    "add_convolutions",
    "compose",
    "fold_batch_norm",
    "lowest_output",
    "merge_convolutions",
    "merge_linear",
    "regroup",
    "shift_input",
]

Pair = tuple[Tensor, Tensor | None]
"""Weight and bias of a layer."""


def lowest_output(weight: Tensor, bias: Tensor | None, low: float, high: float) -> Tensor:
    r"""The smallest value of every output of a layer, for inputs between two bounds.

    $$ \max(W, 0)\, l + \min(W, 0)\, u + b $$

    An activation with phi(t) = t for t >= 0 has no effect if this is >= 0 in all rows. For l = 0 and u = infinity that
    means: no negative weight and no negative bias.

    Args:
        weight: outputs first.
        bias: of the layer, or None.
        low: l, may be -inf.
        high: u, may be inf.

    Example:
        >>> lowest_output(torch.tensor([[1.0, -1.0]]), torch.tensor([2.0]), 0.0, 1.0).tolist()
        [1.0]
    """
    wide = weight.detach().double()
    zero = torch.zeros_like(wide)
    least = torch.where(wide < 0, wide * high, torch.where(wide > 0, wide * low, zero)).flatten(1).sum(1)
    return least if bias is None else least + bias.detach().double()


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A layer combined with the batch normalization after it, in evaluation mode; differentiable.

    $$ \hat W = (\gamma / \sigma) W, \qquad \hat b = \beta + (\gamma / \sigma) (b - \mu) $$

    Args:
        weight: outputs first.
        bias: of the layer, or None.
        mean: mu, the running mean.
        variance: sigma squared without eps, the running variance.
        eps: of the normalization.
        gamma: its weight; None is 1.
        beta: its bias; None is 0.
    """
    scale = (variance + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = (0 if bias is None else bias) - mean
    folded = shift * scale
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), folded if beta is None else folded + beta


def shift_input(weight: Tensor, bias: Tensor | None, low: float) -> Pair:
    """A layer for inputs counted from their lower bound: the bias grows by `low` times the row sums."""
    if low == 0:
        return weight, bias
    shift = low * weight.flatten(1).sum(1)
    return weight, shift if bias is None else bias + shift


def merge_linear(second: Pair, first: Pair) -> Pair:
    r"""Two consecutive linear layers as one: $W_2 W_1$ and $W_2 b_1 + b_2$, multiplied in float64.

    Args:
        second: weight and bias of the layer nearer the output.
        first: weight and bias of the layer nearer the input.

    Example:
        >>> merge_linear((torch.tensor([[2.0]]), None), (torch.tensor([[3.0]]), torch.tensor([1.0])))
        (tensor([[6.]]), tensor([2.]))
    """
    (upper, upper_bias), (lower, lower_bias) = second, first
    weight = upper.double() @ lower.double()
    bias = None if upper_bias is None else upper_bias.double()
    if lower_bias is not None:
        bias = upper.double() @ lower_bias.double() + (0 if bias is None else bias)
    return weight.to(upper.dtype), None if bias is None else bias.to(upper.dtype)


def compose(layers: Sequence[Pair]) -> Pair:
    """A chain of linear layers, from input to output, as one; in float64, rounded once.

    Args:
        layers: weight and bias of each.
    """
    dtype = layers[0][0].dtype
    wide = [(weight.double(), None if bias is None else bias.double()) for weight, bias in layers]
    whole = wide[0]
    for layer in wide[1:]:
        whole = merge_linear(layer, whole)
    return whole[0].to(dtype), None if whole[1] is None else whole[1].to(dtype)


@dataclass(frozen=True)
class Convolution:
    """The operation of a convolution layer.

    Args:
        weight: of shape (outputs, inputs / groups, *kernel).
        bias: of shape (outputs,), or None.
        stride: per dimension.
        padding: zeros in front and behind, per dimension.
        dilation: per dimension.
        groups: of channels.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of the kernel."""
        return tuple(self.weight.shape[2:])


def merge_convolutions(second: Convolution, first: Convolution) -> Convolution:
    r"""Two consecutive convolutions as one, in float64.

    The kernel is the full convolution of the first kernel with the second one, dilated by the first stride; its size is
    a + (c - 1) s. Strides multiply, paddings add up to p1 + s1 p2, and groups become their greatest common divisor.

    Exact if the second layer does not pad, or the first is 1x1 without bias and padding. Padding between the two puts zeros
    where the first layer would have values: then the border ring is wrong (callers refuse that).

    Args:
        second: the layer nearer the output.
        first: the layer nearer the input.
    """
    groups = math.gcd(first.groups, second.groups)
    lower = _dilate(regroup(first.weight.double(), first.groups, groups), first.dilation)
    upper = regroup(second.weight.double(), second.groups, groups)
    spread = _dilate(upper, tuple(s * d for s, d in zip(first.stride, second.dilation, strict=True)))
    blocks = [_convolve(k1, k2) for k1, k2 in zip(lower.chunk(groups), spread.chunk(groups), strict=True)]
    bias = None if second.bias is None else second.bias.double()
    if first.bias is not None:
        taps = upper.flatten(2).sum(2)
        pushed = torch.cat([k2 @ b1 for k2, b1 in zip(taps.chunk(groups), first.bias.double().chunk(groups), strict=True)])
        bias = pushed if bias is None else bias + pushed
    dtype = second.weight.dtype
    return Convolution(
        torch.cat(blocks).to(dtype),
        None if bias is None else bias.to(dtype),
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        tuple(p + s * q for p, s, q in zip(first.padding, first.stride, second.padding, strict=True)),
        (1,) * len(first.stride),
        groups,
    )


def add_convolutions(large: Convolution, small: Convolution) -> Convolution | None:
    """The sum of two convolutions of the same input as one; None if the small kernel does not fit into the large one.

    The identity is a 1x1 kernel without padding. Kernels are aligned where they read the same pixel.

    Args:
        large: whose stride and padding the sum has.
        small: with the same stride.
    """
    if large.stride != small.stride:
        return None
    groups = math.gcd(large.groups, small.groups)
    weight = _dilate(regroup(large.weight.double(), large.groups, groups), large.dilation).clone()
    added = _dilate(regroup(small.weight.double(), small.groups, groups), small.dilation)
    starts = [p - q for p, q in zip(large.padding, small.padding, strict=True)]
    sizes, inner = weight.shape[2:], added.shape[2:]
    same = all(k - 2 * p == c - 2 * q for k, p, c, q in zip(sizes, large.padding, inner, small.padding, strict=True))
    if weight.shape[:2] != added.shape[:2] or not same or min(starts, default=0) < 0:
        return None
    window: Any = (..., *(slice(start, start + size) for start, size in zip(starts, inner, strict=True)))
    weight[window] += added
    biases = [conv.bias.double() for conv in (large, small) if conv.bias is not None]
    dtype = large.weight.dtype
    bias = sum(biases[1:], biases[0]).to(dtype) if biases else None
    return Convolution(weight.to(dtype), bias, large.stride, large.padding, (1,) * len(starts), groups)


def regroup(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """The kernel of a grouped convolution, written with fewer groups that hold several of the old ones each.

    Args:
        weight: of shape (outputs, inputs / groups, *kernel).
        groups: current number of groups.
        fewer: new number of groups; divides `groups`.
    """
    ratio = groups // fewer
    if ratio == 1:
        return weight
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    dense = weight.new_zeros(weight.shape[0], inputs * ratio, *weight.shape[2:])
    for group in range(groups):
        rows, place = slice(group * outputs, (group + 1) * outputs), group % ratio
        dense[rows, place * inputs : (place + 1) * inputs] = weight[rows]
    return dense


def _convolve(first: Tensor, second: Tensor) -> Tensor:
    """Kernels (m, i, *a) and (o, m, *c) -> (o, i, *(a + c - 1)), summed over m."""
    dims = tuple(range(2, first.ndim))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(dims) - 1]
    full = convolve(first.transpose(0, 1), second.flip(dims), padding=tuple(size - 1 for size in second.shape[2:]))
    return full.transpose(0, 1)


def _dilate(kernel: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Zeros between the taps."""
    if all(step == 1 for step in steps):
        return kernel
    sizes = [(size - 1) * step + 1 for size, step in zip(kernel.shape[2:], steps, strict=True)]
    wide = kernel.new_zeros(*kernel.shape[:2], *sizes)
    grid: Any = (..., *(slice(None, None, step) for step in steps))
    wide[grid] = kernel
    return wide
