"""Which errors end in a sentence, and in which: those that somebody can mend who has not written the code."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_sparse
from lightning_sparse.core import first_line

__all__ = ["sentence_of"]

OURS = str(Path(lightning_sparse.__file__).parent)
LIBRARIES = (OURS, *{sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}, "<")
REFUSES = (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError, MisconfigurationException)
"""What a library raises that has been given something it cannot work with; all else is a mistake in code."""


def sentence_of(error: BaseException) -> str | None:
    """What to print instead of a traceback; None where only a traceback helps.

    A refusal of this package speaks for itself. What a library refuses is passed on, unless code of the user is on the way
    to it: who writes a LightningModule needs to see the line.

    Args:
        error: that a command has ended with.
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, ValueError | OSError) and _files(one)[-1].startswith(OURS):
            return str(one)
        parsers = isinstance(one, ValueError) and "jsonargparse" in _files(one)[-1]
        if parsers and (causes := re.findall(r"^\s*- (\w+=.+)$", str(one), flags=re.M)):
            return str(causes[0])  # older versions keep only the text of a refusal
    if not isinstance(error, REFUSES) or any(_is_users(file) for one in chain for file in _files(one)):
        return None
    said = " ".join(str(error).split()) if isinstance(error, MisconfigurationException) else first_line(error)
    return said if said.endswith((".", "?", "!")) else f"{said}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _files(error: BaseException) -> list[str]:
    """The files of the code that an error has come through, up to where it was raised."""
    return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)] or ["<"]


def _is_users(file: str) -> bool:
    return not file.startswith(LIBRARIES) and "site-packages" not in file and "dist-packages" not in file
