r"""Layers that act linearly: their negative part, its proximal map, and the products of layers.

The map z -> ReLU(W z + b) equals z -> W z + b for every z >= 0 if and only if W >= 0 and b >= 0 entrywise. So a layer whose
pair (W, b) has no negative part merges into its successor. Source of the notion: Hebiri and Lederer 2020, "Layer Sparsity in
Neural Networks", https://arxiv.org/abs/2006.15604. Only its abstract was at hand; biases as one more column of W,
convolutions, normalisation and bounds on inputs are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "LAYER_NORMS",
    "Convolution",
    "LayerNorm",
    "add_convolutions",
    "compose",
    "fold_batch_norm",
    "layer_penalty",
    "layer_penalty_gradient",
    "layer_prox_",
    "lowest_output",
    "merge_convolutions",
    "merge_linear",
    "negative_ratio",
    "regroup",
    "shift_input",
    "soft_threshold_",
]

Pair = tuple[Tensor, Tensor | None]
"""Weight and bias of a layer."""


# ---- the negative part of a layer ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerNorm:
    """A norm of the negative part of a layer.

    Args:
        value: of the flat negative part.
        gradient: the factor that the negative part is multiplied by, given it and its Euclidean length; a tensor.
        shrink: what is left of the negative part after a proximal step of a size, given it, its length and the size.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    shrink: Callable[[Tensor, Tensor, float | Tensor], Tensor]


LAYER_NORMS: dict[str, LayerNorm] = {
    "fro": LayerNorm(
        torch.linalg.vector_norm,
        lambda part, length: part / torch.where(length > 0, length, 1.0),
        lambda part, length, step: part * (1 - step / torch.where(length > 0, length, 1.0)).clamp(min=0),
    ),
    "l1": LayerNorm(
        lambda part: -part.sum(),
        lambda part, length: part.sign(),
        lambda part, length, step: (part + step).clamp(max=0),
    ),
    "fro_sq": LayerNorm(
        lambda part: part.square().sum(),
        lambda part, length: 2 * part,
        lambda part, length, step: part / (1 + 2 * step),
    ),
}
"""By name. `fro` removes a layer as a unit, `l1` entry by entry, `fro_sq` never at a finite strength."""


def layer_penalty(tensors: Sequence[Tensor], norm: str = "fro") -> Tensor:
    r"""The norm of the negative part of one layer, differentiable, with gradient 0 where there is none.

    $$ \| \min((W, b), 0) \|_F $$

    For `fro` this is the Euclidean distance from (W, b) to the layers without a negative part.

    Args:
        tensors: weight and bias, as one group.
        norm: a key of `LAYER_NORMS`.

    Example:
        >>> float(layer_penalty([torch.tensor([[-3.0, 5.0]]), torch.tensor([-4.0])]))
        5.0
    """
    return LAYER_NORMS[norm].value(torch.cat([tensor.flatten().clamp(max=0) for tensor in tensors]))


def layer_penalty_gradient(tensors: Sequence[Tensor], norm: str = "fro") -> list[Tensor]:
    r"""The gradient of `layer_penalty` in closed form: $\min(W, 0) / \|\min((W, b), 0)\|_F$ for `fro`.

    Args:
        tensors: weight and bias, as one group.
        norm: a key of `LAYER_NORMS`.
    """
    parts = [tensor.detach().clamp(max=0) for tensor in tensors]
    length = _length(parts)
    return [LAYER_NORMS[norm].gradient(part, length) for part in parts]


@torch.no_grad()
def layer_prox_(tensors: Sequence[Tensor], step: float | Tensor, norm: str = "fro") -> None:
    r"""The proximal map of `layer_penalty`, in place.

    $$ W \leftarrow \max(W, 0) + \max(0, 1 - t / \|N\|_F) \min(W, 0) $$

    After soft-thresholding by `soft_threshold_` this is the proximal map of l1 and layer penalty together.

    Args:
        tensors: weight and bias, as one group.
        step: t, learning rate times strength.
        norm: a key of `LAYER_NORMS`.

    Example:
        >>> weight = torch.tensor([2.0, -3.0, -4.0])
        >>> layer_prox_([weight], 5.0)
        >>> weight.tolist()
        [2.0, 0.0, 0.0]
    """
    parts = [tensor.clamp(max=0) for tensor in tensors]
    length = _length(parts)
    for tensor, part in zip(tensors, parts, strict=True):
        left = LAYER_NORMS[norm].shrink(part, length, step)
        tensor.copy_(torch.where(tensor < 0, left + 0.0, tensor))  # + 0.0: a zero without a sign


@torch.no_grad()
def soft_threshold_(tensor: Tensor, step: float | Tensor) -> None:
    """The proximal map of the l1 norm, in place: every entry moves towards zero by `step`, and stops there."""
    tensor.copy_(tensor.sign() * (tensor.abs() - step).clamp(min=0))


def negative_ratio(tensors: Sequence[Tensor]) -> Tensor:
    r"""How negative a layer is, whatever its scale: $\rho = \|\min((W, b), 0)\|_F / \|(W, b)\|_F$; 0 for a zero layer.

    Args:
        tensors: weight and bias, as one group.
    """
    parts = [tensor.detach() for tensor in tensors]
    whole = _length(parts)
    ratio: Tensor = _length([part.clamp(max=0) for part in parts]) / torch.where(whole > 0, whole, 1.0)
    return ratio


def _length(tensors: Sequence[Tensor]) -> Tensor:
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    length: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in wide]))
    return length


def lowest_output(weight: Tensor, bias: Tensor | None, low: float, high: float) -> Tensor:
    r"""The least value of every output of a layer, for inputs between two bounds.

    $$ \max(W, 0)\, l + \min(W, 0)\, u + b $$

    An activation with phi(t) = t for t >= 0 does nothing if this is >= 0 in all rows. For l = 0 and u = infinity that is:
    no negative weight and no negative bias.

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


# ---- layers that stand for others ---------------------------------------------------------------------------------------


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A layer with the batch normalisation behind it, in evaluation mode; differentiable.

    $$ \hat W = (\gamma / \sigma) W, \qquad \hat b = \beta + (\gamma / \sigma) (b - \mu) $$

    Args:
        weight: outputs first.
        bias: of the layer, or None.
        mean: mu, the running mean.
        variance: sigma squared without eps, the running variance.
        eps: of the normalisation.
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
    """A layer as it sees inputs counted from their lower bound: the bias grows by `low` times the row sums."""
    if low == 0:
        return weight, bias
    shift = low * weight.flatten(1).sum(1)
    return weight, shift if bias is None else bias + shift


def merge_linear(second: Pair, first: Pair) -> Pair:
    r"""Two linear layers with nothing between them as one: $W_2 W_1$ and $W_2 b_1 + b_2$, multiplied in float64.

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
    """A run of linear layers, from input to output, as one; in float64, rounded once.

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
    """What a convolution layer computes.

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
    r"""Two convolutions with nothing between them as one, in float64.

    The kernel is the full convolution of the first kernel with the second one, dilated by the first stride; its size is
    a + (c - 1) s. Strides multiply, paddings add up to p1 + s1 p2, and groups become their greatest common divisor.

    Exact if the second layer does not pad, or the first is 1x1 without bias and padding. A padding between the two puts
    zeros where the first layer would have had values: then the border ring is wrong (the callers refuse that).

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
    """Two convolutions of the same input, added, as one; None if the small kernel does not fit into the large one.

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
        groups: now.
        fewer: then; divides `groups`.
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
