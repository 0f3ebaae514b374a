"""The page on models is in step with the zoo."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from lightning_sparse.core import find_targets, layers
from tests.helpers.overlays import ROOT

PAGE = ROOT / "docs" / "models.md"


def test_the_page_lists_the_zoo_as_it_is() -> None:
    models: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "models.py"))
    page = PAGE.read_text()
    assert len(models["PLACE"].findall(page)) == 1
    assert models["filled"](page) == page, "run python docs/models.py"


def test_its_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LAYER_KINDS", [*layers.LAYER_KINDS])
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(code, names)
    (target,) = find_targets(names["Projection"](4, 3, 2))
    assert (target.outputs, len(target.matrices())) == (8, 4)
