"""Linear layers, convolutions and the norms behind them: which are which, and how many outputs and inputs they have."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = [
    "BATCH_NORMS",
    "CHANNEL_NORMS",
    "CONVOLUTIONS",
    "PLAIN_CONVOLUTIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "in_count",
    "is_depthwise",
    "is_layer",
    "is_linear",
    "out_count",
    "padding_of",
]

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Convolutions that are not transposed."""

TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Transposed convolutions."""

CONVOLUTIONS = (*PLAIN_CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
"""All convolutions."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch normalizations."""

CHANNEL_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Norms that treat each channel by itself."""


def is_linear(layer: object) -> bool:
    """Whether it is a linear map with a bias: a linear layer or a convolution that is not transposed."""
    return isinstance(layer, (nn.Linear, *PLAIN_CONVOLUTIONS))


def is_layer(layer: object) -> bool:
    """Whether it is a linear layer or a convolution, transposed ones among them."""
    return isinstance(layer, (nn.Linear, *CONVOLUTIONS))


def is_depthwise(layer: object) -> bool:
    """Whether each of its outputs reads the input of the same number, and no other."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def out_count(layer: Any) -> int:
    """Outputs of a linear layer, convolution or normalization."""
    for name in ("out_features", "out_channels", "num_features", "num_parameters"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    raise TypeError(type(layer).__name__)


def in_count(layer: Any) -> int:
    """Inputs of a linear layer or convolution."""
    return int(layer.in_features if hasattr(layer, "in_features") else layer.in_channels)


def padding_of(layer: nn.Module) -> tuple[int, ...] | None:
    """Zeros in front, per dimension; None where there are more of them behind."""
    assert isinstance(layer, PLAIN_CONVOLUTIONS)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)
    return tuple(int(p) for p in layer.padding)
