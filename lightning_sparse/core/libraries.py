"""Other libraries: what to do where one is missing, and what they say when they fail."""

from __future__ import annotations

import importlib
import re
from typing import Any

__all__ = ["first_line", "need"]


def need(module: str, package: str) -> Any:
    """An optional dependency, or the sentence that says how to get it.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"this needs {package}; install it with: pip install 'lightning_sparse[export]'") from None


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to stand in a sentence."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", str(error)).strip()  # some speak in colors
    return (plain or type(error).__name__).splitlines()[0][:120]
