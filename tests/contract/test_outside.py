"""The contract in somebody else's package: none of these tests' files, and no setting but that warnings are errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.overlays import ROOT

METHOD = """
from lightning_sparse import CKARegularization
from lightning_sparse.families import Pruning
from lightning_sparse.functional import magnitude


class MyMethod(Pruning):
    def score(self, name, weight):
        return magnitude(weight)


class Broken(MyMethod):
    def silence(self, step):
        pass

"""


def test_the_classes_of_the_guide(tmp_path: Path) -> None:
    chapter = (ROOT / "docs" / "guides" / "your-own-method.md").read_text().split("## Test it")[1]
    single, several = re.findall(r"```python\n(.*?)```", chapter, flags=re.S)
    several = several.replace("TestMyMethod", "TestSeveral").replace("lambda: MyMethod(0.9),", "lambda: Broken(0.9),")
    (tmp_path / "test_mine.py").write_text(METHOD + single + several)
    only = "TestMyMethod and (1-target-sgd or 5-ranks) or TestSeveral and (2-zeros-adam or 6-micro-batches)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}  # of older Lightnings
    command = [sys.executable, "-m", "pytest", "-rs", "-W", "error", "-p", "no:cacheprovider", "-k", only]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300).stdout
    assert "2 failed, 5 passed, 1 skipped" in said, said
    assert "AssertionError: 2-zeros-adam: Seen at batch end" in said
    assert "similarity is not additive" in said
    assert {path.name for path in tmp_path.iterdir()} <= {"test_mine.py", "__pycache__"}, "something else was written"
