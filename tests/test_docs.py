"""The pages are in step with the code, and with each other."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import yaml

import lightning_sparse

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
ARGUMENTS = runpy.run_path(str(ROOT / "docs" / "arguments.py"))


class Parent:
    """A base.

    Args:
        start: when it starts, e.g. here (a; b). More of it.
        every: time between updates.
    """


class Child(Parent):
    """A method.

    Args:
        kind: of penalty, `a` if it matters.
        every: how often; a sentence that is so long
            that it has to end before its semicolon, or the row of the table becomes too wide; really.
    """

    def __init__(
        self,
        kind: Literal["a", "b"] | Callable[[float], float] = "a",
        *,
        start: float | Literal["now"] | str = 1 / 3,
        every: int,
    ) -> None: ...


def test_the_page_lists_the_arguments_as_they_are() -> None:
    page = ARGUMENTS["PAGE"].read_text()
    assert len(ARGUMENTS["PLACE"].findall(page)) == 1
    assert ARGUMENTS["filled"](page) == page, "run python docs/arguments.py"


def test_an_argument_is_told_by_its_signature_and_docstring() -> None:
    rows = [ARGUMENTS["row"]("Child", argument) for argument in ARGUMENTS["arguments"](Child)]
    assert [tuple(row) for row in rows] == [
        ("kind", "Child", '`"a"`', "of penalty, `a` if it matters (choices: `a`, `b`)"),
        ("start", "Child", "`0.3333`", "when it starts, e.g. here (a; b)"),
        ("every", "Child", "required", "how often"),
    ]


def test_a_shared_argument_has_a_row_per_meaning_and_default() -> None:
    uses = [("end", "A", "1", "m"), ("sparsity", "A", "0", "s"), ("end", "B", "2", "m"), ("end", "C", "2", "m")]
    lines = ARGUMENTS["shared"]([ARGUMENTS["Row"](*use) for use in uses]).splitlines()
    head = ["| methods | default | meaning |", "| --- | --- | --- |"]
    first = ["### `sparsity`", "", *head, "| `A` | 0 | s |"]
    assert lines == [*first, "", "### `end`", "", *head, "| `B`, `C` | 2 | m |", "| `A` | 1 | m |"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if target.startswith(("generated/", "../api/generated/")):
            continue  # made with the site, which says what is missing
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, anchor


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lightning_sparse.__version__


def test_the_readme_begins_with_what_decides() -> None:
    page = (ROOT / "README.md").read_text()
    first = page.partition("\n## ")[0]
    assert len(first.splitlines()) < 40
    assert [first.count(mark) for mark in ("```python", "![", "\n- **", "```bash")] == [1, 1, 3, 2]
    assert page.count(".[dev]") == 1, ".ci/run takes the test command from the line that has it"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_page_counts_the_foreign_models(page: str) -> None:
    table = (ROOT / "docs" / "models.md").read_text().partition("<!-- models -->")[2].partition("<!-- end")[0]
    models = sum(line.startswith("| ") for line in table.splitlines()) - 2
    assert re.search(rf"{models} of {models} \[?models", (ROOT / page).read_text())
