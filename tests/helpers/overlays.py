"""The methods as they are configured."""

from __future__ import annotations

import importlib
from pathlib import Path

import lightning as L
import yaml

import lightning_sparse

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


def overlay(path: Path) -> list[L.Callback]:
    """The callbacks of an overlay, as the command line makes them."""
    made = []
    for entry in yaml.safe_load(path.read_text())["trainer"]["callbacks+"]:
        module, _, name = entry["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module) if module else lightning_sparse, name)
        made.append(cls(**entry.get("init_args", {})))
    return made
