"""Three hundred mistakes, drawn with a seed: each ends in one sentence, none in a traceback, none is accepted.

`python -m tests.fuzz.test_fuzz` prints the sentences, for who reads them.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_sparse.cli import main
from lightning_sparse.cli.refusals import OURS
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import Toy, fit
from tests.fuzz.draws import command_lines, constructions, files

SEED, COMMANDS, METHODS = 0, 180, 120
LINES = list(command_lines(COMMANDS, random.Random(SEED)))
MADE = list(constructions(METHODS, random.Random(SEED)))
UNCLEAR = r"Traceback|object at 0x|NoneType|Namespace\(|<class|Union|Literal|typing\."


def said_on_the_command_line(args: list[str]) -> str:
    """The sentence, or what came instead of it."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(["fit", *args])
    except SystemExit as stop:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("lightning-sparse: ")]
        one = stop.code == 2 and len(lines) == 1 and err.getvalue().strip().endswith(lines[0])
        return lines[0] if one else f"EXIT {stop.code} WITH {err.getvalue().strip()[-300:]}"
    except BaseException as error:
        return a_traceback(error)
    return "ACCEPTED"


def a_traceback(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"TRACEBACK {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def said_in_python(method: type[Sparsifier], arguments: dict[str, Any]) -> str:
    """The sentence, at construction or at the start of a fit, or what came instead of it."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(Toy(), method(**arguments), max_epochs=1, limit_val_batches=0)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = isinstance(error, ValueError) and last.filename.startswith(OURS)
        return str(error) if ours else a_traceback(error)
    return "ACCEPTED"


def is_a_sentence(said: str) -> bool:
    wrong = said.startswith(("TRACEBACK", "EXIT", "ACCEPTED")) or re.search(UNCLEAR, said)
    return not wrong and "\n" not in said and said.endswith((".", "?")) and len(said) < 450


@pytest.fixture(autouse=True)
def _files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])
    for name, text in files().items():
        Path(name).write_text(text)


def test_a_mistake_on_the_command_line_is_one_sentence() -> None:
    said = {" ".join(args[-2:]): said_on_the_command_line(args) for args in LINES}
    assert len(said) > 0.9 * COMMANDS
    assert [(args, text) for args, text in said.items() if not is_a_sentence(text)] == []


def test_a_mistake_in_python_is_one_sentence() -> None:
    said = [(method.__name__, arguments, said_in_python(method, arguments)) for method, arguments in MADE]
    assert [row for row in said if not is_a_sentence(row[2])] == []


if __name__ == "__main__":
    sys.argv = ["lightning-sparse"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, text in files().items():
            Path(name).write_text(text)
        for args in LINES:
            text = said_on_the_command_line(args)
            print("  " if is_a_sentence(text) else "? ", " ".join(args[-2:]), "\n      ", text, flush=True)
        for method, arguments in MADE:
            text = said_in_python(method, arguments)
            print("  " if is_a_sentence(text) else "? ", method.__name__, arguments, "\n      ", text, flush=True)
