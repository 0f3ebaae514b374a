"""Every notebook runs from top to bottom, and shows what is stored in it."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.overlays import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")

CODE = runpy.run_path(str(ROOT / "notebooks" / "execute.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CLAIMS = {
    "checkpoint": """
gradual, at_once = (runs[name, 0.9] for name in ("magnitude, gradual", "magnitude, at once"))
assert gradual[1] == reference and gradual[2] > reference - 3
assert at_once[1] < 40 < 80 < at_once[2]
assert same and zeros == round(0.9 * 77_072)
assert report.rungs["compact"].bytes < 0.2 * report.rungs["plain"].bytes
""",
    "cka": """
assert abs(similar["the same images, rotated"] - 1) < 1e-6
assert similar["their labels"] > 0.3 > abs(similar["the images of other samples"])
assert len(maps["new, dense"].names) == 6
assert statistics.mean(found[0.1][1]) < statistics.mean(found[0.0][1]) - 0.05
""",
    "comparing": """
assert dense > 95 and min(mean[0] for mean in means.values()) > 90
assert all(sum(counts) == 293 for counts in left.values())
assert left["random"] == left["RigL"]
assert means["SynFlow"][-1] > means["SNIP"][-1] + 10
assert min(left["SynFlow"][3], left["HyperSparse"][3]) > max(left["SNIP"][3], left["magnitude"][3])
""",
    "export": """
assert change < 1e-5
assert report.rungs["removed"].parameters < 0.35 * report.rungs["dense"].parameters
assert smaller.network.fc.in_features == optimizer.param_groups[0]["params"][-2].shape[1]
assert float((in_onnx(images).argmax(1) == labels).float().mean()) > 0.9
""",
    "layer_sparsity": """
before, after = report.depth
assert before == 8 == after + len(report.merged)
assert abs(errors["merged"] / errors["eight layers, penalty"] - 1) < 0.05
assert errors["merged"] < 0.7 * errors["eight layers, no penalty"]
""",
    "lp_sphere": """
for values in (*measured.values(), *predicted.values()):
    assert all(a > b for a, b in zip(values, values[1:])), "sparsity falls along p"
assert min(accuracy for _, accuracy in trained.values()) > 0.95
""",
    "seeing": """
assert [row["epoch"] for row in rows] == list(range(epochs))
assert rows[int(Path(best.best_model_path).stem.split("-")[0].removeprefix("epoch="))]["phase"] == "at target"
assert len(reports) == 5
assert kept[-1][0] > 10 * kept[-1][names.index("stages.2.0.conv2")]
assert comparison.stat().st_size < 1_000_000
""",
}
"""What the text of each notebook says, as assertions that run behind its last cell."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_shows_what_is_stored(path: Path) -> None:
    if path.stem == "export":
        for package in ("onnx", "onnxruntime", "onnxscript", "torch_pruning"):
            pytest.importorskip(package)
    fresh = CODE["execute"](path, CLAIMS[path.stem])
    assert CODE["differences"](nbformat.read(path, as_version=4), fresh) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_tells_a_story(path: Path) -> None:
    assert path.stat().st_size < 250_000
    cells = json.loads(path.read_text())["cells"]
    first, *_ = texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert re.match(r"# .+\n", first)
    assert re.search(r"\*\*[^*]+\?\*\*", first), "a question at the top"
    assert texts[-1].startswith("## Answer"), "an answer at the end"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert all("text/html" not in output.get("data", {}) for output in outputs), "the page of a repository shows no HTML"
    assert not any(output.get("name") == "stderr" or output["output_type"] == "error" for output in outputs)


def notebook(*cells: str, tags: tuple[str, ...] = ()) -> Any:
    code = [nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}) for source in cells]
    return nbformat.v4.new_notebook(cells=code)


def stored(text: str, *tags: str) -> Any:
    made = notebook("", tags=tags)
    made.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return made


@pytest.mark.parametrize(
    ("tags", "before", "after", "same"),
    [
        ((), "12 weights, 3.0 s", "12 weights, 3.0 s", True),
        ((), "12 weights", "13 weights", False),
        (("approximate",), "90.1 % of 1,200", "91.0 % of  1,250", True),
        (("approximate",), "90.1 % of 1,200", "91.0 % of 1,600", False),
        (("approximate",), "90.1 %", "90.1 percent", False),
        (("varies",), "43.6 and -0.00", "80.1 and 0.01", True),
        (("varies",), "43.6 % RigL", "43.6 % SET", False),
        (("timed",), "removed: faster", "removed: no faster", True),
        (("timed",), "removed: faster", "", False),
    ],
)
def test_what_counts_as_a_difference(tags: tuple[str, ...], before: str, after: str, same: bool) -> None:
    assert (CODE["differences"](stored(before, *tags), stored(after, *tags)) == []) is same


def test_an_output_that_is_gone_or_new_is_a_difference() -> None:
    for before, after in ((stored("12"), notebook("")), (notebook(""), stored("12"))):
        (told,) = CODE["differences"](before, after)
        assert told.startswith("cell 0 shows")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\n1 / 0", r"(?s)told\.ipynb fails: .*ZeroDivisionError"),
        ("import sys\nprint('look out', file=sys.stderr)", r"told\.ipynb, cell 0 writes to the error stream: look out"),
    ],
)
def test_a_cell_that_fails_or_warns_is_named(source: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "told.ipynb"
    nbformat.write(notebook(source), path)
    with pytest.raises(RuntimeError, match=said):
        CODE["execute"](path)
