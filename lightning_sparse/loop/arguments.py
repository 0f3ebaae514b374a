"""The arguments of a method: their names, their plain values, and the names that are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["arguments", "plain", "refuse_words"]


def arguments(cls: type) -> dict[str, Any]:
    """All arguments of a method, including those it passes to its base, and their defaults."""
    names: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            names.update({p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)})
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    names.pop("self", None)
    return names


def refuse_words(cls: type, refused: Mapping[str, str], given: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Refuse arguments of other methods and earlier versions, and say what to use instead."""
    for name in named:
        if name in refused:
            raise ValueError(f"{cls.__name__} does not take {name}: {refused[name]}.")
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    for flag in (p.name for p in parameters if p.annotation in ("bool", bool) and p.name in named):
        if type(named[flag]).__name__ not in ("bool", "bool_"):  # NumPy's too; any text would count as true
            raise ValueError(f"{flag}={named[flag]!r} must be True or False.")
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind == p.VAR_POSITIONAL for p in parameters) or len(given) <= len(by_position):
        return
    value = given[len(by_position)]
    if by_position:
        first = ", ".join(p.name for p in by_position)
        raise ValueError(f"{cls.__name__} takes only {first} as a positional argument; name the argument for {value!r}.")
    keyword = next((p.name for p in parameters if p.kind == p.KEYWORD_ONLY), "name")
    raise ValueError(
        f"{cls.__name__} has no target sparsity, so {value!r} needs a name; use {keyword}={value!r} if that is what you "
        f"mean."
    )


def plain(value: Any) -> Any:
    """A value in the form in which it is compared and saved: numbers, strings, lists, dictionaries."""
    if not isinstance(value, Tensor) and hasattr(value, "item"):
        return value.item()  # a NumPy number would prevent loading the checkpoint with weights_only
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value
