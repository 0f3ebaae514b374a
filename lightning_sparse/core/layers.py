"""Which layers hold weights, and along which dimensions: one row per kind of layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_sparse.core.linear import PLAIN_CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

__all__ = ["LAYER_KINDS", "LayerKind", "kind_of", "register_layer", "weight_names"]

LayerTypes = type[nn.Module] | tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer and the layout of its weights.

    Args:
        fits: the types of the layer, subclasses included; or a function that recognizes the layer by its attributes.
        weights: a regular expression for the names of the layer's own parameters that are weights.
        output_dim: the output dimension.
        input_dim: the input dimension.
        stack_dims: dimensions that enumerate independent matrices, such as experts.
        by_name: whether name patterns select such weights, and not only `type:` patterns.
        reads_input: whether a call of the layer multiplies the vectors of its input, or patches of it, by the weight.
        parts: number of equal parts of the outputs that may each read a different input, such as query, key and value.
    """

    fits: LayerTypes | Callable[[nn.Module], bool]
    weights: str = "weight"
    output_dim: int = 0
    input_dim: int = 1
    stack_dims: tuple[int, ...] = ()
    by_name: bool = True
    reads_input: bool = False
    parts: int = 1

    def holds(self, layer: nn.Module) -> bool:
        """Whether a layer is of this kind."""
        if isinstance(self.fits, (type, tuple)):
            return isinstance(layer, self.fits)
        return self.fits(layer)

    def names(self, parameter: str) -> bool:
        """Whether a parameter of such a layer is one of its weights, by its name in the layer."""
        return re.fullmatch(self.weights, parameter) is not None


def register_layer(
    layer_type: type[nn.Module],
    weights: str | Sequence[str] = "weight",
    *,
    output_dim: int = 0,
    input_dim: int = 1,
    stack_dims: int | Sequence[int] = (),
) -> None:
    """Register the weights of your own layer type with all methods; afterwards it is selected like `nn.Linear`.

    Call it again for weights of the same layer with a different layout. The last registration takes precedence.

    Args:
        layer_type: the class of the layer; subclasses are included.
        weights: the names of the layer's own parameters that are weights.
        output_dim: the output dimension.
        input_dim: the input dimension.
        stack_dims: dimensions that enumerate independent matrices, such as experts; each matrix then gets its own budget
            where layers do.

    Raises:
        ValueError: if it is not a layer type, or dimensions overlap.

    Example:
        >>> import torch
        >>> class Transposed(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.matrix = nn.Parameter(torch.ones(3, 2))  # 3 inputs, 2 outputs
        >>> register_layer(Transposed, "matrix", output_dim=1, input_dim=0)
        >>> kind_of(Transposed(), "matrix").output_dim
        1
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise ValueError(f"register_layer: {layer_type!r} is not a layer type; give a class such as nn.Linear.")
    names = [weights] if isinstance(weights, str) else list(weights)
    if not names:
        raise ValueError(f"register_layer: name at least one weight of {layer_type.__name__}, such as 'weight'.")
    stacks = (stack_dims,) if isinstance(stack_dims, int) else tuple(stack_dims)
    dims = [output_dim, input_dim, *stacks]
    if len({*dims}) < len(dims) or min(dims) < 0:
        raise ValueError(
            f"register_layer: output_dim={output_dim}, input_dim={input_dim} and stack_dims={stacks} of "
            f"{layer_type.__name__} must be different dimensions, counted from 0."
        )
    kind = LayerKind(layer_type, "|".join(map(re.escape, names)), output_dim, input_dim, stacks)
    LAYER_KINDS.insert(0, kind)


def kind_of(layer: nn.Module, parameter: str = "weight") -> LayerKind | None:
    """The layout of a layer's parameter, or None if it is not a weight of a known kind of layer.

    Args:
        layer: the layer that holds the parameter.
        parameter: its name in the layer.

    Example:
        >>> kind_of(nn.ConvTranspose2d(3, 5, 2)).output_dim, kind_of(nn.LayerNorm(4))
        (1, None)
        >>> kind_of(nn.LSTM(3, 5), "weight_hh_l0").output_dim
        0
    """
    return next((kind for kind in LAYER_KINDS if kind.names(parameter) and kind.holds(layer)), None)


def weight_names(layer: nn.Module) -> list[str]:
    """Regular expressions for the names of a layer's own parameters that are weights; none for an unknown kind."""
    return [kind.weights for kind in LAYER_KINDS if kind.by_name and kind.holds(layer)]


# Layers of other libraries are recognized by their size attributes and shapes, so nothing has to be imported.


def _has_shape(layer: nn.Module, parameter: str, *sizes: str) -> bool:
    weight = _parameter(layer, parameter)
    return weight is not None and weight.shape == tuple(getattr(layer, size, None) for size in sizes)


def _parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    value = getattr(layer, name, None)
    return value if isinstance(value, nn.Parameter) and not isinstance(value, UninitializedParameter) else None


def _is_linear(layer: nn.Module) -> bool:
    """`Linear` of torch-geometric, and any other layer with the layout of `nn.Linear`."""
    return _has_shape(layer, "weight", "out_features", "in_features") or _has_shape(
        layer, "weight", "out_channels", "in_channels"
    )


def _is_transposed_linear(layer: nn.Module) -> bool:
    """`Conv1D` of transformers, which stores its inputs first."""
    return _has_shape(layer, "weight", "nx", "nf")


def _is_linear_by_type(layer: nn.Module) -> bool:
    """`HeteroLinear` of torch-geometric: one matrix per node type, inputs first."""
    return _has_shape(layer, "weight", "num_types", "in_channels", "out_channels")


def _expert_sizes(layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """The shapes of an expert's first and second matrix in a mixture, and the number of matrices fused in the first."""
    down, fused = _parameter(layer, "down_proj"), _parameter(layer, "gate_up_proj")
    first = _parameter(layer, "up_proj") if fused is None else fused
    if first is None or down is None or first.ndim != 3 or down.ndim != 3 or len(first) != len(down):
        return None
    return tuple(first.shape[1:]), tuple(down.shape[1:]), 1 if fused is None else 2


def _are_experts(layer: nn.Module) -> bool:
    """Experts of transformers' mixtures: (experts, outputs, inputs)."""
    sizes = _expert_sizes(layer)
    if sizes is None or getattr(layer, "is_transposed", False):
        return False
    (inner, outer), down, fused = sizes
    return down == (outer, inner // fused) and (fused == 2 or hasattr(layer, "is_transposed"))


def _are_transposed_experts(layer: nn.Module) -> bool:
    """Experts of mixtures that store inputs first, such as gpt-oss: (experts, inputs, outputs)."""
    sizes = _expert_sizes(layer)
    if sizes is None or not getattr(layer, "is_transposed", True):
        return False
    (outer, inner), down, fused = sizes
    return down == (inner // fused, outer) and (fused == 2 or hasattr(layer, "is_transposed"))


_EXPERTS = "gate_up_proj|gate_proj|up_proj|down_proj"

LAYER_KINDS = [
    LayerKind(nn.Linear, reads_input=True),
    LayerKind(nn.Bilinear),
    LayerKind(TRANSPOSED_CONVOLUTIONS, output_dim=1, input_dim=0, reads_input=True),
    LayerKind(PLAIN_CONVOLUTIONS, reads_input=True),
    LayerKind(nn.MultiheadAttention, "in_proj_weight", parts=3),
    LayerKind(nn.MultiheadAttention, "[qkv]_proj_weight"),
    LayerKind(nn.RNNBase, r"weight_(ih|hh|hr)_l\d+(_reverse)?"),  # gates are outputs
    LayerKind(nn.RNNCellBase, "weight_ih|weight_hh"),
    LayerKind(_are_experts, _EXPERTS, output_dim=1, input_dim=2, stack_dims=(0,)),
    LayerKind(_are_transposed_experts, _EXPERTS, output_dim=2, input_dim=1, stack_dims=(0,)),
    LayerKind(_is_linear_by_type, output_dim=2, input_dim=1, stack_dims=(0,)),
    LayerKind(_is_transposed_linear, output_dim=1, input_dim=0, reads_input=True),
    LayerKind(_is_linear, reads_input=True),
    LayerKind((nn.Embedding, nn.EmbeddingBag), by_name=False),
]
"""The first matching row counts."""
