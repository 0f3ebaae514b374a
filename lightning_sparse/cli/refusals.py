"""Which errors are printed as one sentence: those that a user can fix without changing code."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_sparse

__all__ = ["sentence_of"]

OURS = str(Path(lightning_sparse.__file__).parent)
LIBRARIES = (OURS, *{sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}, "<")
REFUSES = (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError, MisconfigurationException)
"""What a library raises when it is given something that it cannot handle; everything else is a bug in code."""

LONGEST = 300
"""Maximum length of a sentence from a library."""

MAKES = "jsonargparse"
"""The library that makes what a configuration names."""


def sentence_of(error: BaseException) -> str | None:
    """The sentence to print instead of a traceback; None if only a traceback helps.

    A refusal of this package is printed as it is. A refusal of a library is passed on, unless it came through the user's
    code: the author of a LightningModule needs to see the line. A library's own exception, such as MlflowException, is a
    refusal if it prevents an object that a configuration names from being made.

    Args:
        error: the error that ended a command.
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, ValueError | OSError) and _files(one)[-1].startswith(OURS):
            return str(one)
        parsers = isinstance(one, ValueError) and MAKES in _files(one)[-1]
        if parsers and (causes := re.findall(r"^\s*- (\w+=.+)$", str(one), flags=re.M)):
            return str(causes[0])  # older versions keep only the text of a refusal
    cause = next((one for one in reversed(chain) if MAKES not in _files(one)[-1]), error)
    makes = MAKES in _files(error)[-1] and not _files(cause)[-1].startswith(OURS)
    own_kind = makes and isinstance(cause, Exception) and type(cause).__module__ != "builtins"
    if not isinstance(error, REFUSES) or not (isinstance(cause, REFUSES) or own_kind):
        return None
    if any(_is_users(file) for one in chain for file in _files(one)):
        return None
    said = " ".join(re.sub("\x1b\\[[0-9;]*m", "", str(cause)).split()).replace("`", "")
    sentence = shorten(said or type(cause).__name__, LONGEST, placeholder=" ...")
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _files(error: BaseException) -> list[str]:
    """The files of the code that an error passed through, up to where it was raised."""
    return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)] or ["<"]


def _is_users(file: str) -> bool:
    return not file.startswith(LIBRARIES) and "site-packages" not in file and "dist-packages" not in file
