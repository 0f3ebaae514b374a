"""Formulas as MathML, which browsers show themselves: no script, no font, nothing to load from elsewhere."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

__all__ = ["mathml", "setup"]


def mathml(tex: str, displayed: bool) -> str:
    """A formula for the page.

    Raises:
        ValueError: if a command is not known, or braces do not match.
    """
    try:
        shown = convert(tex.replace(r"\arg", r"\operatorname{arg}"), display="block" if displayed else "inline")
    except Exception as error:  # the library has many, without a common base
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if "\\" in shown:  # what is not known goes through as text
        raise ValueError(f"no such command: {shown[shown.index(chr(92)) :].partition('<')[0]}")
    return shown


def _show(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    displayed = isinstance(node, nodes.math_block)
    try:
        shown = mathml(node.astext(), displayed)
    except ValueError as error:
        logging.getLogger(__name__).warning("the formula %r cannot be shown; %s", node.astext(), error, location=node)
        shown = writer.encode(node.astext())
    writer.body.append(f'<div class="formula">{shown}</div>\n' if displayed else shown)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the renderer; `html_math_renderer` chooses it."""
    app.add_html_math_renderer("mathml", inline_renderers=(_show, None), block_renderers=(_show, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
