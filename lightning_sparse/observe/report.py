"""Reports as files: write, find and read them."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import lightning
import torch

from lightning_sparse._version import __version__
from lightning_sparse.observe.checkpoint_io import PART
from lightning_sparse.observe.page import DATA, Run, page

__all__ = ["FILE", "describe_machine", "find_reports", "read_report", "why_unwritable", "write_report"]

FILE = "report.html"
ROOM = 4 * 2**20
"""Free bytes required for a report and the configuration next to it."""


def describe_machine() -> dict[str, str]:
    """Versions and the command, to rerun it."""
    program, module = Path(sys.argv[0]).name, getattr(sys.modules["__main__"], "__spec__", None)
    called = ["python", "-m", module.name.removesuffix(".__main__")] if module and program.endswith(".py") else [program]
    if module is None and program.endswith(".py"):
        called = ["python", program]
    return {
        "command": shlex.join([*called, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": str(lightning.__version__),
        "lightning_sparse": __version__,
    }


# ---- files ---------------------------------------------------------------------------------------------------------------


def write_report(path: Path, *runs: Run) -> None:
    """Write the page of one run or several, completely or not at all; the previous one stays until then.

    Raises:
        OSError: if it cannot be written.
    """
    text, part = page(*runs), path.with_name(path.name + PART)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def why_unwritable(folder: Path) -> str | None:
    """Why a report could not be written into a folder, which need not exist yet; None if it could.

    Args:
        folder: folder of a run.
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        return error.strerror or str(error)
    free = shutil.disk_usage(existing).free
    return None if free >= ROOM else f"{free / 2**20:.1f} MB free, and {ROOM / 2**20:g} MB are needed"


def find_reports(paths: Sequence[str | Path]) -> list[Path]:
    """The reports of runs: the given files, and those in the given folders.

    Raises:
        FileNotFoundError: naming the first path without a report.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        here = [path] if path.is_file() else sorted(path.rglob(FILE))
        if not here:
            raise FileNotFoundError(
                f"'{path}' holds no {FILE}; train with SparsityMonitor among the callbacks, which writes one."
            )
        found += [file for file in here if file not in found]
    return found


def read_report(path: Path) -> list[Run]:
    """The runs that a page is about.

    Raises:
        ValueError: if the file is not such a page.
    """
    match = re.search(re.escape(DATA) + r"(.*?)</script>", path.read_text(encoding="utf-8"), flags=re.S)
    if match is None:
        raise ValueError(f"'{path}' is not a report of lightning_sparse; give the {FILE} of a run, or its folder.")
    runs: list[Run] = json.loads(match[1])
    for run in runs:
        run.setdefault("path", str(path))
    return runs
