"""The methods as they are configured."""

from __future__ import annotations

import importlib
from pathlib import Path

import lightning as L
import torch
import yaml

import lightning_sparse

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


NEEDS_ZEROS = ("keep_sparsity",)
"""Overlays that work on a model which is sparse already."""


NEEDS_ATTENTION = ("magnitude_heads",)
"""Overlays that work on attention."""


class Sparsened(L.Callback):
    """Makes a model sparse before training begins: half of each matrix, in a pattern of 2:4 where that fits."""

    @torch.no_grad()
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for weight in pl_module.parameters():
            if weight.ndim > 1 and trainer.global_step == 0:
                inputs = torch.arange(weight.numel() // weight[0, 0].numel()).view(weight.shape[:2])
                weight[inputs // 2 % 2 == 1] = 0


def overlay(path: Path) -> list[L.Callback]:
    """The callbacks of an overlay, as the command line makes them."""
    made: list[L.Callback] = [Sparsened()] if path.stem in NEEDS_ZEROS else []
    for entry in yaml.safe_load(path.read_text())["trainer"]["callbacks+"]:
        module, _, name = entry["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module) if module else lightning_sparse, name)
        made.append(cls(**entry.get("init_args", {})))
    return made
