"""`nn.MultiheadAttention` with fewer heads than its width allows, which torch's own class does not support."""

from __future__ import annotations

from copy import copy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FewerHeads"]


@final
class FewerHeads(nn.MultiheadAttention):
    """Attention with some of the heads; parameters keep their names, and the call is the same.

    The head width stays, so the projections have fewer rows than the input has features, and the output projection has the
    same smaller number of columns.

    Example:
        >>> attention = nn.MultiheadAttention(8, 4, batch_first=True)
        >>> smaller = FewerHeads.of(attention)
        >>> x = torch.randn(2, 5, 8)
        >>> torch.allclose(smaller(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
        True
    """

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> FewerHeads:
        """The same attention with the same heads, some of which may be cut out.

        Raises:
            ValueError: if it attends to more than it is given.
        """
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("it adds a key and a value of its own (add_bias_kv, add_zero_attn)")
        made = cls.__new__(cls)
        held = {name: copy(value) if isinstance(value, dict) else value for name, value in vars(attention).items()}
        # The layers of torch that hold it would go past its forward pass if all projections were of one size.
        vars(made).update({**held, "_qkv_same_embed_dim": False})
        return made

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """As in `nn.MultiheadAttention`; `is_causal` is a hint there, and `attn_mask` says what is meant."""
        given: tuple[Tensor, ...] = query, key, value
        single = query.ndim == 2
        if single or not self.batch_first:
            given = tuple(x.unsqueeze(0) if single else x.transpose(0, 1) for x in given)
            key_padding_mask = key_padding_mask[None] if single and key_padding_mask is not None else key_padding_mask
        samples, length, inner = len(given[0]), given[0].shape[1], self.num_heads * self.head_dim
        parts = [F.linear(x, weight, bias) for x, weight, bias in zip(given, *self._projections(inner), strict=True)]
        q, k, v = (part.view(samples, -1, self.num_heads, self.head_dim).transpose(1, 2) for part in parts)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(heads.transpose(1, 2).reshape(samples, length, inner))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if single else weights
        return out.squeeze(0) if single else out if self.batch_first else out.transpose(0, 1), weights

    def _projections(self, inner: int) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        weights: Any = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weights is None else weights.split(inner)
        biases: Any = self.in_proj_bias
        return tuple(weights), (None, None, None) if biases is None else tuple(biases.split(inner))

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """The addend of the scores: -inf where a boolean mask is true, or the values of a numeric mask."""
        parts = []
        if attn_mask is not None:
            per_head = attn_mask.ndim == 3
            parts.append(attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:]) if per_head else attn_mask)
        if padding is not None:
            parts.append(padding[:, None, None])
        zero = like.new_zeros(())
        added = [zero.masked_fill(part, -torch.inf) if part.dtype == torch.bool else part.to(like) for part in parts]
        return sum(added[1:], added[0]) if added else None
