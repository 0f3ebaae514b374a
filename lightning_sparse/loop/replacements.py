"""Functions of single objects that are replaced for the duration of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer

__all__ = ["Replacements", "clip_only_gradients"]


class Replacements:
    """Records what has been replaced, so that it can be restored.

    Example:
        >>> class Bell:
        ...     def ring(self) -> str:
        ...         return "ring"
        >>> bell, replacements = Bell(), Replacements()
        >>> replacements.replace(bell, "ring", lambda: "silence")
        >>> bell.ring()
        'silence'
        >>> replacements.restore()
        >>> bell.ring(), vars(bell)
        ('ring', {})
    """

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any, bool]] = []

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Replace a function of one object, not of its class."""
        self._originals.append((owner, name, getattr(owner, name), name in vars(owner)))
        setattr(owner, name, function)

    def restore(self) -> None:
        """Restore everything in reverse order; safe to call again."""
        while self._originals:
            owner, name, original, was_its_own = self._originals.pop()
            setattr(owner, name, original) if was_its_own else delattr(owner, name)


def clip_only_gradients(precision: Precision, replacements: Replacements) -> None:
    """Let a step without any gradients pass the clipping: torch fails to clip none of them by value."""
    original = precision.clip_gradients

    def clip_gradients(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
            original(optimizer, *args, **kwargs)

    replacements.replace(precision, "clip_gradients", clip_gradients)
