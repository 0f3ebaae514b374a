"""Patterns that choose weights by name, by layer type, or by position."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

__all__ = ["as_patterns", "check_syntax", "covering", "matches_name"]


def as_patterns(targets: str | Sequence[str]) -> list[str]:
    """One pattern or several, as a list.

    Raises:
        ValueError: if there is none: it would be unclear whether all weights are meant or none.
    """
    if isinstance(targets, str):
        return [targets]
    if not isinstance(targets, Sequence) or not targets:
        raise ValueError(f"targets={targets!r} names no weights; write patterns such as ['encoder.*'], or omit it for all.")
    return list(targets)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a glob matches a parameter's name or the name of a module that contains it.

    Example:
        >>> matches_name("head", "head.2.weight"), matches_name("he", "head.2.weight")
        (True, False)
    """
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


def check_syntax(pattern: str) -> None:
    """Reject what is not a pattern.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"targets: {pattern!r} is not a pattern; write names such as 'encoder.*'.")
    bare = pattern.removeprefix("!")
    if bare.startswith("re:"):
        try:
            re.compile(bare[3:])
        except re.error as error:
            raise ValueError(f"targets: '{pattern}' is not a regular expression ({error}).") from None
    if bare.startswith(":") and bare not in (":first", ":last"):
        raise ValueError(f"targets: '{pattern}' is unknown; the ends of the network are ':first' and ':last'.")


def covering(names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The shortest patterns that exclude these names and no other chosen name.

    Example:
        >>> covering(["body.0.weight", "body.1.weight"], ["body.0.weight", "body.1.weight", "head.weight"])
        ['!body']
    """
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
        safe = (p for p in prefixes if all(other in names for other in chosen if matches_name(p, other)))
        patterns[f"!{next(safe)}"] = None
    return list(patterns)
