"""What is made when the site is built: the API reference, copies of the notebooks, and tables from code and results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docstrings import translated
from reference import PACKAGES, page
from sphinx.application import Sphinx

__all__ = ["setup"]


def write_if_new(file: Path, text: str) -> None:
    """Write a file unless it holds the text already, so that an unchanged page is not read again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def make_sources(app: Sphinx) -> None:
    """Write the API reference and copy the notebooks into folders that git ignores."""
    docs = Path(app.srcdir)
    for package in PACKAGES:
        write_if_new(docs / "api" / "generated" / f"{package.rpartition('.')[2]}.rst", page(package, translated))
    for notebook in (docs.parent / "notebooks").glob("*.ipynb"):
        write_if_new(docs / "notebooks" / notebook.name, notebook.read_text())


def stay_inside(app: Sphinx, name: str, content: list[str]) -> None:
    """Links to notebooks lead to their copies in the site, and those of notebooks to its pages."""
    content[0] = re.sub(r"\]\((?:\.\./)+notebooks/", f"]({'../' * name.count('/')}notebooks/", content[0])
    if name.startswith("notebooks/"):
        content[0] = content[0].replace("](../docs/", "](../")


def setup(app: Sphinx) -> dict[str, Any]:
    """Make pages before the others are read."""
    app.connect("builder-inited", make_sources)
    app.connect("source-read", stay_inside)
    return {"parallel_read_safe": True}
