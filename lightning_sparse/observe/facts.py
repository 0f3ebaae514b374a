"""The facts of a run before it starts, the same from the command line and from Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from lightning_sparse.loop.sparsifier import sparsifiers

if TYPE_CHECKING:
    from lightning.pytorch.cli import SaveConfigCallback

__all__ = ["command_line_of", "describe_run", "flat", "group_of", "name_of", "tags_of"]

Facts = dict[str, Any]


def describe_run(trainer: pl.Trainer, module: pl.LightningModule) -> Facts:
    """The configuration of a run as plain nested values, with the same keys from the command line and from Python.

    From the command line, the complete resolved configuration is included under `command_line`.
    """
    methods = {method.label: {"class": type(method).__name__, **method.config()} for method in sparsifiers(trainer)}
    facts: Facts = {
        "method": " + ".join(type(method).__name__ for method in sparsifiers(trainer)) or "dense",
        "model": {
            "class": type(module).__name__,
            "networks": [type(child).__name__ for child in module.children() if any(True for _ in child.parameters())],
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            **_plain(dict(module.hparams)),
        },
        "data": _data(trainer),
        "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED", "")).isdigit() else None,
        "optimizer": [_optimizer(optimizer) for optimizer in trainer.optimizers],
        "trainer": {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "strategy": type(trainer.strategy).__name__,
            "devices": trainer.num_devices,
            "nodes": trainer.num_nodes,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "callbacks": [type(callback).__name__ for callback in trainer.callbacks],  # type: ignore[attr-defined]
        },
        "methods": _plain(methods),
    }
    if (saved := command_line_of(trainer)) is not None:
        facts["command_line"] = _plain(saved.config.as_dict())
    return facts


def command_line_of(trainer: pl.Trainer) -> SaveConfigCallback | None:
    """The callback that holds the resolved configuration of the command line; None in Python.

    The command line has already imported its own parts, so this does not import them: that takes a quarter of a second.
    """
    cli = sys.modules.get("lightning.pytorch.cli")
    callbacks = [] if cli is None else trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, cli.SaveConfigCallback)), None)  # type: ignore[union-attr]


def name_of(trainer: pl.Trainer) -> str:
    """The name of a run: its methods, their sparsity, and the seed.

    Example:
        >>> import lightning as L, lightning_sparse
        >>> name_of(L.Trainer(callbacks=[lightning_sparse.RigL(0.9)], logger=False)).partition(" seed")[0]
        'RigL 90%'
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    return group_of(trainer) + (f" seed {seed}" if seed else "")


def group_of(trainer: pl.Trainer) -> str:
    """The group of a run: what it shares with runs of other seeds."""
    parts = []
    for method in sparsifiers(trainer):
        sparsity = method.config().get("sparsity")
        parts.append(type(method).__name__ + (f" {100 * sparsity:g}%" if isinstance(sparsity, float) else ""))
    return " + ".join(parts) or "dense"


def tags_of(trainer: pl.Trainer) -> list[str]:
    """Tags for finding runs: their methods and their sparsity."""
    tags: dict[str, None] = {}
    for method in sparsifiers(trainer):
        tags[type(method).__name__] = None
        if isinstance(sparsity := method.config().get("sparsity"), float):
            tags[f"sparsity {100 * sparsity:g}%"] = None
    return list(tags) or ["dense"]


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as `a/b`, for loggers that need flat keys.

    Example:
        >>> flat({"model": {"class": "MLP", "layers": [1, 2]}, "seed": 3})
        {'model/class': 'MLP', 'model/layers': '1, 2', 'seed': 3}
    """
    found: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            several = {str(i): one for i, one in enumerate(value)} if len(value) > 1 else value[0]
            found |= flat(several, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _data(trainer: pl.Trainer) -> Facts:
    """The data module, if there is one, and how the training set is read."""
    data = getattr(trainer, "datamodule", None)
    facts: Facts = {} if data is None else {"class": type(data).__name__, **_plain(dict(getattr(data, "hparams", {})))}
    loader = trainer.train_dataloader
    if isinstance(size := getattr(loader, "batch_size", getattr(data, "batch_size", None)), int):
        facts["batch_size"] = size
    if hasattr(dataset := getattr(loader, "dataset", None), "__len__"):
        facts["training_samples"] = len(dataset)  # type: ignore[arg-type]
    return facts


def _optimizer(optimizer: Any) -> Facts:
    """The class of an optimizer and the settings of its first group."""
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return {"class": type(optimizer).__name__, **_plain(optimizer.defaults | group)}


def _plain(value: Any) -> Any:
    """A value in a form that any logger can write."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
