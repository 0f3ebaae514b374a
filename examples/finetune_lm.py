"""Prune a trained language model and fine-tune it: how much it forgets, and how fast it recovers.

    python examples/finetune_lm.py                  one seed
    python examples/finetune_lm.py --seeds 0 1 2    the table
    python examples/finetune_lm.py --quick          a twentieth of it, to check that it works

A small standard decoder (attention, feed-forward layers, bytes as tokens) learns the source code of Python's standard
library, which is on every machine. It is then pruned by magnitude, by Wanda and by SparseGPT, to half of its weights and to
two of every four, and fine-tuned, with and without its dense self as a teacher. Each result is a line in `--out`; existing
results are not computed again, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import Distillation, MagnitudePruning, SparseGPT, Wanda

CONTEXT, BATCH = 64, 32
AFTER = (0, 100, 200, 400)
"""Numbers of recovery steps after which perplexity is measured; 0 is right after pruning."""

Prune = Callable[[dict[str, Any]], L.Callback]
METHODS: dict[str, Prune] = {
    "magnitude": lambda how: MagnitudePruning(**how, start=0, end=0, allocation="uniform"),
    "Wanda": lambda how: Wanda(**how, batches=16),
    "SparseGPT": lambda how: SparseGPT(**how, batches=16),
}
STRUCTURES: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"structure": "2:4"}}
TARGETS = ["!net.head"]
"""The head stays dense, as in the papers."""


class Block(nn.Module):
    """Attention and a feed-forward part, each with a norm before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Decoder(nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        out: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))
        return out


class LanguageModel(L.LightningModule):
    """A decoder, its loss, and its optimizer."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net, self.lr = Decoder(), lr

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of every next byte."""
        return F.cross_entropy(self.net(tokens[:, :-1].long()).flatten(0, 1), tokens[:, 1:].long().flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def windows(validation: bool) -> Tensor:
    """The source code of the standard library in windows of bytes; every tenth file is for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [file for index, file in enumerate(files) if (index % 10 == 9) == validation]
    text = b"\n".join(file.read_bytes() for file in chosen)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    size = CONTEXT + 1
    return tokens[: len(tokens) // size * size].view(-1, size)


@torch.no_grad()
def perplexity(model: LanguageModel, held_out: Tensor) -> float:
    """Perplexity of the next byte on held-out data."""
    was_training = model.training
    model.eval()
    losses = [float(model.loss(part)) * len(part) for part in held_out.split(256)]
    model.train(was_training)
    return math.exp(sum(losses) / len(held_out))


class Probe(L.Callback):
    """Measures perplexity after given numbers of steps."""

    def __init__(self, held_out: Tensor, after: tuple[int, ...]) -> None:
        self.held_out, self.after = held_out, after
        self.found: dict[int, float] = {}

    def look(self, model: LanguageModel, step: int) -> None:
        """Measure if this step is due."""
        if step in self.after and step not in self.found:
            self.found[step] = perplexity(model, self.held_out)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.look(pl_module, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.look(pl_module, trainer.global_step)


def train(model: LanguageModel, steps: int, seed: int, *callbacks: L.Callback) -> None:
    """Train for this many steps on windows that the seed draws."""
    data = TensorDataset(windows(validation=False))
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    L.Trainer(
        max_steps=steps,
        callbacks=[*callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, loader)


def dense_model(folder: Path, seed: int, steps: int) -> LanguageModel:
    """A trained model, loaded from the folder if it is there."""
    file = folder / f"dense-seed{seed}-steps{steps}.pt"
    L.seed_everything(seed, verbose=False)
    model = LanguageModel(lr=3e-3)
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model, steps, seed)
        torch.save(model.state_dict(), file)
    return model


def recover(
    dense: LanguageModel,
    how: Prune,
    structure: dict[str, Any],
    teacher: bool,
    seed: int,
    after: tuple[int, ...],
    held_out: Tensor,
) -> dict[str, float]:
    """Perplexity right after pruning, and after given numbers of training steps."""
    L.seed_everything(seed, verbose=False)
    model, probe = LanguageModel(lr=1e-3), Probe(held_out, after)
    model.load_state_dict(dense.state_dict())
    callbacks = [how({**structure, "targets": TARGETS}), *([Distillation()] if teacher else []), probe]
    train(model, max(after), seed + 1000, *callbacks)
    return {str(step): value for step, value in probe.found.items()}


def table(lines: list[dict[str, Any]], after: tuple[int, ...]) -> str:
    """Means over seeds, with the standard deviation if there are several."""

    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    dense = [line["perplexity"] for line in lines if line["method"] == "dense"]
    rows = [f"| | | teacher | {' | '.join('pruned' if step == 0 else f'{step} steps' for step in after)} | seeds |"]
    rows.append("|" + " --- |" * (4 + len(after)))
    rows.append(f"| dense | | | {cell(dense)} |" + " |" * (len(after) - 1) + f" {len(dense)} |")
    keys = dict.fromkeys((x["structure"], x["method"], x["teacher"]) for x in lines if x["method"] != "dense")
    for structure, method, teacher in sorted(keys, key=lambda key: (key[0], key[2])):
        mine = [x for x in lines if (x.get("structure"), x["method"], x.get("teacher")) == (structure, method, teacher)]
        cells = [cell([x["perplexity"][str(step)] for x in mine]) for step in after]
        rows.append(f"| {structure} | {method} | {'yes' if teacher else 'no'} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(rows)


def main() -> None:
    """Compute the missing results, and print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_lm/results.jsonl"))
    parser.add_argument("--steps", type=int, default=1000, help="of the dense training")
    parser.add_argument("--quick", action="store_true", help="a twentieth of all steps")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")
    after = tuple(step // 20 for step in AFTER) if options.quick else AFTER
    steps = options.steps // 20 if options.quick else options.steps
    options.out.parent.mkdir(parents=True, exist_ok=True)
    held_out = windows(validation=True)[::16]

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line.get(name) for name in ("seed", "steps", "method", "structure", "teacher", "after"))

    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    there = {key({**line, "after": tuple(line["after"])}) for line in lines}

    def add(line: dict[str, Any], measure: Callable[[], Any]) -> None:
        line = {**line, "steps": steps, "after": after}
        if key(line) in there:
            return
        begun = time.perf_counter()
        line["perplexity"] = measure()
        line["seconds"] = round(time.perf_counter() - begun, 1)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(json.loads(json.dumps(line)))
        print(json.dumps(line), flush=True)

    for seed in options.seeds:
        dense = dense_model(options.out.parent, seed, steps)
        add({"seed": seed, "method": "dense"}, lambda dense=dense: perplexity(dense, held_out))
        for teacher in (False, True):
            for name, structure in STRUCTURES.items():
                for method, how in METHODS.items():
                    add(
                        {"seed": seed, "method": method, "structure": name, "teacher": teacher},
                        lambda d=dense, h=how, s=structure, t=teacher, n=seed: recover(d, h, s, t, n, after, held_out),
                    )
    mine = [line for line in lines if line["steps"] == steps and tuple(line["after"]) == after]
    print(f"\nPerplexity of the next byte, {len(held_out):,} windows of {CONTEXT} bytes:\n\n{table(mine, after)}")


if __name__ == "__main__":
    main()
