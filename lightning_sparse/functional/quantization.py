"""Rounding to integers with a scale: weights so that zero stays zero, activations as a runtime would round them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional.dims import others

__all__ = ["fake_quantize", "round_symmetric"]


def round_symmetric(weight: Tensor, dims: tuple[int, ...] = (0,), bits: int = 8) -> Tensor:
    r"""Round a weight to its integer grid: one scale per output and no zero point, so that zero is exactly code 0.

    $$ \hat w = s_o \, \mathrm{round}(w / s_o), \qquad s_o = \max_i |w_{oi}| / (2^{b-1} - 1) $$

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3, with ranges per channel (Krishnamoorthi 2018,
    https://arxiv.org/abs/1806.08342).

    Args:
        weight: weight of a layer.
        dims: the output dimensions.
        bits: b, from 2 to 8.

    Example:
        >>> round_symmetric(torch.tensor([[0.0, 0.4, -3.0], [0.0, 0.0, 0.0]]), bits=3)
        tensor([[ 0.,  0., -3.],
                [ 0.,  0.,  0.]])
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    inputs = others(wide, dims)
    largest = wide.abs().amax(inputs, keepdim=True) if inputs else wide.abs()
    scale = largest / (2 ** (bits - 1) - 1)
    codes = (wide / scale.masked_fill(scale == 0, 1)).round()
    rounded: Tensor = (codes * scale).to(weight.dtype)
    return rounded


def fake_quantize(x: Tensor, bits: int = 8) -> Tensor:
    r"""Inputs rounded to integers with a zero point and a range per sample; gradients pass through unchanged.

    $$ \hat x = s (q - z), \qquad q = \mathrm{round}(x / s) + z, \qquad s = (\max(x, 0) - \min(x, 0)) / (2^b - 1) $$

    with the integer z that stands for zero. The range is per sample and not per batch, so that a sample's result does not
    depend on the other samples of its batch.

    Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877; the straight-through gradient is from Bengio et al. 2013,
    https://arxiv.org/abs/1308.3432.

    Args:
        x: samples along the first dimension.
        bits: b, from 2 to 8.

    Example:
        >>> fake_quantize(torch.tensor([[0.0, 1.0, 2.9, 3.0]]), bits=2)
        tensor([[0., 1., 3., 3.]])
    """
    values = x.detach()
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if not wide.numel():
        return x
    low, high = wide.flatten(1).aminmax(dim=1) if wide.ndim > 1 else wide.aminmax()
    shape = [-1, *[1] * (wide.ndim - 1)] if wide.ndim > 1 else []
    low, high = low.clamp(max=0).reshape(shape), high.clamp(min=0).reshape(shape)
    scale = (high - low) / (2**bits - 1)
    scale = scale.masked_fill(scale == 0, 1)
    offset = (-low / scale).round()
    codes = ((wide / scale).round() + offset).clamp(0, 2**bits - 1)
    rounded: Tensor = _Straight.apply(x, ((codes - offset) * scale).to(x.dtype))
    return rounded


class _Straight(torch.autograd.Function):
    """Return the second tensor, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
