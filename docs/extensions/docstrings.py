"""Docstrings hold Markdown: code in single backticks, formulas in dollars, tables. Sphinx reads reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from reference import homes
from sphinx.application import Sphinx

__all__ = ["setup", "translated"]

_CODE = re.compile(r"(?<![:`\w])`(?!`)([^`]+)`(?!`)")
_DISPLAYED = re.compile(r"^( *)\$\$(.+?)\$\$", flags=re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<![\w$])\$([^$]+)\$(?!\d)")
_TABLE = re.compile(r"(?:^ *\|.*\|\n)+", flags=re.MULTILINE)


def translated(text: str) -> str:
    """A docstring in reStructuredText; roles, directives and literals of that stay as they are."""
    parts: list[str] = []

    def aside(made: str) -> str:
        parts.append(made)
        return f"\0{len(parts) - 1}\0"

    text = _DISPLAYED.sub(lambda found: aside(_displayed(found)), text)
    text = re.sub(r"``.+?``|:[a-z:]+:`[^`]+`", lambda found: aside(found[0]), text)
    text = _CODE.sub(lambda found: aside(_code(" ".join(found[1].split()))), text)
    text = _INLINE.sub(lambda found: aside(f":math:`{' '.join(found[1].split())}`"), text)
    text = _TABLE.sub(_table, text)
    text = re.sub(r"\||\*(?=\w)|(?<=[\w)])\*", r"\\\g<0>", text)  # neither substitutions nor emphasis
    return re.sub(r"\0(\d+)\0", lambda found: parts[int(found[1])], text)


def _displayed(found: re.Match[str]) -> str:
    margin, body = found[1], [line.strip() for line in found[2].strip().splitlines()]
    return "\n".join([f"{margin}.. math::", "", *(f"{margin}   {line}" for line in body), ""])


def _code(text: str) -> str:
    """Code, and a link if it names something public; short words such as `cosine` are more often a value."""
    name = text.removesuffix("()")
    known = homes().get(name)
    return f":py:obj:`{text} <{known}>`" if known and re.search(r"[A-Z].*[a-z]|\.|._.", name) else f"``{text}``"


def _table(found: re.Match[str]) -> str:
    margin = re.match(r" *", found[0])[0]  # type: ignore[index]
    rows = [line.strip().strip("|").split("|") for line in found[0].strip().splitlines()]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell.strip()}" for i, cell in enumerate(row)]
    return "\n".join(margin + line if line else "" for line in lines) + "\n"


def _process(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = translated("\n".join(lines) + "\n").splitlines()


def setup(app: Sphinx) -> dict[str, Any]:
    """Translate each docstring before napoleon reads its sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True}
