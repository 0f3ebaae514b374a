"""The report as a browser shows it, on a desk and on a phone, by day and by night; pictures go where REPORT_PICTURES says.

`REPORT_PICTURES=pictures python -m pytest tests/observe/test_browser.py` leaves them there for whoever wants to look.
"""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sparse.observe.pictures import picture
from lightning_sparse.observe.report import write_report
from tests.helpers.browser import CHROMIUM, look

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

SCRIPT = (Path(__file__).parents[1] / "helpers" / "look.js").read_text()


def run(method: str, sparsity: float, seed: int = 0, layers: int = 9, epochs: int = 30) -> dict[str, Any]:
    """A run that never was."""
    noise = random.Random(f"{method} {sparsity} {seed}")
    sizes = [144 if i == 0 else 2304 * 2 ** (i // 3) for i in range(layers)]
    rows = []
    for epoch in range(epochs):
        done = 1.0 if method in ("RigL", "SET") else min(1.0, (epoch + 1) / (0.7 * epochs))
        now = sparsity * (1 - (1 - done) ** 3)
        kept = [round(size * (1 - now * min(1.0, 0.5 + 0.08 * i))) for i, size in enumerate(sizes)]
        accuracy = 0.985 - 0.5 * math.exp(-epoch / 3) - 0.04 * max(0.0, sparsity - 0.85) / 0.15 + noise.gauss(0, 0.003)
        rows.append(
            {"epoch": epoch, "number": epoch, "step": 21 * epoch, "phase": "at target" if done == 1 else "sparsifying"}
            | {"sparsity": 1 - sum(kept) / sum(sizes), "zeros": 1 - sum(kept) / sum(sizes), "churn": 0.3 * (1 - done)}
            | {"dead_outputs": 2, "parameters": sum(kept) + 700, "macs": 40 * sum(kept), "layers": kept}
            | {"metrics": {"val/accuracy": accuracy, "val/loss": 2 * math.exp(-epoch / 5)}}
        )
    names = [f"network.stages.{i // 3}.{i % 3}.conv{i % 2 + 1}.weight" for i in range(layers)]
    mask = picture(torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)) > sparsity)
    return {
        "title": f"{method} on Classifier (ResNet)",
        "name": f"runs/{method.lower()}_{sparsity:g}_{seed}",
        "method": method,
        "model": "Classifier (ResNet)",
        "seed": str(seed),
        "metric": "val/accuracy",
        "target": sparsity,
        "dense": {"parameters": sum(sizes) + 700, "macs": 40 * sum(sizes), "test": {"test/accuracy": 0.987}},
        "test": {"test/accuracy": rows[-1]["metrics"]["val/accuracy"] - 0.01},
        "layers": [
            {"name": name, "size": size, "outputs": 16, "dead": i % 2, "target": None if i % 2 else rows[-1]["layers"][i]}
            for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        ],
        "rows": rows,
        "pictures": dict.fromkeys(names[:3], mask),
        "config": "seed_everything: 1\ntrainer:\n  max_epochs: 30",
        "machine": {"command": f"lightning-sparse fit --config {'a-long-name/' * 12}run.yaml", "python": "3.11.7"},
    }


METHODS = ["MagnitudePruning", "RigL", "SET", "GraNet", "HyperSparse", "SNIP", "GraSP", "SynFlow", "STR", "LotteryTicket"]
LEVELS = (0.8, 0.9, 0.95, 0.98)
PAGES = {
    "one": [run("MagnitudePruning", 0.95)],
    "ten": [run(method, LEVELS[i % 4]) for i, method in enumerate(METHODS)],
    "many": [run(method, sparsity, seed) for method in METHODS[:4] for sparsity in LEVELS for seed in range(3)],
    "deep": [run("RigL", 0.9, layers=60)],
}


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [
        *[("one", width, theme) for width in (1280, 390) for theme in ("light", "dark")],
        ("ten", 390, "dark"),
        ("ten", 1280, "light"),
        ("many", 1280, "dark"),
        ("many", 390, "light"),
        ("deep", 390, "light"),
    ],
)
def test_a_page_is_whole_and_readable(name: str, width: int, theme: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report(page, *PAGES[name])
    shown = os.environ.get("REPORT_PICTURES")
    found = look(page, SCRIPT, width, 2400 if width > 500 else 4200, theme)
    if shown:
        Path(shown).mkdir(exist_ok=True, parents=True)
        height = min(found["high"], 6000)
        look(page, "return {}", width, height, theme, Path(shown).resolve() / f"{name}-{width}-{theme}.png")
    assert found["failed"] == "0", "every chart is drawn"
    assert found["background"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 30)"}[theme]
    assert found["texts"] > 40
    assert found["least"][0] >= 4.5, found["least"]
    assert found["cut"] == []
    assert found["unmarked"] == 0
    assert found["widest"] <= width
    if name in ("one", "deep"):
        assert found["counts"]
        assert all(" of " in str(count) for count in found["counts"]), "how much is left of each layer is in sight"
    if name == "deep":
        assert found["scrolling"]
    assert "epoch" in found["said"] or "sparsity" in found["said"], "values on hover"


def test_a_figure_alone_is_of_a_sane_size(tmp_path: Path) -> None:
    runs = [run("RigL", 0.9), run("SET", 0.9)]
    for one, metric in zip(runs, ("val/a", "val/b"), strict=True):
        one["metric"] = metric
        for row in one["rows"]:
            row["metrics"] = {metric: 0.5}
    write_report(tmp_path / "page.html", *runs)
    found = look(
        tmp_path / "page.html", 'return {figure: page.querySelector(".grid svg").getBoundingClientRect().width}', 1280, 2000
    )
    assert 400 < found["figure"] <= 680
