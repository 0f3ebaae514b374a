"""Functions of single objects that are replaced for the time of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Replacements"]


class Replacements:
    """What has been replaced, so that it can be put back.

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
        """A function of one object, not of its class."""
        self._originals.append((owner, name, getattr(owner, name), name in vars(owner)))
        setattr(owner, name, function)

    def restore(self) -> None:
        """Put everything back, the last first; safe to call again."""
        while self._originals:
            owner, name, original, was_its_own = self._originals.pop()
            setattr(owner, name, original) if was_its_own else delattr(owner, name)
