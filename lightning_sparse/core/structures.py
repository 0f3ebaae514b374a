"""The table of structures: how users write them, and the classes behind them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from lightning_sparse.core.blocks import Blocks
from lightning_sparse.core.coupled import Coupled
from lightning_sparse.core.fan_in import FanIn
from lightning_sparse.core.heads import Heads
from lightning_sparse.core.structure import Channels, NOfM, Structure, Unstructured
from lightning_sparse.core.transposable import Transposable

__all__ = ["STRUCTURES", "StructureName", "parse_structure"]

StructureName = (
    Literal["unstructured", "channel", "coupled", "heads", "fan_in", "block:16x16", "2:4", "transposable 2:4"] | str | int
)
"""The name of a structure in `STRUCTURES`; also a number, because YAML reads an unquoted 2:4 as one."""

STRUCTURES: dict[str, tuple[str, Callable[..., Structure]]] = {
    "'unstructured'": ("unstructured", Unstructured),
    "'channel'": ("channel", Channels),
    "'coupled'": ("coupled", Coupled),
    "'heads'": ("heads", Heads),
    "'fan_in'": ("fan_in", FanIn),
    "'block:RxC' such as 'block:16x16'": (r"block:(\d+)x(\d+)", Blocks),
    "'n:m' such as '2:4'": (r"(\d+):(\d+)", NOfM),
    "'transposable n:m'": (r"transposable (\d+):(\d+)", Transposable),
}
"""Name of a structure in messages -> a regular expression for it, and a function that makes it from the matched numbers."""


def parse_structure(text: str | int) -> Structure:
    """Return the structure that a user has written.

    Raises:
        ValueError: if it is not in `STRUCTURES`.

    Example:
        >>> parse_structure("2:4").sparsity
        0.5
    """
    if isinstance(text, str):
        for pattern, make in STRUCTURES.values():
            if match := re.fullmatch(pattern, text):
                return make(*map(int, match.groups()))
    elif isinstance(text, int) and text >= 60:
        meant = f"{text // 60}:{text % 60}"
        raise ValueError(f"structure={text} is how YAML reads {meant}; write '{meant}', in quotes.")
    *most, last = STRUCTURES
    raise ValueError(f"structure={text!r} is unknown; write {', '.join(most)} or {last}.")
