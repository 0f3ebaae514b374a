"""Train a sparse decoder with sharded weights, stop, and resume on a different number of ranks.

    python examples/large_model.py --devices 2
    python examples/large_model.py --devices 4 --resume
    python examples/large_model.py --quick

Two processes on a CPU are enough; with GPUs, use one process each. It learns to predict the next byte of Python's own
library.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_sparse import RigL, SparsityMonitor, WeightPenalty
from lightning_sparse.export import whole_weights

CONTEXT = 64


class Block(nn.Module):
    """Causal attention and a feed-forward part, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.mix(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A language model of bytes."""

    def __init__(self, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.places(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Model(L.LightningModule):
    """Builds its network where Lightning knows the number of ranks, and shards it block by block."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.network: Any = None

    def configure_model(self) -> None:
        if self.network is not None:  # Lightning calls this again when it tests or resumes
            return
        torch.manual_seed(0)
        self.network = Decoder(self.width, self.depth)
        mesh = self.device_mesh["data_parallel"]
        for block in self.network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.network(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Text(Dataset[Tensor]):
    """Windows of the source code of Python's standard library."""

    def __init__(self, windows: int) -> None:
        folder = Path(sysconfig.get_path("stdlib"))
        self.text = torch.tensor(list(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:40])))
        self.windows = windows

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> Tensor:
        start = index * 7919 % (len(self.text) - CONTEXT - 1)
        return self.text[start : start + CONTEXT + 1]


def main() -> None:
    """Train, or resume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="ranks")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, on any number of ranks")
    parser.add_argument("--epochs", type=int, default=4, help="of the whole run")
    parser.add_argument("--stop", type=int, default=2, help="epochs after which the first command stops")
    parser.add_argument("--windows", type=int, default=2048, help="samples of an epoch")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--folder", default="runs/large_model")
    parser.add_argument("--quick", action="store_true", help="a small model for two short epochs, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.stop, options.windows, options.width, options.depth = 2, 1, 512, 32, 1

    folder = Path(options.folder)
    trainer = L.Trainer(
        accelerator="auto",
        devices=options.devices,
        strategy=ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1),
        max_epochs=options.epochs,
        default_root_dir=folder,
        logger=False,
        callbacks=[
            RigL(0.9, every=0.05, end=0.75, targets=["!network.head"]),
            WeightPenalty(penalty="l2", strength=1e-4, end=1.0),
            SparsityMonitor(),
            ModelCheckpoint(folder, "last", enable_version_counter=False),
            *([] if options.resume else [Stop(options.stop)]),
        ],
    )
    last = folder / "last.ckpt"
    data = DataLoader(Text(options.windows), batch_size=32 // options.devices, shuffle=True)
    trainer.fit(Model(options.width, options.depth), data, ckpt_path=last if options.resume else None)

    if trainer.is_global_zero and options.resume:
        weights = {name.removeprefix("network."): value for name, value in whole_weights(last).items()}
        plain = Decoder(options.width, options.depth)
        plain.load_state_dict(weights, strict=True)
        pruned = [w for name, w in plain.named_parameters() if w.ndim > 1 and "blocks" in name]
        zeros = sum(int((w == 0).sum()) for w in pruned) / sum(w.numel() for w in pruned)
        print(f"The plain decoder holds {zeros:.2%} zeros in its blocks.")


class Stop(L.Callback):
    """Stop early; the schedules remain those of the whole run."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch + 1 >= self.epochs


if __name__ == "__main__":
    main()
