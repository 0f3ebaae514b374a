"""Attention written by hand, in layouts that libraries have."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Separate(nn.Module):
    """Three projections with names of nobody's, of which keys and values may be fewer."""

    def __init__(self, shared: int = 1) -> None:
        super().__init__()
        self.ask, self.out = nn.Linear(12, 12), nn.Linear(12, 12)
        self.match, self.carry = nn.Linear(12, 12 // shared), nn.Linear(12, 12 // shared)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.out(attend(self.ask(x), self.match(x), self.carry(x), 3))
        return out


class Fused(nn.Module):
    """One projection: all queries, then all keys, then all values; or these three head by head."""

    def __init__(self, interleaved: bool = False) -> None:
        super().__init__()
        self.num_heads, self.interleaved = 4, interleaved
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.interleaved:
            parts = self.qkv(x).view(*x.shape[:2], self.num_heads, 9).split(3, -1)
            q, k, v = (part.flatten(2) for part in parts)
        else:
            q, k, v = self.qkv(x).chunk(3, -1)
        out: Tensor = x + self.out(attend(q, k, v, 3))
        return out
