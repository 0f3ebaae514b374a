"""The house keeps its shape: imports point one way, and classes, overlays and the README have the same methods."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import lightning_sparse
from lightning_sparse.families import Budgeted, Masked, Pruning, Rewiring, ShadowWeights
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
    "observe": {"_version", "functional", "core", "loop", "metrics", "observe"},
    "models": {"core", "models"},
    "data": {"core", "data"},
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
        assert ours - {"_version"} <= MAY_IMPORT[folder]
    theirs = {name.split(".")[0] for name in imports(path)}
    if folder == "functional":
        assert not theirs & {"lightning", "torchmetrics", "wandb"}
    if folder in ("core", "export", "metrics", "optim"):
        assert "lightning" not in theirs
    assert "wandb" not in theirs or path == PACKAGE / "observe" / "wandb.py"


# Public names that begin with an underscore: methods of named tuples, os._exit, and our own version.
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace", "_version"}

# One file per floor may use private names of torch or Lightning, where there is no public one; it says why at its top.
MAY_USE_PRIVATES = {"core/costs.py", "loop/privates.py", "observe/checkpoint.py"}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def defined_in(cls: ast.ClassDef) -> set[str]:
    """Names that a class body defines, or assigns to itself."""
    names = {statement.name for statement in cls.body if isinstance(statement, ast.FunctionDef)}
    for node in ast.walk(cls):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def privates_of_others(tree: ast.AST) -> list[str]:
    """Where underscore names are used that the class at hand does not define, or imported."""
    found: list[str] = []

    def look(node: ast.AST, own: set[str]) -> None:
        if isinstance(node, ast.ClassDef):
            own = defined_in(node)
        names: list[Any] = []
        if isinstance(node, ast.Attribute):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            names = [] if mine else [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            paths = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names = [part for path in paths for part in path.split(".")]
        found.extend(f"line {node.lineno}: {name}" for name in names if is_private(name))  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            look(child, own)

    look(tree, set())
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(PACKAGE).as_posix() not in MAY_USE_PRIVATES],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_nobody_uses_private_names_of_others(path: Path) -> None:
    assert privates_of_others(ast.parse(path.read_text())) == []


def test_private_names_of_others_are_found() -> None:
    code = """
    from torch.nn.modules.conv import _ConvNd
    import torch.utils._pytree
    class Mine(Base):
        _declared: int
        _assigned = 1
        def _method(self):
            self._made = self._declared + self._assigned + self._made + self._method() + self.__dict__
            return self._inherited, super()._method(), other._value, pair._asdict(), getattr(other, "_by_name", None)
        class Inner:
            def _deep(self): return self._made
    """
    names = ["_ConvNd", "_pytree", "_inherited", "_method", "_value", "_by_name", "_made"]
    assert [found.split(": ")[1] for found in privates_of_others(ast.parse(textwrap.dedent(code)))] == names


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(files: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """Every module, and the modules it imports anywhere in it; what a package exports counts as the module it is from.

    Args:
        files: module -> its syntax tree.
    """
    packages = {name for name in files if any(other.startswith(f"{name}.") for other in files)}

    def resolved(module: str, name: str | None) -> set[str]:
        """Where a name of a module is defined; all that a package imports, if no name is given."""
        if name is not None and f"{module}.{name}" in files:
            return resolved(f"{module}.{name}", None)
        if module not in packages:
            return {module} & set(files)
        found: set[str] = set()
        for node in ast.walk(files[module]):
            if isinstance(node, ast.ImportFrom) and node.module in files and node.module != module:
                for alias in node.names:
                    if name in (None, alias.asname or alias.name):
                        found |= resolved(node.module, alias.name)
        return found or {module}

    graph: dict[str, set[str]] = {}
    for module, tree in files.items():
        graph[module] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    graph[module] |= resolved(str(node.module), alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    graph[module] |= resolved(alias.name, None)
    return graph


def test_no_modules_import_in_a_circle() -> None:
    files = {module_of(path): ast.parse(path.read_text()) for path in FILES}
    graph = import_graph(files)
    assert graph["lightning_sparse.export.rungs"] > {"lightning_sparse.core.costs", "lightning_sparse.export.kernels"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_circles_are_found() -> None:
    files = {
        "house": "from house.floor import door",
        "house.floor": "from house.floor.a import door",
        "house.floor.a": "def door():\n    from house.floor.b import key",
        "house.floor.b": "if TYPE_CHECKING:\n    from house.floor import door",
        "house.roof": "import house\nfrom elsewhere import door",
    }
    graph = import_graph({name: ast.parse(text) for name, text in files.items()})
    assert graph["house.floor.a"] == {"house.floor.b"}
    assert graph["house.floor.b"] == graph["house.roof"] == {"house.floor.a"}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_wandb_and_pytest_are_imported_by_those_who_use_them() -> None:
    code = "import sys, lightning_sparse.cli, lightning_sparse.testing; print({'wandb', 'pytest'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_the_package_brings_no_more_than_lightning_has_imported() -> None:
    code = (
        "import sys, lightning; before = set(sys.modules); import lightning_sparse; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(ast.literal_eval(said)) <= {"lightning", "lightning_sparse", "torch"}


def test_no_method_imports_another() -> None:
    for path in (PACKAGE / "methods").rglob("*.py"):
        own = path.relative_to(PACKAGE / "methods").parts[0].removesuffix(".py")
        siblings = {name.split(".")[2] for name in imports(path) if name.startswith("lightning_sparse.methods.")}
        assert siblings <= {own} or own == "__init__", path.name


def test_exports_overlays_and_the_readme_have_the_same_methods() -> None:
    configured = {type(callback) for path in OVERLAYS for callback in overlay(path) if isinstance(callback, Sparsifier)}
    assert configured == set(METHODS)
    named = re.findall(r"\[`(\w+)`\]\(docs/methods/", (ROOT / "README.md").read_text())
    assert sorted(named) == sorted(cls.__name__ for cls in METHODS)


@pytest.mark.parametrize("cls", METHODS)
def test_methods_are_final_and_remember_their_arguments(cls: type[Sparsifier]) -> None:
    assert getattr(cls, "__final__", sys.version_info < (3, 11))  # before that, `final` leaves no mark
    names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    assert {"targets", "name"} <= set(names)
    method = next(method for path in OVERLAYS if isinstance(method := method_of(overlay(path)), cls))
    assert set(method.config()) == set(names) - {"name"}


@pytest.mark.parametrize("cls", METHODS)
def test_every_argument_is_documented(cls: type[Sparsifier]) -> None:
    text = "\n".join(inspect.getdoc(base) or "" for base in (cls, *cls.__mro__[1:3]))
    for name in inspect.signature(cls.__init__).parameters:
        assert name == "self" or re.search(rf"^\s+{name}: ", text, flags=re.M), name


@pytest.mark.parametrize("cls", [Sparsifier, Masked, Budgeted, Pruning, Rewiring, ShadowWeights])
def test_bases_are_not_methods(cls: type) -> None:
    assert cls not in METHODS
    assert inspect.isabstract(cls) or cls in (Sparsifier, Budgeted, Masked)


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


@pytest.mark.parametrize("cls", METHODS)
def test_a_method_is_found_by_its_name(cls: type[Sparsifier]) -> None:
    """`methods/rigl.py` for `RigL`; a folder of that name where a method has parts of its own."""
    file = cls.__module__.split(".")
    assert file[:2] == ["lightning_sparse", "methods"]
    assert {part.replace("_", "") for part in file[2:]} == {cls.__name__.lower()}


@pytest.mark.parametrize("folder", ["loop", "families", "methods", "core"])
def test_pages_are_read_in_one_go(folder: str) -> None:
    lengths = {path.name: path.read_text().count("\n") for path in (PACKAGE / folder).rglob("*.py")}
    assert max(lengths.values()) <= 400, lengths
