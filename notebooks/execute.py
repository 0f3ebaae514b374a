"""Runs the notebooks from top to bottom and stores what they show, so that they can be read without running them.

    python notebooks/execute.py              all of them, about half a minute each
    python notebooks/execute.py seeing cka   only these
    python notebooks/execute.py --check      store nothing, and tell where outputs differ from the stored ones

Texts are compared word by word. Numbers depend a little on the processor, so a cell may carry a tag: `approximate` lets
numbers differ by a tenth, `varies` leaves them alone, and `timed` leaves alone the whole text, which depends on measured
times. Of figures, only the number is compared.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

FOLDER = Path(__file__).parent
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
COLOR = re.compile(r"\x1b\[[\d;]*m")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # sums in the same order every time
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm would rather have ipywidgets
}


def execute(path: Path, claims: str = "") -> nbformat.NotebookNode:
    """The notebook with fresh outputs; nothing is written.

    Args:
        path: of the notebook.
        claims: code to run behind its last cell, such as assertions about what it has found.

    Raises:
        RuntimeError: if a cell fails or writes to the error stream; it names the file, the cell and the line.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(claims))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}}),
        )
        try:
            client.execute(env=os.environ | ENVIRONMENT)
        except CellExecutionError as error:
            raise RuntimeError(f"{path.name} fails: {COLOR.sub('', str(error))}") from error
    notebook.cells.pop()
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path.name}, cell {number} writes to the error stream: {output.text}")
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)  # "<Figure size ...>" says nothing
                output.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def differences(stored: Any, fresh: Any) -> list[str]:
    """What a reader would notice, one sentence for each cell."""
    found = []
    for number, (before, after) in enumerate(zip_longest(stored.cells, fresh.cells)):
        tags = before.metadata.get("tags", [])
        for old, new in zip_longest(shown(before), shown(after)):
            if old is None or new is None or not alike(old, new, tags):
                found.append(f"cell {number} shows\n{new}\ninstead of\n{old}")
    return found


def shown(cell: Any) -> list[str]:
    """What a cell shows; a figure counts as a word."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        texts.append("a figure" if "image/png" in data else output.get("text", data.get("text/plain", "")))
    return texts


def alike(old: str, new: str, tags: Sequence[str]) -> bool:
    """Whether words are the same, and numbers as near as the tags ask."""
    if "timed" in tags:
        return bool(new)
    if not {"approximate", "varies"} & {*tags}:
        return old == new
    if NUMBER.sub("#", old).split() != NUMBER.sub("#", new).split():
        return False
    if "varies" in tags:
        return True
    numbers = ([float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (old, new))
    return all(math.isclose(a, b, rel_tol=0.1, abs_tol=0.02) for a, b in zip(*numbers, strict=True))


def main() -> int:
    """Execute, then store or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; all by default")
    parser.add_argument("--check", action="store_true", help="store nothing, and exit with 1 where outputs differ")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"no notebook {', '.join(unknown)}; choose from {', '.join(names)}.")
    found = 0
    for name in options.names or names:
        path = FOLDER / f"{name}.ipynb"
        fresh = execute(path)
        if options.check:
            told = differences(nbformat.read(path, as_version=4), fresh)
            found += len(told)
            print(f"notebooks/{name}.ipynb", *(told or ["as stored"]), sep=": " if not told else "\n", flush=True)
        else:
            nbformat.write(fresh, path)
            print(f"notebooks/{name}.ipynb", flush=True)
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
