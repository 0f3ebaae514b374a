"""Every notebook runs from top to bottom, quickly, and is stored without its outputs."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.overlays import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(path: Path) -> dict[str, Any]:
    """The names a notebook ends with; its code cells are plain Python."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    return names


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QUICK", "1")
    logger = logging.getLogger("lightning.pytorch")  # notebooks silence it, and other tests read what it says
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_lp_sphere() -> None:
    names = run(ROOT / "notebooks" / "lp_sphere.ipynb")
    assert set(names["measured"]) == set(names["predicted"]) == set(names["LAYERS"])
    for values in (*names["measured"].values(), *names["predicted"].values()):
        assert all(a > b for a, b in itertools.pairwise(values)), "sparsity falls along p"


def test_layer_sparsity() -> None:
    names = run(ROOT / "notebooks" / "layer_sparsity.ipynb")
    before, after = names["report"].depth
    assert before == 8 == after + len(names["report"].merged)
    assert names["errors"]["merged"] == pytest.approx(names["errors"]["penalized"], rel=0.05)
    assert len(names["method"].history) == names["epochs"] + 1


def test_seeing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_SILENT", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # the notebook sets the first two itself
    names = run(ROOT / "notebooks" / "seeing.ipynb")
    assert [row["epoch"] for row in names["monitor"].history.rows] == list(range(names["epochs"]))
    assert names["best"].best_model_path
    assert len(names["reports"]) == 4
    assert names["comparison"].stat().st_size < 1_000_000
    assert list(names["runs"].rglob("*.wandb"))


@pytest.mark.filterwarnings("ignore:HyperSparse continues with", "ignore:.*has removed all of")
def test_comparing() -> None:
    names = run(ROOT / "notebooks" / "comparing.ipynb")
    assert len(names["curves"]) == 11
    assert names["dense"][0] > 80
    sizes = names["sizes"]
    for (method, sparsity, _), (_, weights) in names["runs"].items():
        kept = sum(int(weight.count_nonzero()) for weight in weights.values())
        assert kept == pytest.approx((1 - sparsity) * sum(sizes), abs=1), method
    for name, shares in names["layers"].items():
        left = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
        assert left == pytest.approx(1 - names["sparsities"][-1], abs=1e-3), name
        assert left < names["work"][name] < 0.5, "small layers, used often, are the denser ones"


def test_cka() -> None:
    names = run(ROOT / "notebooks" / "cka.ipynb")
    similar = {name: float(names["linear_cka"](names["x"], y)) for name, y in names["others"].items()}
    assert similar["rotated"] == pytest.approx(1)
    assert similar["their labels"] > 0.3 > abs(similar["the images of other samples"])
    assert len(names["maps"]["not trained, dense"].names) == 9
    weakest, strongest = (names["found"]["random", names["STRENGTHS"][i]][1] for i in (0, -1))
    assert strongest[0] < weakest[0] - 0.02


def test_export() -> None:
    pytest.importorskip("torch_pruning")
    names = run(ROOT / "notebooks" / "export.ipynb")
    assert names["change"] < 1e-5
    assert names["report"].rungs["removed"].parameters < 0.35 * names["report"].rungs["dense"].parameters
    assert names["smaller"].network.fc.in_features == names["optimizer"].param_groups[0]["params"][-2].shape[1]
