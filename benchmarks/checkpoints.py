"""Trainings that go on from where they were killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO


class WholeFiles(TorchCheckpointIO):
    """A checkpoint takes the place of the last one when it is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, f"{path}.part", storage_options)
        os.replace(f"{path}.part", path)


def resumable(checkpoint: Path | None, epochs: int) -> tuple[list[L.Callback], dict[str, Any], Path | None]:
    """Callbacks and options of a trainer that leaves its state some twenty times on the way, and where it is to begin."""
    if checkpoint is None:
        return [], {"enable_checkpointing": False}, None
    saving = ModelCheckpoint(
        checkpoint.parent,
        checkpoint.stem,
        every_n_epochs=max(1, epochs // 20),
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    return [saving], {"plugins": [WholeFiles()]}, checkpoint if checkpoint.exists() else None
