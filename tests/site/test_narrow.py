"""Pages on narrow screens: names break between words, and every figure has a text in its place."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.overlays import ROOT

pytest.importorskip("sphinx")
sys.path.append(str(ROOT / "docs" / "extensions"))

import narrow
from docutils import nodes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("SparseConnectivityLearning", ["Sparse", "Connectivity", "Learning"]),
        ("CKARegularization", ["CKARegularization"]),
        ("SparseGPT", ["SparseGPT"]),
        ("learning_rate_schedule", ["learning_", "rate_", "schedule"]),
        ("core.find_targets", ["core.", "find_", "targets"]),
        ("structure=&quot;2:4&quot;", ["structure=", "&quot;2:4&quot;"]),
        ("HyperSparse(penalty=1)", ["Hyper", "Sparse(", "penalty=", "1)"]),
        ("(&quot;*&quot;,)", ["(&quot;*&quot;,)"]),
        ("amount=0.9", ["amount=", "0.9"]),
        ("...", ["..."]),
        ("compact", ["compact"]),
    ],
)
def test_a_name_breaks_between_words(name: str, parts: list[str]) -> None:
    assert narrow.breakable(name).split("<wbr>") == parts


def test_names_break_in_titles_and_cells_only() -> None:
    code = '<code><span class="pre">LayerSparsity</span></code>'
    option = '<code><span class="pre">--fold=true</span></code>'
    context: dict[str, Any] = {
        "body": f"<h1>WeightPenalty<a>#</a></h1><p>{code} {option}</p><td>{code} {option}</td>",
        "prev": None,
        "next": {"title": code},
    }
    narrow.break_names(SimpleNamespace(), "page", "page.html", context, None)
    broken, whole = code.replace("LayerS", "Layer<wbr>S"), option.replace("pre", "pre option")
    assert context["body"] == f"<h1>Weight<wbr>Penalty<a>#</a></h1><p>{code} {whole}</p><td>{broken} {whole}</td>"
    assert context["next"]["title"] == broken


@pytest.mark.parametrize(
    ("header", "classes"),
    [
        (["argument", "default", "meaning"], ["arguments"]),
        (["use", "why", "then"], []),
        (["a", "b", "c", "d", "e"], ["wide"]),
    ],
)
def test_tables_are_marked_by_their_header(header: list[str], classes: list[str]) -> None:
    row = nodes.row("", *(nodes.entry("", nodes.paragraph("", title)) for title in header))
    page = nodes.section("", nodes.table("", nodes.tgroup("", nodes.thead("", row))))
    narrow.mark(SimpleNamespace(), page, "page")
    assert page[0]["classes"] == classes


def test_an_image_alone_in_its_paragraph_is_a_figure() -> None:
    alone, beside = nodes.paragraph("", "", nodes.image()), nodes.paragraph("", "", nodes.Text("see"), nodes.image())
    narrow.mark(SimpleNamespace(), nodes.section("", alone, beside), "page")
    assert (alone["classes"], beside["classes"]) == (["picture"], [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_images_have_a_text_without_code(page: Any) -> None:
    """Code in it would be left out of the page."""
    for text in re.findall(r"!\[([^]]*)\]\(", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        assert len(text) > 10, text
        assert "`" not in text, text


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_figures_of_notebooks_have_a_text(notebook: Any) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    figures = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))]
    assert figures
    for cell in figures:
        text = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(text) > 10, "give the cell the metadata {'mystnb': {'image': {'alt': TEXT}}}\n" + "".join(cell["source"])
