"""Which layers hold weights, and along which dimensions their outputs and inputs lie: one row per kind of layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_sparse.core.linear import PLAIN_CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

__all__ = ["LAYER_KINDS", "LayerKind", "kind_of"]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer, and how its weight is laid out.

    Args:
        types: of the layer, one or several; subclasses are of the same kind.
        output_dim: the dimension that counts outputs.
        input_dim: the dimension that counts inputs.
    """

    types: type[nn.Module] | tuple[type[nn.Module], ...]
    output_dim: int = 0
    input_dim: int = 1


LAYER_KINDS = [
    LayerKind(nn.Linear),
    LayerKind(nn.Bilinear),
    LayerKind(TRANSPOSED_CONVOLUTIONS, output_dim=1, input_dim=0),
    LayerKind(PLAIN_CONVOLUTIONS),
    LayerKind(nn.MultiheadAttention),
]
"""The first row that fits counts."""


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The row of a layer, or None if it is no layer that names choose among.

    Example:
        >>> kind_of(nn.ConvTranspose2d(3, 5, 2)).output_dim, kind_of(nn.LayerNorm(4))
        (1, None)
    """
    return next((kind for kind in LAYER_KINDS if isinstance(layer, kind.types)), None)
