"""Checkpoints on the command line: their weights, and the configuration of the run that each is from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]

from lightning_sparse.core import first_line

__all__ = ["load_weights", "readable", "with_saved_config"]


def load_weights(model: pl.LightningModule, ckpt_path: str, which: str) -> None:
    """Give a model the weights of a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no checkpoint, or holds another model.
    """
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path='{ckpt_path}' is not a file; give {which}.")
    with readable(ckpt_path):
        weights = torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(f"ckpt_path='{ckpt_path}' does not fit the model that is configured: {reason}.") from None


@contextmanager
def readable(ckpt_path: str) -> Iterator[None]:
    """Has a sentence for a file that is no checkpoint.

    Raises:
        ValueError: if reading it fails.
    """
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"ckpt_path='{ckpt_path}' cannot be read as a checkpoint ({said}); give one that a run saved."
        ) from None


def with_saved_config(args: list[str], folder: str) -> list[str]:
    """Arguments of an export with the model and data of the run its checkpoint is from, unless they name a configuration.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if none lies beside the checkpoint or above it.
    """
    given = [arg.partition("=")[0] for arg in args]
    if args[:1] != ["export"] or {"-c", "--config", "--model", "-h", "--help"} & set(given) or "--ckpt_path" not in given:
        return args
    position = given.index("--ckpt_path")
    checkpoint = args[position].partition("=")[2] or "".join(args[position + 1 : position + 2])
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"ckpt_path='{checkpoint}' is not a file; give one of the run to export.")
    found = next((f for f in (p / "config.yaml" for p in Path(checkpoint).resolve().parents[:4]) if f.is_file()), None)
    if found is None:
        raise ValueError(f"'{checkpoint}' has no config.yaml next to it or above; give the files of its run with --config.")
    saved = yaml.safe_load(found.read_text())
    kept = Path(folder) / "config.yaml"
    kept.write_text(yaml.safe_dump({key: saved[key] for key in ("seed_everything", "model", "data") if key in saved}))
    return ["export", f"--config={kept}", "--trainer.logger=false", *args[1:]]
