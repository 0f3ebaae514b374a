r"""The negative part of a layer: its norm, that norm's gradient and proximal map.

The map z -> ReLU(W z + b) equals z -> W z + b for every z >= 0 if and only if W >= 0 and b >= 0 entrywise. So a layer whose
pair (W, b) has no negative part merges into its successor. Source of the notion: Hebiri and Lederer 2020, "Layer Sparsity in
Neural Networks", https://arxiv.org/abs/2006.15604. Only its abstract was available; biases as one more column of W,
convolutions, normalization and bounds on inputs are derived here. Products of layers are in `merging`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "LAYER_NORMS",
    "LayerNorm",
    "layer_penalty",
    "layer_penalty_gradient",
    "layer_prox_",
    "negative_ratio",
    "soft_threshold_",
]


@dataclass(frozen=True)
class LayerNorm:
    """A norm of the negative part of a layer.

    Args:
        value: value for the flat negative part.
        gradient: gradient of the value, computed from the negative part in place, given it and its Euclidean length.
        shrink: the remaining negative part after a proximal step, given it, its length and the step size.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    shrink: Callable[[Tensor, Tensor, float | Tensor], Tensor]


LAYER_NORMS: dict[str, LayerNorm] = {
    "fro": LayerNorm(
        torch.linalg.vector_norm,
        lambda part, length: part.div_(torch.where(length > 0, length, 1.0)),
        lambda part, length, step: part * (1 - step / torch.where(length > 0, length, 1.0)).clamp(min=0),
    ),
    "l1": LayerNorm(
        lambda part: -part.sum(),
        lambda part, length: part.sign_(),
        lambda part, length, step: (part + step).clamp(max=0),
    ),
    "fro_sq": LayerNorm(
        lambda part: part.square().sum(),
        lambda part, length: part.mul_(2),
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
    # At zero the gradient of relu is 0; that of clamp is 1 in older versions of torch.
    return LAYER_NORMS[norm].value(torch.cat([-(-tensor.flatten()).relu() for tensor in tensors]))


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
        tensor.copy_(torch.where(tensor < 0, left + 0.0, tensor))  # + 0.0 removes the sign of zero


@torch.no_grad()
def soft_threshold_(tensor: Tensor, step: float | Tensor) -> None:
    """The proximal map of the l1 norm, in place: every entry moves toward zero by `step`, and stops at zero."""
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
