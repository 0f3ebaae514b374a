"""What pages need on narrow screens: where names may break, which tables are stacked, and figures that scroll."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

__all__ = ["breakable", "setup"]

SEAM = re.compile(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[_,=/])(?=[\w\"'&])|(?<=[.(])(?=[a-zA-Z_])")
"""Where a name may break: before a capital, and after a sign that joins words."""

PRE = re.compile(r'(?<=<span class="pre">)[^<]+(?=</span>)')
OPTION = re.compile(r'<span class="pre">(?=--?\w[^<]{0,15}</span>)')


def breakable(text: str) -> str:
    """A name with `<wbr>` at its seams, so that it never breaks inside a word.

    >>> breakable("SparseConnectivityLearning"), breakable("learning_rate")
    ('Sparse<wbr>Connectivity<wbr>Learning', 'learning_<wbr>rate')
    """
    return SEAM.sub("<wbr>", text)


def break_names(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Names in titles, table cells and links to the next page break at their seams, and short options not at all."""

    def inside(match: re.Match[str]) -> str:
        return PRE.sub(lambda text: breakable(text[0]), match[0])

    if "body" in context:
        body = OPTION.sub('<span class="pre option">', context["body"])
        body = re.sub(r"<(td|h1)\b.*?</\1>", inside, body, flags=re.DOTALL)
        context["body"] = re.sub(r"(?<=<h1>)[^<]+", lambda text: breakable(text[0]), body)
    for link in filter(None, (context.get("prev"), context.get("next"))):
        link["title"] = PRE.sub(lambda text: breakable(text[0]), link["title"])


def mark(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Tables that end in a default and a meaning are lists of arguments; a figure is an image alone in its paragraph."""
    for table in doctree.findall(nodes.table):
        header = [entry.astext() for head in table.findall(nodes.thead) for entry in head.findall(nodes.entry)]
        if header[-2:] == ["default", "meaning"]:
            table["classes"].append("arguments")
        elif len(header) > 4:
            table["classes"].append("wide")
    for image in doctree.findall(nodes.image):
        if isinstance(image.parent, nodes.paragraph) and len(image.parent) == 1:
            image.parent["classes"].append("picture")


def setup(app: Sphinx) -> dict[str, Any]:
    """Change pages after they are read and before they are written."""
    app.connect("doctree-resolved", mark)
    app.connect("html-page-context", break_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
