"""Configurations by name: those that come with this package are found from any folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

import lightning_sparse
from lightning_sparse.core import first_line

__all__ = ["config_folder", "config_names", "find_config", "with_named_configs"]


def config_folder() -> Path:
    """The folder of the configurations: inside the installed package, beside it in a checkout."""
    package = Path(lightning_sparse.__file__).parent
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def config_names() -> list[str]:
    """All names that `--config` accepts, such as `quickstart` and `methods/rigl`; sweeps are for wandb."""
    folder = config_folder()
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(name for name in names if not name.startswith("sweeps/"))


def find_config(name: str) -> str:
    """The file of a configuration: the path itself if it is a file, otherwise the one of this package by that name.

    Raises:
        FileNotFoundError: if there is neither.

    Example:
        >>> Path(find_config("methods/rigl")).name
        'rigl.yaml'
    """
    if "://" in name or "\n" in name:
        return name
    if Path(name).is_file():
        _check_syntax(name)
        return name
    if Path(name).is_dir():
        raise FileNotFoundError(f"--config '{name}' is a folder; give a file in it.")
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    if (found := config_folder() / f"{plain}.yaml").is_file():
        return str(found)
    names = config_names()
    by_last_part = [known for known in names if known.rpartition("/")[2] == plain.rpartition("/")[2]]
    near = by_last_part or difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    remedy = f"did you mean '{near[0]}'?" if near else f"give a file, or one of {names}."
    raise FileNotFoundError(f"--config '{name}' is neither a file nor a configuration of lightning_sparse; {remedy}")


def _check_syntax(file: str) -> None:
    """Refuse a malformed file with a clearer message than the parser's.

    Raises:
        ValueError: if a file is not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        place = getattr(error, "problem_mark", None)
        line = f"line {place.line + 1}: " if place else ""
        raise ValueError(
            f"--config '{file}' is not YAML ({line}{getattr(error, 'problem', None) or first_line(error)}); correct it."
        ) from error
    if not isinstance(content, dict):
        held = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"--config '{file}' holds {held}; it must hold settings, such as `trainer:`, `model:` and `data:`.")


def with_named_configs(args: Sequence[str]) -> list[str]:
    """The command line with every configuration that is given by name replaced by its file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    found: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if found and found[-1] in ("-c", "--config") and not arg.startswith("-"):
            found.append(find_config(arg))
        elif flag == "--config" and equals:
            found.append(f"--config={find_config(value)}")
        else:
            found.append(arg)
    return found
