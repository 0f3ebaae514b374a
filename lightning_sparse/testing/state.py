"""Compare training states, and check zeros, targets and leftovers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sparse.loop import Sparsifier

__all__ = [
    "Watcher",
    "differences",
    "left_behind",
    "masks_of",
    "method_of",
    "nonzero",
    "off_target",
    "state_of",
    "zeros_hold",
]


def method_of(callbacks: Sequence[Callback]) -> Sparsifier:
    """Return the first method among callbacks."""
    return next(callback for callback in callbacks if isinstance(callback, Sparsifier))


def masks_of(method: Sparsifier) -> dict[str, Tensor]:
    """Return the masks of a method by name, True = kept; empty if it has none."""
    return {} if method.mask_set is None else {name: method.mask_set[name] for name in method.mask_set}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the paths at which two nested states are not equal bit for bit.

    Args:
        a: tensors, numbers, strings, and dictionaries, lists and tuples of them.
        b: the same.
        where: the path to both.

    Example:
        >>> differences({"a": [1, 2]}, {"a": [1, 3]})
        ['/a/1: 2 3']
    """
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and a.dtype == b.dtype and a.equal(b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} {b}"]


def state_of(module: pl.LightningModule, trainer: pl.Trainer, *methods: Sparsifier) -> dict[str, Any]:
    """Return everything that must be equal after a resume: weights, optimizers, methods' states and the random state."""
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "memory": [method.memorize() for method in methods],
        "rng": torch.get_rng_state(),
    }


def nonzero(method: Sparsifier, module: nn.Module) -> list[str]:
    """Return the names of weights with a masked entry that is not exactly zero; every element is compared."""
    weights = dict(module.named_parameters())
    return [name for name, mask in masks_of(method).items() if bool((weights[name][~mask] != 0).any())]


def zeros_hold(method: Sparsifier, module: nn.Module) -> bool:
    """Whether every masked entry is exactly zero."""
    return not nonzero(method, module)


def off_target(method: Sparsifier) -> list[str]:
    """Return a sentence wherever the number of kept weights differs from `method.goal`; empty if it promises nothing."""
    kept = {name: int(mask.count_nonzero()) for name, mask in masks_of(method).items()}
    wrong = [
        f"'{name}' keeps {kept.get(name)} of the {count} promised"
        for name, count in method.goal["layers"].items()
        if kept.get(name) != count
    ]
    total = method.goal["total"]
    if total not in (None, sum(kept.values())):
        wrong.append(f"{sum(kept.values())} of the {total} promised are kept")
    return wrong


def left_behind(method: Sparsifier, module: pl.LightningModule, trainer: pl.Trainer) -> list[str]:
    """Return what a finished fit has left on the module, on its optimizers and in the method."""
    found = []
    for optimizer in trainer.optimizers:
        for moment in ("pre", "post"):
            hooks = getattr(optimizer, f"_optimizer_step_{moment}_hooks").values()  # torch has no public API for this
            found += [f"a step {moment}-hook of {hook.__module__}" for hook in hooks]
    for name, part in module.named_modules():
        kinds = [kind for kind in vars(part) if kind.endswith(("_hooks", "_pre_hooks")) and vars(part)[kind]]
        found += [f"{kind.strip('_')} of '{name}'" for kind in kinds if "state_dict" not in kind]
    found += [f"module.{name}" for name in ("training_step", "forward") if name in vars(module)]
    return found + [f"the weights of {method.label}"] * bool(method.weights)


class Watcher(Callback):
    """Calls a function whenever other code may look at the weights.

    Args:
        look: called with the moment ("batch end", "validation" or "epoch end") and the module.
    """

    def __init__(self, look: Callable[[str, pl.LightningModule], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("batch end", pl_module)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.look("validation", pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look("epoch end", pl_module)
