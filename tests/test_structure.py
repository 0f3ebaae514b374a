"""The house keeps its shape: imports point one way, and classes, overlays and README rows are the same methods."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_sparse
from lightning_sparse.families import Masked, Pruning, Rewiring, ShadowWeights
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import method_of
from tests.helpers.overlays import OVERLAYS, ROOT, overlay

PACKAGE = ROOT / "lightning_sparse"
BELOW = ["functional", "core", "loop", "families", "methods"]
MAY_IMPORT = {
    **{floor: set(BELOW[: height + 1]) for height, floor in enumerate(BELOW)},
    "metrics": {"functional", "core", "metrics"},
    "export": {"functional", "core", "export"},
    "optim": {"functional", "core", "optim"},
    "observe": {"functional", "core", "loop", "metrics", "observe"},
    "models": {"models"},
    "data": {"data"},
    "testing": {"core", "data", "functional", "loop", "testing"},
}
EXPORTS = [getattr(lightning_sparse, name) for name in lightning_sparse.__all__]
METHODS = [cls for cls in EXPORTS if inspect.isclass(cls) and issubclass(cls, Sparsifier)]
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("lightning_sparse.")}
    if folder in MAY_IMPORT:
        assert ours <= MAY_IMPORT[folder]
    theirs = {name.split(".")[0] for name in imports(path)}
    if folder == "functional":
        assert not theirs & {"lightning", "torchmetrics", "wandb"}
    if folder in ("core", "export", "metrics", "optim"):
        assert "lightning" not in theirs
    assert "wandb" not in theirs or path == PACKAGE / "observe" / "wandb.py"


def test_wandb_and_pytest_are_imported_by_those_who_use_them() -> None:
    code = "import sys, lightning_sparse.cli, lightning_sparse.testing; print({'wandb', 'pytest'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_no_method_imports_another() -> None:
    for path in (PACKAGE / "methods").rglob("*.py"):
        own = path.relative_to(PACKAGE / "methods").parts[0].removesuffix(".py")
        siblings = {name.split(".")[2] for name in imports(path) if name.startswith("lightning_sparse.methods.")}
        assert siblings <= {own} or own == "__init__", path.name


def test_exports_overlays_and_readme_rows_are_the_same_methods() -> None:
    configured = {type(callback) for path in OVERLAYS for callback in overlay(path) if isinstance(callback, Sparsifier)}
    assert configured == set(METHODS)
    rows = set(re.findall(r"^\| `([A-Z]\w+)` \|", (ROOT / "README.md").read_text(), flags=re.M))
    assert rows == {cls.__name__ for cls in METHODS}


@pytest.mark.parametrize("cls", METHODS)
def test_methods_are_final_and_remember_their_arguments(cls: type[Sparsifier]) -> None:
    assert getattr(cls, "__final__", False)
    names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    assert {"targets", "name"} <= set(names)
    method = next(method for path in OVERLAYS if isinstance(method := method_of(overlay(path)), cls))
    assert set(method.config()) == set(names) - {"name"}


@pytest.mark.parametrize("cls", METHODS)
def test_every_argument_is_documented(cls: type[Sparsifier]) -> None:
    text = "\n".join(inspect.getdoc(base) or "" for base in (cls, *cls.__mro__[1:3]))
    for name in inspect.signature(cls.__init__).parameters:
        assert name == "self" or re.search(rf"^\s+{name}: ", text, flags=re.M), name


@pytest.mark.parametrize("cls", [Sparsifier, Masked, Pruning, Rewiring, ShadowWeights])
def test_bases_are_not_methods(cls: type) -> None:
    assert cls not in METHODS
    assert cls is Sparsifier or inspect.isabstract(cls)


def test_nothing_tracked_is_large_or_knows_a_machine() -> None:
    for path in [*FILES, *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text()
        assert text.count("\n") < 520, path
        assert "/" + "work/" not in text, path


# ---- the tests ------------------------------------------------------------------------------------------------------


def test_what_tests_share_lives_in_helpers() -> None:
    """Whoever imports one test module from another runs its tests twice, or breaks when it moves."""
    for path in (ROOT / "tests").rglob("*.py"):
        shared = {name for name in imports(path) if name.split(".")[0] == "tests" or name.startswith("test_")}
        assert all(name.startswith("tests.helpers") for name in shared), (path, shared)


def test_pytest_is_imported_by_one_file_of_the_package() -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in FILES if "pytest" in imports(path)}
    assert users == {"testing/suite.py"}
