"""The pages of the API reference: one per public package, made from its `__all__` whenever the site is built."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["PACKAGES", "Entry", "entries", "first_sentence", "homes", "page"]

PACKAGES = (
    "lightning_sparse",
    "lightning_sparse.observe",
    "lightning_sparse.metrics",
    "lightning_sparse.export",
    "lightning_sparse.optim",
    "lightning_sparse.testing",
    "lightning_sparse.functional",
    "lightning_sparse.core",
    "lightning_sparse.loop",
    "lightning_sparse.families",
    "lightning_sparse.methods",
    "lightning_sparse.models",
    "lightning_sparse.data",
    "lightning_sparse.cli",
)
"""All public packages, in the order of the reference. An object has its entry in the first that exports it."""


class Entry(NamedTuple):
    """One public name.

    Args:
        name: as the package exports it.
        home: the dotted name under which it is documented.
        source: the module that defines it.
        kind: `class`, `exception`, `function` or `data`.
        text: its documentation.
    """

    name: str
    home: str
    source: str
    kind: str
    text: str


@cache
def entries(package: str) -> tuple[Entry, ...]:
    """The public names of a package, in the order of the files that define them."""
    module = importlib.import_module(package)
    found = [_entry(package, name) for name in module.__all__ if not name.startswith("__")]
    imports = _imports(package)
    order = {module: number for number, module in enumerate(dict.fromkeys(imports.values()))}
    return tuple(sorted(found, key=lambda entry: (order.get(imports.get(entry.name, ""), len(order)), entry.name)))


@cache
def homes() -> dict[str, str]:
    """Names as docstrings write them, with and without their package, and where each is documented."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for entry in entries(package):
            for name in (entry.name, f"{package}.{entry.name}", f"{package.rpartition('.')[2]}.{entry.name}"):
                found.setdefault(name, entry.home)
    return found


def page(package: str, translate: Callable[[str], str] = str) -> str:
    """A page in reStructuredText: a table of all names, then each of them.

    Args:
        package: its dotted name.
        translate: makes reStructuredText of what docstrings say.
    """
    return "\n".join(_lines(package, translate)) + "\n"


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
    return re.split(r"(?<=[^.][.])\s+(?=[A-Z`])", paragraph)[0]


def _lines(package: str, translate: Callable[[str], str]) -> Iterator[str]:
    module = importlib.import_module(package)
    title = f"``{package}``"
    yield from (
        title,
        "=" * len(title),
        "",
        f".. py:module:: {package}",
        "",
        translate(first_sentence(module.__doc__ or "")),
        "",
    )
    groups: dict[str, list[Entry]] = {}
    for entry in entries(package):
        groups.setdefault(_title(package, entry), []).append(entry)
    many = len(groups) > 1 and len(entries(package)) > 40
    if not many:
        yield from _table(entries(package), translate)
    for name, group in groups.items():
        own = [entry for entry in group if entry.home == f"{package}.{entry.name}"]
        if many:
            yield from (name, "-" * len(name), "")
            yield from _table(group, translate)
        for entry in own:
            yield from _described(entry, translate)


def _table(group: Sequence[Entry], translate: Callable[[str], str]) -> Iterator[str]:
    yield from (".. list-table::", "   :widths: 35 65", "   :class: names", "")
    for entry in group:
        yield f"   * - :py:obj:`{entry.name} <{entry.home}>`"
        yield f"     - {translate(first_sentence(entry.text)).strip()}"
    yield ""


def _described(entry: Entry, translate: Callable[[str], str]) -> Iterator[str]:
    if entry.kind == "data":
        value = getattr(importlib.import_module(entry.home.rpartition(".")[0]), entry.name)
        yield from (f".. py:data:: {entry.name}", f"   :module: {entry.home.rpartition('.')[0]}", "")
        yield from (f"   {line}" for line in translate(inspect.cleandoc(entry.text)).splitlines())
        if (shown := _shown(value)) is not None:
            yield from ("", f"   ``{shown}``")
    else:
        yield f".. auto{entry.kind}:: {entry.home}"
    yield ""


def _shown(value: Any) -> str | None:
    """A value as it is written, if it is short and plain."""
    text = repr(value).replace("typing.", "")
    return text if len(text) <= 100 and " at 0x" not in text and "<function" not in text else None


def _title(package: str, entry: Entry) -> str:
    return entry.source.removeprefix(f"{package}.").partition(".")[0].replace("_", " ")


def _entry(package: str, name: str) -> Entry:
    module = importlib.import_module(package)
    value, source = getattr(module, name), _source(package, name)
    home = next((other for other in PACKAGES if _exports(other, name, value)), package)
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        text = vars(value).get("__doc__") or ""
    elif inspect.isroutine(value):
        kind, text = "function", value.__doc__ or ""
    else:
        kind, text = "data", _comments(source).get(name, "")
    return Entry(name, f"{home}.{name}", source, kind, text)


def _exports(package: str, name: str, value: Any) -> bool:
    module = importlib.import_module(package)
    return name in module.__all__ and getattr(module, name) is value


@cache
def _imports(package: str) -> dict[str, str]:
    """The module from which each name of a package is imported, nested imports too."""
    tree = ast.parse(Path(_file(importlib.import_module(package))).read_text())
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _source(package: str, name: str) -> str:
    """The module that defines a name."""
    module = _imports(package).get(name)
    return package if module is None or module == package else _source(module, name)


@cache
def _comments(module: str) -> dict[str, str]:
    """The string literals below the assignments of a module."""
    body = ast.parse(Path(_file(importlib.import_module(module))).read_text()).body
    found = {}
    for node, below in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= {name.id: below.value.value for name in names}
    return found


def _file(module: ModuleType) -> str:
    assert module.__file__ is not None
    return module.__file__
