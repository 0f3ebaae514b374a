"""Checks before anything is created: settings that would be ignored, or would fail after hours."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_sparse.observe.report import why_unwritable

__all__ = ["check_overridden", "check_settings", "leave_out_shapes"]

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
    parameters = _parameters(config.get("model.class_path"))
    for shape in FROM_DATA:
        given = config.get(f"model.init_args.{shape}")
        if shape in parameters and given != parameters[shape].default:
            raise ValueError(f"model.init_args.{shape}={given} would be ignored, because it follows from the data; omit it.")


def _parameters(class_path: Any) -> Mapping[str, inspect.Parameter]:
    module, _, name = str(class_path).rpartition(".")
    return inspect.signature(getattr(importlib.import_module(module), name)).parameters


def leave_out_shapes(model: Any) -> None:
    """Leave out what a model does not take: Lightning saves what follows from the data as hyperparameters of every model.

    Args:
        model: the model that will be made.
    """
    parameters, further = _parameters(model.class_path), model.get("dict_kwargs") or {}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for shape in FROM_DATA:
            further.pop(shape, None)


def check_overridden(given: Any, used: Any, ckpt_path: str) -> None:
    """Say which arguments of the model come from the hyperparameters in a checkpoint; Lightning prefers those.

    Args:
        given: the model in the configuration.
        used: the model that will be made.
        ckpt_path: the checkpoint.

    Raises:
        ValueError: if an argument was set to another value than that of the checkpoint.
    """
    others = {
        key.removeprefix("init_args."): (given[key], value) for key, value in used.items() if value != given.get(key, value)
    }
    parameters = _parameters(given.class_path)
    for name, (ours, theirs) in others.items():
        if name in FROM_DATA:
            continue
        said = f"ckpt_path='{ckpt_path}' holds {name}={theirs!r}"
        if name not in parameters or ours != parameters[name].default:
            raise ValueError(f"model.{name}={ours!r} would be ignored, because {said}; omit it, or start a new run.")
        rank_zero_warn(f"{said}, which is used instead of the default, {ours!r}.")


def _check_length(config: Any) -> None:
    for name, least in (("accumulate_grad_batches", 1), ("log_every_n_steps", 0), ("gradient_clip_val", 0)):
        value = config.get(f"trainer.{name}")
        if value is not None and not value >= least:
            raise ValueError(f"trainer.{name}={value} must be >= {least}.")
    for name, remedy in (
        ("max_epochs", "write a number >= 1"),
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
