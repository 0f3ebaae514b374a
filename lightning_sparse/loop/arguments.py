"""The arguments that a method is made with: which there are, what they are as plain values, and which words are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["arguments", "plain", "refuse_words"]


def arguments(cls: type) -> dict[str, Any]:
    """All arguments that a method is made with, those it hands on to its base included, and their defaults."""
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
    """Refuse words of other methods and earlier versions with what to write instead."""
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
        raise ValueError(f"{cls.__name__} takes {first} without a name and all else with one; say what {value!r} is.")
    keyword = next((p.name for p in parameters if p.kind == p.KEYWORD_ONLY), "name")
    raise ValueError(
        f"{cls.__name__} promises no sparsity, so {value!r} needs a name; write {keyword}={value!r} if that is what it is."
    )


def plain(value: Any) -> Any:
    """A value as it is compared and saved: numbers, strings, lists, dictionaries."""
    if not isinstance(value, Tensor) and hasattr(value, "item"):
        return value.item()  # a number of NumPy, which would keep the checkpoint from loading with weights_only
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value
