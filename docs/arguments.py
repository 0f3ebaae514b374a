"""The tables of `guides/arguments.md`, from the signatures and docstrings of the methods: `python docs/arguments.py`."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from lightning_sparse.cli.methods import METHODS, Argument, arguments

PAGE = Path(__file__).parent / "guides" / "arguments.md"
PLACE = re.compile(r"(?<=<!-- arguments -->\n).*(?=\n<!-- end of arguments -->)", flags=re.DOTALL)


class Row(NamedTuple):
    """One argument of one method."""

    name: str
    method: str
    default: str
    meaning: str


def brief(text: str, width: int = 100) -> str:
    """The first sentence, or only what stands before its semicolon if it is long."""
    sentence = re.split(r"(?<!\.)\.(?= [A-Z`]|$)", text)[0]
    return sentence if len(sentence) <= width else re.split(r";(?![^(]*\))", sentence)[0]


def row(method: str, argument: Argument) -> Row:
    """An argument of a method as it is listed."""
    meaning, listed = brief(argument.meaning), [f"`{choice}`" for choice in argument.choices]
    if not all(choice in meaning for choice in listed):
        meaning += f" (choices: {', '.join(listed)})"
    return Row(argument.name, method, argument.default, meaning.replace("|", "\\|"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def shared(found: list[Row]) -> str:
    """Arguments that several methods have: `sparsity` first, then those of most methods; one row per meaning and default."""
    methods: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, method, default, meaning in found:
        methods[name][meaning, default].append(f"`{method}`")
    by_name = sorted(methods.items(), key=lambda item: (item[0] != "sparsity", -sum(map(len, item[1].values()))))
    parts = []
    for name, uses in by_name:
        everywhere, rows = sum(map(len, uses.values())) == len(METHODS), []
        for (meaning, default), users in sorted(uses.items(), key=lambda item: -len(item[1])):
            most = "all" if len(uses) == 1 else "all but those below"
            who = most if everywhere and 2 * len(users) > len(METHODS) else ", ".join(users)
            rows.append([who, default, meaning])
        parts.append(f"### `{name}`\n\n{table(['methods', 'default', 'meaning'], rows)}")
    return "\n\n".join(parts)


def own(found: list[Row]) -> str:
    """Arguments that one method has, by method."""
    rows = defaultdict(list)
    for name, method, default, meaning in found:
        rows[method].append([f"`{name}`", default, meaning])
    return "\n\n".join(f"### `{method}`\n\n{table(['argument', 'default', 'meaning'], rows[method])}" for method in rows)


def tables() -> str:
    """Both tables, as the page shows them."""
    found = [row(method.__name__, argument) for method in METHODS for argument in arguments(method)]
    names = [argument.name for argument in found]
    common = [argument for argument in found if names.count(argument.name) > 1]
    rest = [argument for argument in found if names.count(argument.name) == 1]
    return f"{shared(common)}\n\n## Arguments of single methods\n\n{own(rest)}"


def filled(page: str) -> str:
    """The page with the tables as the code has them."""
    return PLACE.sub(lambda _: f"\n{tables()}\n", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
