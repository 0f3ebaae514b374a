"""Formulas become MathML, and what cannot is told."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.overlays import ROOT

pytest.importorskip("latex2mathml")
sys.path.append(str(ROOT / "docs" / "extensions"))

import formulas


def test_a_formula_is_mathml() -> None:
    shown = formulas.mathml(r"\frac{\hat w}{2} \Big( \|x\|_2 \Big)", displayed=True)
    assert 'display="block"' in shown
    for part in ("<mfrac>", "<mover", "<msub>", "&#x02016;"):
        assert part in shown
    assert "\\" not in shown


@pytest.mark.parametrize(
    ("tex", "said"), [(r"a \sofar b", r"no such command: \\sofar"), (r"\frac{1}{", "NoAvailableTokens")]
)
def test_what_cannot_be_shown_is_told(tex: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        formulas.mathml(tex, displayed=False)
