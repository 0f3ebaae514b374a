"""The entry point: `main` runs a command; a failure ends in one sentence and exit status 2."""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import TextIO

from lightning_sparse._version import __version__
from lightning_sparse.cli.completion import completion
from lightning_sparse.cli.configs import with_named_configs
from lightning_sparse.cli.dashboard import dashboard
from lightning_sparse.cli.init import init
from lightning_sparse.cli.methods import methods
from lightning_sparse.cli.refusals import sentence_of
from lightning_sparse.cli.report import report
from lightning_sparse.cli.run import SparseCLI
from lightning_sparse.cli.saved_config import with_saved_config

__all__ = ["main"]

RUN = {
    "fit": "train what a configuration describes: fit --config quickstart",
    "validate": "validate a checkpoint: validate --ckpt_path FILE",
    "test": "test a checkpoint",
    "predict": "predict with a checkpoint",
    "refit": "merge the linear layers of a checkpoint, and retrain",
    "export": "smaller and faster files: export --ckpt_path FILE --to DIR",
}
OTHERS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "report": ("compare runs side by side on one page: report RUN...", report),
    "dashboard": ("arrange a project on Weights & Biases: dashboard --project P", dashboard),
    "methods": ("list the methods, or the arguments of one: methods [NAME]", methods),
    "init": ("write configurations and a script to edit: init DIR", init),
    "completion": (
        "complete commands and options: completion bash|zsh|fish",
        lambda args: completion(args, RUN, {name: command for name, (_, command) in OTHERS.items()}),
    ),
}

TELLS = "lightning.pytorch.utilities.rank_zero"
"""The logger for messages that Lightning prints once, whatever the number of processes."""


def main(args: list[str] | None = None) -> None:
    """Entry point of `lightning-sparse`; failures end in one sentence instead of a traceback.

    Set LIGHTNING_SPARSE_TRACEBACK=1 in the environment to see the traceback.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        _run(given)
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        said = sentence_of(error)
        if said is None or os.environ.get("LIGHTNING_SPARSE_TRACEBACK", "0") != "0":
            raise
        print(f"lightning-sparse: {said}", file=sys.stderr)
        sys.exit(2)


def _run(given: list[str]) -> None:
    command = given[0] if given else "--help"
    if command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        print(f"lightning-sparse {__version__}")
    elif command in OTHERS:
        OTHERS[command][1](given[1:])
    elif command not in RUN and not command.startswith("-"):
        near = difflib.get_close_matches(command, [*RUN, *OTHERS], n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else "`lightning-sparse --help` lists them."
        raise ValueError(f"'{command}' is not a command; {remedy}")
    elif (late := next((word for word in given if word in RUN), command)) != command:
        others = [word for word in given if word != late]
        raise ValueError(f"'{command}' comes before the command; put the command first: {shlex.join([late, *others])}.")
    else:
        _find_modules_here()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python")
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec.* is deprecated")  # Lightning's own use of torch
            _prepare_log()
            SparseCLI(with_named_configs(with_saved_config(given, folder)))


def _find_modules_here() -> None:
    """Let a class path name a module in the current folder, as `python -m` does; a console script does not look there."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())


def _prepare_log() -> None:
    """Print Lightning's messages above the progress bar, and drop product recommendations."""
    logging.getLogger(TELLS).addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
    for logger in (logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")):
        logger.handlers = [_Stderr() if type(handler) is logging.StreamHandler else handler for handler in logger.handlers]


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current standard error, so that a progress bar there is not broken."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _help() -> str:
    commands = {**RUN, **{name: line for name, (line, _) in OTHERS.items()}}
    wide = max(map(len, commands)) + 2
    lines = [f"  {name:{wide}s}{line}" for name, line in commands.items()]
    return "\n".join(
        [
            "usage: lightning-sparse COMMAND ...",
            "",
            "Sparse training from the command line.",
            "",
            *lines,
            "",
            f"  {'--version':{wide}s}the version",
            f"  {'--help':{wide}s}this page; after a command, its own: fit --help",
            "",
            "test, validate, predict, refit and export find the configuration of a checkpoint",
            "in the folder of its run.",
        ]
    )
