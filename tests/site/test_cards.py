"""Every method has a page, and what a page shows comes from code and results."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lightning_sparse.cli.methods import METHODS
from tests.helpers.overlays import ROOT

sys.path.append(str(ROOT / "docs" / "extensions"))

import cards

METHOD_PAGES = {page: page.read_text() for page in (ROOT / "docs" / "methods").glob("*.md") if page.stem != "index"}
SECTIONS = ["The formula", "Arguments", "Configuration", "Cost", "Claim and finding", "Pitfalls"]


def test_every_method_has_one_page() -> None:
    titles = sorted(re.findall(r"^# (\w+)$", text, flags=re.M)[0] for text in METHOD_PAGES.values())
    assert titles == sorted(method.__name__ for method in METHODS)
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    listed = re.findall(r"\]\(([\w-]+)\.md\) \|", index)
    assert sorted(listed) == sorted(page.stem for page in METHOD_PAGES)
    assert all(f"\n{name}\n" in index for name in listed), "in a toctree"


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_a_page_has_all_parts(page: Path) -> None:
    text = METHOD_PAGES[page]
    title = re.findall(r"^# (\w+)$", text, flags=re.M)[0]
    assert re.findall(r"^## (.*)$", text, flags=re.M) == SECTIONS
    assert "**Use it when**" in text
    assert "**Choose another method when**" in text
    assert {name for _, name in re.findall(r"```\{(arguments|cost|claim|overlays|formula)\} (\w+)", text)} == {title}
    assert "```{formula}" in text or "$$" in text
    for _, name in re.findall(r"```\{(formula)\} (\w+)", text):
        assert "$$" in cards.formula(name)


def test_arguments_are_those_of_the_signature() -> None:
    table = cards.arguments_table("RigL").splitlines()
    assert table[2].startswith("| `sparsity` | `None` | The fraction removed, in [0, 1);")
    assert any("Choices:" in row or "`uniform+`" in row for row in table if row.startswith("| `allocation`"))
    for method in METHODS:
        for row in cards.arguments_table(method.__name__).splitlines():
            assert len(re.findall(r"(?<!\\)\|", re.sub(r"\$[^$]*\$", "", row))) == 4, row


def test_cost_is_read_from_the_results() -> None:
    assert cards.cost("RigL").startswith("Inside the method: **0.6%** of a training step of ResNet-18 at batch 128")
    assert "1 byte per weight" in cards.cost("RigL")
    assert "perceptron" in cards.cost("LayerSparsity")
    assert cards.cost("KeepSparsity").startswith("Inside the method: **0.3%** of a training step of ResNet-18 at batch 128")
    assert cards.cost("MovementPruning").startswith(
        "Inside the method: **2.1%** of a training step of ResNet-18 at batch 128"
    )
    assert cards.cost("QuantizationAware") == cards.NOT_MEASURED


def test_a_claim_is_that_of_the_evidence_page() -> None:
    first, second = cards.claim("RigL").split("\n- ")
    assert first == "- **Its paper claims:** beats static masks, and pruning at an equal cost."
    assert second.startswith("**Found here:** beats static masks by 1.9 at 98%")
    assert cards.claim("STR") == cards.claim("TrainableThreshold")
    assert cards.claim("KeepSparsity").startswith("No comparison")


def test_the_first_overlay_has_the_method_alone() -> None:
    text = cards.overlays("RigL")
    assert "configs/methods/rigl.yaml" in text
    assert "`methods/cka_rigl`" in text
    assert all(cards.overlays(method.__name__) for method in METHODS)


def test_a_formula_is_that_of_the_docstring() -> None:
    assert "sech^2" in cards.formula("HyperSparse")
    with pytest.raises(ValueError, match="the docstring of MagnitudePruning has no formula"):
        cards.formula("MagnitudePruning")
