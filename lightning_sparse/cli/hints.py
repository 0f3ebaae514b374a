"""One-sentence explanations of parser errors: the key, the problem, and what to write instead."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, get_type_hints

import lightning.pytorch as pl
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn, optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import lightning_sparse
import lightning_sparse.data
import lightning_sparse.models
import lightning_sparse.observe

__all__ = ["explain"]

# Wording of different versions of the parser.
_UNKNOWN_OPTION = r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected|[Uu]nrecognized arguments: -*([\w.]+)"

# Values of an argument, by the parser's name of their type.
_KINDS = {
    "dot import path": "the import path of a function",
    "<class 'float'>": "a number",
    "<class 'int'>": "an integer",
    "<class 'bool'>": "true or false",
    "Mapping": "a mapping",
    "Sequence": "a list",
    "List": "a list",
    "<class 'str'>": "text",
    "NoneType": "null",
}


def explain(message: str, options: Sequence[str] = (), cls: type | None = None) -> str:
    """One sentence from the parser's report: the key, the problem, and what to write instead.

    Args:
        message: message of the parser.
        options: options that the parser knows.
        cls: the class whose options these are; None for the command line itself.

    Example:
        >>> explain("Option 'sparsitty' is not accepted", ["sparsity", "start"])
        "'sparsitty' is not an option; did you mean 'sparsity'?"
    """
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    where = f" in {key[1]}" if key else ""
    if unknown := re.search(_UNKNOWN_OPTION, message):
        return _unknown_option(next(filter(None, unknown.groups())), options, cls)
    if ambiguous := re.search(r"ambiguous option: -*([\w.]+)\S* could match (.*)", message):
        return _unknown_option(ambiguous[1], re.findall(r"--([\w.]+)", ambiguous[2]), cls)
    # The cause is a problem of the path itself, not one that was found inside the class.
    if failed := re.search(r"Problem with given class_path '([^']+)':\s*((?!Parser key|Problem with)\S.*)", message):
        return _not_importable(failed[1], failed[2].strip(), where)
    if key and (choices := _choices(message, key[1], cls)):
        if re.search(r"Expected an? (<class 'list'>|List\b)", message):
            one = _value(message).removeprefix("=").strip("'")
            listed = f"write [{one}]" if one in choices else f"choose from {choices}"
            return f"{key[1]}{_value(message)} must be a list; {listed}."
        kinds = _kinds(message)
        if any(isinstance(choice, int) for choice in choices):  # it may be one of these numbers, not any
            kinds = kinds.removeprefix("an integer").removeprefix(" or ")
        others = f", or write {kinds}" if kinds else ""
        unknown_value = f"{value} is unknown;" if (value := _value(message)) else ":"
        return f"{key[1]}{unknown_value} choose from {choices}{others}."
    if required := re.search(r"following arguments are required: (.*)", message):
        return _required(required[1])
    if unknown := re.search(r"Expected a dot import path string: (\w+)", message):
        if key and "Expected a <class 'float'>" in message:  # or an object that holds one
            return f"{key[1]}='{unknown[1]}' must be a number."
        near = difflib.get_close_matches(unknown[1], _known_classes(key[1] if key else ""), n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else "write its import path, such as package.module.Class."
        return f"'{unknown[1]}'{where} is not a known class; {remedy}"
    if call := re.search(r"Unexpected import path format: (.+)", message):
        return (
            f"'{call[1]}'{where} is not the import path of a class; write only the class, such as MagnitudePruning, and "
            "its arguments as separate options."
        )
    if key and (base := re.search(r"not correspond to a subclass of (\w+)", message)):
        return f"{key[1]}{_value(message)} must be a subclass of {base[1]}; write the import path of one."
    if key and (kinds := _kinds(message)):
        return f"{key[1]}{_value(message)} must be {kinds}."
    noise = r"Parser key |Does not validate|Subtypes|Errors|Given value( type|: \[Namespace)|Not a valid|Expected a path but"
    lines = [line.strip(" -") for line in re.sub(r'[Pp]arser key "[^"]+":', "", message).splitlines()]
    causes = list(dict.fromkeys(line for line in lines if line and not re.match(noise, line)))
    text = re.sub(r"<class '([^']+)'>", r"\1", "; ".join(causes))
    return f"{key[1]}: {text}" if key else text


def _not_importable(path: str, cause: str, where: str) -> str:
    module, _, name = path.rpartition(".")
    top = path.partition(".")[0]
    remedy = "check the path"
    if find_spec(top) is None:
        remedy += f", and run the command in the folder that holds {top}.py"
    elif f"has no attribute '{name}'" in cause:
        near = difflib.get_close_matches(name, vars(importlib.import_module(module)), n=1, cutoff=0.5)
        remedy = f"did you mean '{module}.{near[0]}'?" if near else remedy
    elif "No module named" in cause and f"'{top}" not in cause:
        remedy = "install what it imports, or correct the import"
    return f"'{path}'{where} cannot be imported ({cause.rstrip('.')}); {remedy.rstrip('?')}{'?' if '?' in remedy else '.'}"


def _unknown_option(name: str, options: Sequence[str], cls: type | None) -> str:
    refused = getattr(cls, "refused", {})
    if cls is not None and name in refused:
        return f"{cls.__name__} does not take {name}: {refused[name]}."
    near = _nearest(name, options)
    remedy = "see --help and --print_config for all options."
    if cls is not None and issubclass(cls, Callback):
        remedy = "--trainer.callbacks.NAME sets the last callback before it, and --print_config lists all options."
    remedy = f"did you mean '{near[0]}'?" if near else remedy
    return f"'{name}' is not an option{f' of {cls.__name__}' if cls else ''}; {remedy}"


def _nearest(name: str, options: Sequence[str]) -> list[str]:
    """The option that was most likely meant: its whole name, or the last part of it, resembles what was written."""
    last = {option.rpartition(".")[2]: option for option in reversed(options)}
    begins = [option for part, option in last.items() if len(name) > 3 and "." not in name and part.startswith(f"{name}_")]
    whole = difflib.get_close_matches(name, options, n=1, cutoff=0.55)
    parts = [last[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.55)]
    return whole or begins[:1] or parts


def _required(names: str) -> str:
    """What is missing, and where it may come from."""
    missing = [name.strip().rpartition(".")[2] for name in names.split(",")]
    examples = {"model": "models/lenet300", "data": "data/digits"}
    known = [f"--config {examples[name]}" for name in missing if name in examples]
    such = f", such as {' '.join(known)}, or all of it: --config quickstart" if known else ""
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; name a configuration{such}."


def _choices(message: str, key: str, cls: type | None) -> list[Any]:
    """All choices of a `Literal`; older versions of the parser do not list them, but the class does."""
    hints = {}
    if cls is not None:
        with suppress(Exception):  # a class from elsewhere may have hints that cannot be read
            hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    found: dict[Any, None] = {}
    for choices in re.findall(r"Literal(\[[^\]]*\])", f"{message} {hints.get(key)}"):
        with suppress(ValueError, SyntaxError):  # members of an enumeration
            found.update(dict.fromkeys(ast.literal_eval(choices)))
    return list(found)


def _value(message: str) -> str:
    """The given value, if the parser reports it."""
    given = re.search(r"Got value: (.*)", message) or re.search(r"Given value: (.*)", message)
    if given is None:
        return ""
    with suppress(ValueError, SyntaxError):
        return f"={ast.literal_eval(given[1])!r}"
    return f"={given[1]!r}"


def _kinds(message: str) -> str:
    """What else is allowed beside the choices; empty if any of it is unknown here."""
    expected = [line for line in re.findall(r"Expected an? (.*)", message) if "Literal" not in line]
    found = [next((said for kind, said in _KINDS.items() if kind in line), "") for line in expected]
    if "a number" in found:
        found = [said for said in found if said != "an integer"]
    return " or ".join(said for said in dict.fromkeys(_KINDS.values()) if said in found) if all(found) else ""


KINDS_OF_CLASSES = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "callbacks": Callback,
    "logger": Logger,
    "network": nn.Module,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
}
"""The classes that a configuration can name, by key."""


def _known_classes(key: str) -> list[str]:
    """Classes that configs name without a path, or that are most likely meant."""
    base = KINDS_OF_CLASSES.get(key.rpartition(".")[2].rstrip("+"), object)
    ours = (lightning_sparse, lightning_sparse.models, lightning_sparse.data, lightning_sparse.observe)
    named = {
        name: getattr(module, name) for module in (*ours, loggers, callbacks, optim, lr_scheduler) for name in module.__all__
    }
    return [name for name, found in named.items() if _can_be_made(found) and issubclass(found, base)]


def _can_be_made(found: Any) -> bool:
    return inspect.isclass(found) and not inspect.isabstract(found)
