"""The configuration of a run in its folder, where commands that read its checkpoints find it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from lightning_sparse.cli.checkpoints import usable
from lightning_sparse.observe.checkpoint_io import SHARDED, why_unreadable
from lightning_sparse.observe.monitor import run_folder

__all__ = ["FILE", "SaveRunConfig", "with_saved_config"]

FILE, CHECKPOINTS = "config.yaml", "checkpoints"
KEPT = {
    "export": ("seed_everything", "model", "data"),
    "validate": ("seed_everything", "model", "data"),
    "test": ("seed_everything", "model", "data"),
    "predict": ("seed_everything", "model", "data"),
    "refit": ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler"),
}
"""What each command takes from the configuration of a run."""


class SaveRunConfig(SaveConfigCallback):
    """Save the configuration of a training in the folder of its run, before the first batch.

    Whatever the logger, that is the folder above `checkpoints`; checkpoints that go elsewhere get a copy. Every checkpoint
    stores a fingerprint of its model and data, so that a folder into which several runs have written is detected.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # a test must not be mistaken for the run that it tests
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._write(run_folder(trainer))

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        usual = (run_folder(trainer) / CHECKPOINTS).resolve()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath and Path(callback.dirpath).resolve() != usual:
                self._write(Path(callback.dirpath))

    def _write(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(folder / FILE), skip_none=False, overwrite=True, multifile=False)
        except OSError as error:
            raise ValueError(
                f"the run cannot write into '{folder}' ({error.strerror}); choose another folder, for example with "
                "--trainer.default_root_dir."
            ) from error

    @property
    def state_key(self) -> str:
        return "SaveRunConfig"

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": fingerprint(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))}


def fingerprint(config: Mapping[str, Any]) -> str:
    """A hash that distinguishes the model and data of different configurations."""
    text = json.dumps([config.get("model"), config.get("data")], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_saved_config(args: list[str], folder: str) -> list[str]:
    """Add to a command the configuration of the run that saved its checkpoint, unless one is given.

    Args:
        args: arguments of the command line.
        folder: folder for a file that holds what the command needs.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if none is given, or its folder holds no configuration, or that of another run.
    """
    given = [arg.partition("=")[0] for arg in args]
    named = {"-c", "--config", "--model", "--model.class_path", "-h", "--help", "--print_config"} & set(given)
    if not args or args[0] not in KEPT or named:
        return args
    position = given.index("--ckpt_path") if "--ckpt_path" in given else len(args)
    checkpoint = "".join(args[position : position + 1]).partition("=")[2] or "".join(args[position + 1 : position + 2])
    if not Path(checkpoint).is_file() and not (Path(checkpoint).is_dir() and why_unreadable(checkpoint) is None):
        usable(checkpoint)
    found = _config_of(Path(checkpoint))
    saved = yaml.safe_load(found.read_text())
    made_with = _fingerprint_in(checkpoint)
    if made_with is not None and made_with != fingerprint(saved):
        raise ValueError(
            f"'{found}' belongs to another run than '{checkpoint}': their models or data differ; give the configuration of "
            f"the "
            "checkpoint's own run with --config."
        )
    taken = {key: saved[key] for key in KEPT[args[0]] if key in saved}
    kept = Path(folder) / FILE
    kept.write_text(yaml.safe_dump(taken))
    alone = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    where = [f"--trainer.default_root_dir={found.parent / 'refit'}"] if args[0] == "refit" else alone
    return [args[0], f"--config={kept}", *where, *args[1:]]


def _config_of(checkpoint: Path) -> Path:
    """The configuration of the run that saved a checkpoint.

    Raises:
        ValueError: if there is none.
    """
    folder = checkpoint.resolve().parent
    for place in (folder, folder.parent) if folder.name == CHECKPOINTS else (folder,):
        if (place / FILE).is_file():
            return place / FILE
    raise ValueError(
        f"'{checkpoint}' has no {FILE} in the folder of its run; give the configuration of the run with --config."
    )


def _fingerprint_in(checkpoint: str) -> str | None:
    file = Path(checkpoint) / SHARDED if Path(checkpoint).is_dir() else checkpoint
    try:
        states = torch.load(file, map_location="cpu", weights_only=True)["callbacks"]
    except Exception:  # a problem with the file is reported where it is read
        return None
    found: str | None = states.get("SaveRunConfig", {}).get("fingerprint")
    return found
