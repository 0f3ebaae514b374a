"""Other libraries: what to do where one is missing, and what they say when they fail."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch.fx.traceback as origins

__all__ = ["first_line", "need", "silenced", "without_origins"]


def need(module: str, package: str, extra: str = "export") -> Any:
    """An optional dependency, or the sentence that says how to get it.

    Args:
        module: to import.
        package: that holds it.
        extra: of this package that brings it.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"this needs {package}; install it with: pip install 'lightning_sparse[{extra}]'") from None


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """What loggers of libraries have to say below an error stays unsaid; an empty name is the root logger."""
    loggers = [logging.getLogger(name or None) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_origins() -> Iterator[None]:
    """While active, passes over a graph do not copy the origin of each node, which grows with every pass.

    Copying takes a fifth to a third of the time of lowering, and no artifact depends on it.
    """
    kind: Any = getattr(origins, "NodeSource", None)
    if kind is None or "__deepcopy__" in vars(kind):  # another torch, or already entered
        yield
        return
    kind.__deepcopy__ = lambda source, memo: source
    try:
        yield
    finally:
        del kind.__deepcopy__


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to stand in a sentence."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", str(error)).strip()  # some speak in colors
    return shorten((plain or type(error).__name__).splitlines()[0], 120, placeholder=" ...")
