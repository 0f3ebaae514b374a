"""Modules whose networks take more than one tensor, and data for them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

__all__ = ["MODULES", "Dictionary", "Diffusion", "Encoding", "HuggingFace", "Tokens", "batch_of", "data_for"]


class Trained(L.LightningModule):
    """What all have in common; no forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Denoiser(nn.Module):
    """Images and a timestep each, and a number by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow, self.out = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 8), (8, 16), (16, 8), (8, 1))
        )
        self.time = nn.Embedding(10, 8)

    def forward(self, x: Tensor, t: Tensor, *, scale: float = 1.0) -> Tensor:
        x = F.silu(self.stem(x)) + self.time(t)[:, :, None, None]
        x = x + self.narrow(F.silu(self.wide(x)))
        out: Tensor = self.out(x) * scale
        return out


class Diffusion(Trained):
    """Draws its timesteps in `training_step`."""

    def __init__(self) -> None:
        super().__init__(Denoiser())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        t = torch.randint(0, 10, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        return F.mse_loss(self.net(x + t[:, None, None, None] * noise, t, scale=0.5), noise)


class Transformer(nn.Module):
    """Token ids in, logits out; blocks of a residual MLP behind single-headed attention."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, size)
        self.query, self.key, self.value, self.merge = (nn.Linear(size, size) for _ in range(4))
        self.norm = nn.LayerNorm(size)
        self.wide, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.head = nn.Linear(size, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, None].bool(), -1e4)
        x = self.norm(x + self.merge(scores.softmax(-1) @ self.value(x)))
        x = x + self.narrow(F.gelu(self.wide(x)))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Tokens(Trained):
    """Has a forward, which it calls."""

    def __init__(self) -> None:
        super().__init__(Transformer())

    def forward(self, tokens: Tensor) -> Any:
        return self.net(tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[1]), batch[2])


class Reader(nn.Module):
    """Takes one dictionary, which holds a number too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"logits": self.layers(batch["image"] * batch["scale"])}


class Dictionary(Trained):
    """Without a forward, and its network takes a dictionary."""

    def __init__(self) -> None:
        super().__init__(Reader())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net({"image": batch[0], "scale": 2})["logits"], batch[2])


@dataclass
class Output:
    """As large libraries return it."""

    loss: Tensor | None
    logits: Tensor


class Encoding(UserDict[str, Any]):
    """As tokenizers return it: a mapping that is no dict, with attributes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "data":
            raise AttributeError(name)
        return self.data[name]


class Labeled(nn.Module):
    """A transformer that computes its own loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Transformer()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.encoder(input_ids, attention_mask)
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


class HuggingFace(Trained):
    """Calls a model with everything in the batch."""

    def __init__(self) -> None:
        super().__init__(Labeled())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss


MODULES: dict[str, Callable[[], Trained]] = {
    "diffusion": Diffusion,
    "tokens": Tokens,
    "dictionary": Dictionary,
    "hugging face": HuggingFace,
}


def batch_of(samples: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Images, token ids and labels."""
    dice = torch.Generator().manual_seed(0)
    images = torch.rand(samples, 1, 8, 8, generator=dice)
    tokens = torch.randint(0, 20, (samples, 6), generator=dice)
    return images, tokens, torch.randint(0, 4, (samples,), generator=dice)


def encoded(samples: int = 4) -> Encoding:
    """The same as a tokenizer has it."""
    _, tokens, labels = batch_of(samples)
    return Encoding(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)


def data_for(module: L.LightningModule, samples: int = 4) -> DataLoader[Any]:
    """Two batches for one of the modules."""
    batch: Any = encoded(samples) if isinstance(module, HuggingFace) else batch_of(samples)
    return DataLoader([batch, batch], batch_size=None)
