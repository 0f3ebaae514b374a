"""The guide's tables of arguments, from the signatures and docstrings of the methods: `python docs/arguments.py`."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import lightning_sparse
from lightning_sparse.loop import Sparsifier

PAGE = Path(__file__).parent / "guide.md"
PLACE = re.compile(r"(?<=<!-- arguments -->\n).*(?=\n<!-- end of arguments -->)", flags=re.DOTALL)
EXPORTS = [getattr(lightning_sparse, name) for name in lightning_sparse.__all__]
METHODS = [export for export in EXPORTS if inspect.isclass(export) and issubclass(export, Sparsifier)]


class Argument(NamedTuple):
    """One argument of one method."""

    name: str
    method: str
    default: str
    meaning: str


def choices(hint: Any) -> list[str]:
    """All strings that a type lists, in order; none where it takes any other string too."""
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if isinstance(choice, str)]
    parts = get_args(hint)
    return [] if str in parts else [choice for part in parts for choice in choices(part)]


def described(method: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each argument; the first to mention it counts."""
    found: dict[str, str] = {}
    for base in method.__mro__:
        section = re.search(r"^Args:\n((?: .*\n?|\n)+)", inspect.cleandoc(base.__doc__ or ""), flags=re.M)
        entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1], flags=re.M) if section else []
        found = dict(entries) | found
    return {name: " ".join(text.split()) for name, text in found.items()}


def brief(text: str, width: int = 100) -> str:
    """The first sentence, or only what stands before its semicolon if it is long."""
    sentence = re.split(r"(?<!\.)\.(?= [A-Z`]|$)", text)[0]
    return sentence if len(sentence) <= width else re.split(r";(?![^(]*\))", sentence)[0]


def arguments(method: type) -> Iterator[Argument]:
    """The arguments of a method, in order."""
    hints, texts = get_type_hints(method.__init__), described(method)
    for name, parameter in inspect.signature(method).parameters.items():
        meaning = brief(texts[name])
        listed = [f"`{choice}`" for choice in choices(hints[name])]
        if not all(choice in meaning for choice in listed):
            meaning += f" (choices: {', '.join(listed)})"
        yield Argument(name, method.__name__, shown(parameter.default), meaning.replace("|", "\\|"))


def shown(default: Any) -> str:
    """A default as it is written in Python, with few digits."""
    if default is inspect.Parameter.empty:
        return "required"
    return f"`{default:.4g}`" if isinstance(default, float) else f"`{default!r}`".replace("'", '"')


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, in which a first cell that repeats the one above is left empty."""
    above = ["", *(row[0] for row in rows)]
    body = [["" if row[0] == before else row[0], *row[1:]] for row, before in zip(rows, above, strict=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])


def shared(found: list[Argument]) -> str:
    """Arguments that several methods have: `sparsity` first, then those of most methods; one row per meaning and default."""
    methods: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, method, default, meaning in found:
        methods[name][meaning, default].append(f"`{method}`")
    by_name = sorted(methods.items(), key=lambda item: (item[0] != "sparsity", -sum(map(len, item[1].values()))))
    rows = []
    for name, uses in by_name:
        everywhere = sum(map(len, uses.values())) == len(METHODS)
        for (meaning, default), users in sorted(uses.items(), key=lambda item: -len(item[1])):
            most = "all" if len(uses) == 1 else "all but those below"
            who = most if everywhere and 2 * len(users) > len(METHODS) else ", ".join(users)
            rows.append([f"`{name}`", default, who, meaning])
    return table(["argument", "default", "methods", "meaning"], rows)


def own(found: list[Argument]) -> str:
    """Arguments that one method has, by method."""
    rows = [[f"`{method}`", f"`{name}`", default, meaning] for name, method, default, meaning in found]
    return table(["method", "argument", "default", "meaning"], rows)


def tables() -> str:
    """Both tables, as they belong into the guide."""
    found = [argument for method in METHODS for argument in arguments(method)]
    names = [argument.name for argument in found]
    common = [argument for argument in found if names.count(argument.name) > 1]
    rest = [argument for argument in found if names.count(argument.name) == 1]
    return f"{shared(common)}\n\nArguments that only one method has:\n\n{own(rest)}"


def filled(page: str) -> str:
    """The page with the tables as the code has them."""
    return PLACE.sub(lambda _: f"\n{tables()}\n", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
