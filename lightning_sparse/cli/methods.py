"""`lightning-sparse methods [NAME]`: all methods, or the arguments of one; read from signatures and docstrings."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

import lightning_sparse
from lightning_sparse.cli.configs import config_folder, config_names
from lightning_sparse.loop import Sparsifier

__all__ = ["METHODS", "Argument", "arguments", "methods"]

_EXPORTS = [getattr(lightning_sparse, name) for name in lightning_sparse.__all__]
METHODS: list[type[Sparsifier]] = [cls for cls in _EXPORTS if inspect.isclass(cls) and issubclass(cls, Sparsifier)]
WIDTH = 80


class Argument(NamedTuple):
    """One argument of one method.

    Args:
        name: its name in Python.
        default: its default in Python; `required` without one.
        meaning: what it does and its range, from the docstring.
        choices: all strings that it accepts, if it accepts no others.
    """

    name: str
    default: str
    meaning: str
    choices: list[str]


def arguments(method: type) -> Iterator[Argument]:
    """The arguments of a method, in order."""
    hints, texts = get_type_hints(method.__init__), _described(method)  # type: ignore[misc]
    for name, parameter in inspect.signature(method).parameters.items():
        yield Argument(name, _shown(parameter.default), texts[name], _choices(hints[name]))


def methods(args: list[str]) -> None:
    """List the methods, or the arguments of one."""
    parser = argparse.ArgumentParser("lightning-sparse methods", description="List the methods, or the arguments of one.")
    parser.add_argument(
        "name", nargs="?", help="show the arguments of this method with their ranges, its source, and its configurations"
    )
    name = parser.parse_args(args).name
    if name is None:
        _list()
        return
    known = {method.__name__.lower(): method for method in METHODS}
    if (method := known.get(name.lower().replace("_", ""))) is None:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        remedy = f"did you mean '{known[near[0]].__name__}'?" if near else "`lightning-sparse methods` lists them."
        raise ValueError(f"'{name}' is not a method; {remedy}")
    _describe(method)


def _list() -> None:
    wide = max(len(method.__name__) for method in METHODS) + 2
    for method in METHODS:
        line = _first_sentence(method)
        print(f"{method.__name__:{wide}s}{textwrap.shorten(line, WIDTH - wide, placeholder=' ...')}")
    print("\nArguments of a method: lightning-sparse methods NAME")


def _describe(method: type[Sparsifier]) -> None:
    page = inspect.cleandoc(method.__doc__ or "")
    source = re.search(r"^Sources?: .*?https?://\S+?(?=[,.;)]*(?:\s|$))", page, flags=re.M | re.S)
    print(textwrap.fill(f"{method.__name__}: {_first_sentence(method)}", WIDTH), end="\n\n")
    for name, default, meaning, choices in arguments(method):
        print(f"  {name}={default.strip('`')}" if default != "required" else f"  {name} (required)")
        if not all(f"`{choice}`" in meaning for choice in choices):
            meaning += f"; one of {', '.join(choices)}"
        print(textwrap.fill(meaning.replace("`", ""), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    print()
    if source:
        print(textwrap.fill(" ".join(source[0].split()), WIDTH, break_long_words=False, break_on_hyphens=False))
    for name in _configurations(method):
        print(f"Configuration: --config {name}")
    print(f"In Python: help(lightning_sparse.{method.__name__})")


def _first_sentence(method: type) -> str:
    text = " ".join(inspect.cleandoc(method.__doc__ or "").partition("\n\n")[0].split())
    return re.sub(r"`", "", text)


def _configurations(method: type) -> list[str]:
    """The overlays that contain this method."""
    found = []
    for name in config_names():
        if name.startswith("methods/"):
            config = yaml.safe_load((config_folder() / f"{name}.yaml").read_text())
            classes = [entry["class_path"].rpartition(".")[2] for entry in config["trainer"]["callbacks+"]]
            found += [name] if method.__name__ in classes else []
    return found


def _choices(hint: Any) -> list[str]:
    """All strings that a type lists, in order; none if it accepts any string."""
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if isinstance(choice, str)]
    parts = get_args(hint)
    return [] if str in parts else [choice for part in parts for choice in _choices(part)]


def _described(method: type) -> dict[str, str]:
    """The descriptions of arguments in the docstrings of a class and its bases; the first one counts."""
    found: dict[str, str] = {}
    for base in method.__mro__:
        section = re.search(r"^Args:\n((?: .*\n?|\n)+)", inspect.cleandoc(base.__doc__ or ""), flags=re.M)
        entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1], flags=re.M) if section else []
        found = dict(entries) | found
    return {name: " ".join(text.split()) for name, text in found.items()}


def _shown(default: Any) -> str:
    """A default as written in Python, with few digits."""
    if default is inspect.Parameter.empty:
        return "required"
    return f"`{default:.4g}`" if isinstance(default, float) else f"`{default!r}`".replace("'", '"')
