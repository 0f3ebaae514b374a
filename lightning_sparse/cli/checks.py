"""Checks before anything is created: settings that would be ignored, or would fail after hours."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from lightning_sparse.observe.report import why_unwritable

__all__ = ["check_settings"]

LARGEST_SEED = 2**32 - 1
TRAINS = ("fit", "refit")
FROM_DATA = ("num_classes", "in_channels", "image_size")
"""Arguments of a model that follow from the data."""


def check_settings(command: str, config: Any) -> None:
    """Check the settings of a command.

    Args:
        command: such as `fit`.
        config: the parsed configuration.

    Raises:
        ValueError: naming the first invalid setting.
    """
    _check_seed(config.get("seed_everything"))
    _check_devices(config.get("trainer.devices"))
    _check_shape(config)
    if command in TRAINS:
        _check_length(config)
        if not config.get("trainer.fast_dev_run"):
            _check_folder(config.get("trainer.default_root_dir"))


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, bool) and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(
            f"seed_everything={seed} must be an integer from 0 to {LARGEST_SEED}; true draws one, false sets none."
        )


def _check_devices(devices: Any) -> None:
    words = str(devices).strip()
    if not isinstance(devices, list) and not re.fullmatch(r"auto|-1|0*[1-9]\d*|\d+(\s*,\s*\d+)+,?|\d+,", words):
        raise ValueError(
            f"trainer.devices={devices!r} must be a number >= 1, a list such as [0, 1], -1 for all of them, or 'auto'."
        )


def _check_shape(config: Any) -> None:
    """Refuse a shape of the model that would be ignored because it follows from the data."""
    module, _, name = str(config.get("model.class_path")).rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    for shape in FROM_DATA:
        given = config.get(f"model.init_args.{shape}")
        if shape in parameters and given != parameters[shape].default:
            raise ValueError(f"model.init_args.{shape}={given} would be ignored, because it follows from the data; omit it.")


def _check_length(config: Any) -> None:
    for name, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 0), ("gradient_clip_val", 0)):
        value = config.get(f"trainer.{name}")
        if value is not None and not value >= least:
            raise ValueError(f"trainer.{name}={value} must be >= {least}.")
    for name, remedy in (
        ("max_epochs", "write a number >= 1, or -1 to train until something stops it"),
        ("max_steps", "write a number >= 1, or -1 for no limit"),
        ("limit_train_batches", "write a number of batches >= 1, or a fraction of them such as 0.5"),
    ):
        value = config.get(f"trainer.{name}")
        if value is not None and value == 0:
            raise ValueError(f"trainer.{name}={value} trains nothing; {remedy}.")


def _check_folder(folder: str | None) -> None:
    """Notice now, not after the run, that nothing could be saved."""
    if folder is None or "://" in str(folder):
        return
    if (reason := why_unwritable(Path(folder))) is not None:
        raise ValueError(f"trainer.default_root_dir='{folder}' cannot be written ({reason}); choose another folder.")
