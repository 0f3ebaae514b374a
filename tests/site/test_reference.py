"""Every public name has an entry in the API reference and a docstring; nothing is built here."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.overlays import ROOT

sys.path.append(str(ROOT / "docs" / "extensions"))

import docstrings
import reference


def described() -> list[str]:
    """The dotted names of all entries."""
    pages = "\n".join(map(reference.page, reference.PACKAGES))
    constants = re.findall(r"^\.\. py:data:: (\w+)\n   :module: (\S+)$", pages, flags=re.M)
    return re.findall(r"^\.\. auto\w+:: (\S+)$", pages, flags=re.M) + [f"{module}.{name}" for name, module in constants]


def test_every_public_package_has_a_page() -> None:
    files = [ROOT / "lightning_sparse" / "__init__.py", *(ROOT / "lightning_sparse").glob("*/__init__.py")]
    public = {".".join(file.parent.relative_to(ROOT).parts) for file in files if "__all__" in file.read_text()}
    assert set(reference.PACKAGES) == public
    listed = re.findall(r"generated/(\w+)\.rst", (ROOT / "docs" / "api" / "index.md").read_text())
    assert {package.rpartition(".")[2] for package in public} == set(listed)


@pytest.mark.parametrize("package", reference.PACKAGES)
def test_every_public_name_is_documented(package: str) -> None:
    entries = {entry.name: entry for entry in reference.entries(package)}
    public = {name for name in importlib.import_module(package).__all__ if not name.startswith("__")}
    assert set(entries) == public
    assert [name for name, entry in entries.items() if not entry.text.strip()] == [], "without a docstring"
    assert {entry.home for entry in entries.values()} <= set(described())


def test_an_object_has_one_entry() -> None:
    homes = described()
    assert len(homes) == len(set(homes))
    assert "lightning_sparse.RigL" in homes
    assert "lightning_sparse.methods.RigL" not in homes


def test_a_package_without_a_docstring_for_a_constant_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare.py").write_text('A, B = 1, 2\n"""Told."""\nC = 3\n__all__ = ["A", "B", "C"]\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(reference, "PACKAGES", ("bare",))
    assert {entry.name: entry.text for entry in reference.entries("bare")} == {"A": "Told.", "B": "Told.", "C": ""}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("a `mask`, ``kept``", "a ``mask``, ``kept``\n"),
        ("see `core.find_targets`", "see :py:obj:`core.find_targets <lightning_sparse.core.find_targets>`\n"),
        ("or `MagnitudePruning`", "or :py:obj:`MagnitudePruning <lightning_sparse.MagnitudePruning>`\n"),
        ("`cosine` or `linear`", "``cosine`` or ``linear``\n"),
        ("$\\beta$, at least 0", ":math:`\\beta`, at least 0\n"),
        ("$$ a\n   b $$", ".. math::\n\n   a\n   b\n\n"),
        ("a |w| of *args, 2 * 3", "a \\|w\\| of \\*args, 2 * 3\n"),
        ("| a | b |\n| --- | --- |\n| `c` | d |",
         ".. list-table::\n   :header-rows: 1\n\n   * - a\n     - b\n   * - ``c``\n     - d\n"),
    ],
)  # fmt: skip
def test_a_docstring_is_translated(text: str, made: str) -> None:
    assert docstrings.translated(text + "\n") == made
