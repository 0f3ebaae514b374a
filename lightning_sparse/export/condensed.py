"""A linear layer in which every output reads the same number of inputs, stored as indices and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CondensedLinear"]


class CondensedLinear(nn.Module):
    r"""A linear layer whose weight is stored as indices and values in rows of equal length, for inference on a CPU.

    $$ y_o = b_o + \sum_{j=1}^{k} v_{oj} \, x_{i_{oj}} $$

    There are no row pointers, and the work is divided evenly. The products use `embedding_bag`: each output is the weighted
    sum of k rows of the transposed batch. Outputs without any weight are rows of zeros.

    Source: the condensed representation of Lasby et al. 2024, https://arxiv.org/abs/2305.02299, section 4.4.

    Args:
        layer: trained with `structure="fan_in"`, or with the same number of weights in every output that has any.

    Raises:
        ValueError: if outputs have different numbers of weights.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> _ = layer.weight.data.mul_(torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]))
        >>> condensed = CondensedLinear(layer)
        >>> condensed.indices
        tensor([[0, 3],
                [1, 2]], dtype=torch.int32)
        >>> torch.allclose(condensed(torch.ones(3, 4)), layer(torch.ones(3, 4)))
        True
    """

    indices: Tensor
    values: Tensor
    bias: Tensor | None
    kernel = "condensed"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        counts = (weight != 0).sum(1)
        self.fan_in = int(counts.max())
        odd = ((counts != self.fan_in) & (counts != 0)).nonzero().flatten()
        if not self.fan_in or len(odd):
            said = f"one has {self.fan_in}, another {int(counts[odd[0]])}" if len(odd) else "there is none"
            raise ValueError(
                f"kernel='condensed' needs the same number of weights in every output, but {said}; train with 'fan_in'."
            )
        # In ascending order; a row without weights takes the first inputs, with values of zero.
        order = (weight != 0).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : self.fan_in]
        indices = order.sort(dim=1).values
        self.register_buffer("indices", indices.int())
        self.register_buffer("values", weight.gather(1, indices))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.register_forward_pre_hook(_call_me)

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, self.in_features).t().contiguous()
        product = F.embedding_bag(self.indices, columns, per_sample_weights=self.values, mode="sum").t()
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fan_in={self.fan_in}"


def _call_me(layer: nn.Module, args: object) -> None:
    """Do nothing; `nn.TransformerEncoderLayer` calls its layers only if they have hooks, and else reads their weights."""
