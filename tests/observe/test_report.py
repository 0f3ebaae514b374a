"""The page: everything inside, small, true to the run, and several runs side by side."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse import MagnitudePruning, RigL
from lightning_sparse.cli import main
from lightning_sparse.observe import SparsityMonitor
from lightning_sparse.observe.report import find_reports, page, picture, read_report, write_report
from lightning_sparse.observe.svg import Series, chart, heat_map
from lightning_sparse.testing import fit, toy
from tests.helpers.overlays import ROOT

VOID = {"meta"}


class Checker(HTMLParser):
    """Reads a page as a browser would: what is open, what is loaded from elsewhere, what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not checker.loads
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"<script(?! type=\"application/json\")", text)
    return checker


def trained(folder: Path, method: Any = None, **options: Any) -> Path:
    fit(toy(), *([method] if method else []), SparsityMonitor(table=False), default_root_dir=folder, **options)
    return folder / "report.html"


def test_the_page_of_a_run_says_what_it_was(tmp_path: Path) -> None:
    file = trained(tmp_path, MagnitudePruning(0.75))
    checker = check(file.read_text())
    words = " ".join(checker.words)
    for expected in (
        "MagnitudePruning on Toy (Sequential)",
        "75.00%",
        "target 75.00%",
        "of 2,796",
        "val_loss",
        "net.6",
        torch.__version__,
    ):
        assert expected in words
    assert '"sparsity": 0.75' in words, "the configuration"
    assert checker.counts["svg"] == 4 + 2 + 3  # curves, layers, masks
    [run] = read_report(file)
    assert [row["epoch"] for row in run["rows"]] == [0, 1, 2]
    assert sum(run["rows"][-1]["layers"]) == 690


def test_it_lies_beside_the_logs(tmp_path: Path) -> None:
    fit(toy(), MagnitudePruning(0.5), SparsityMonitor(table=False), logger=CSVLogger(tmp_path, version=3))
    assert (tmp_path / "lightning_logs" / "version_3" / "report.html").exists()
    fit(toy(), MagnitudePruning(0.5), SparsityMonitor(table=False, report=False), default_root_dir=tmp_path / "none")
    assert not (tmp_path / "none" / "report.html").exists()


def test_numbers_that_are_no_numbers_and_names_that_are_code(tmp_path: Path) -> None:
    [run] = read_report(trained(tmp_path, MagnitudePruning(0.5)))
    run["rows"][1]["metrics"]["val_loss"] = float("nan")
    run["rows"][2]["metrics"]["val_loss"] = float("inf")
    run["title"] = run["config"] = "</script><script>alert(1)</script>"
    text = page(run)
    check(text)
    write_report(tmp_path / "again.html", run)
    assert read_report(tmp_path / "again.html")[0]["title"] == run["title"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    files = [
        trained(tmp_path / "a", MagnitudePruning(0.5)),
        trained(tmp_path / "b", MagnitudePruning(0.75)),
        trained(tmp_path / "c", RigL(0.5)),
        trained(tmp_path / "dense"),
    ]
    assert find_reports([tmp_path]) == files
    runs = [run for file in files for run in read_report(file)]
    checker = check(page(*runs))
    words = " ".join(checker.words)
    for expected in ("4 runs", "MagnitudePruning", "RigL", "dense", "75.00%", "val_loss against sparsity"):
        assert expected in words
    assert checker.counts["tr"] == 5
    assert checker.counts["circle"] >= 4, "a point for each run"
    assert "different" not in words


def test_the_command_lays_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "a", MagnitudePruning(0.5))
    trained(tmp_path / "b", RigL(0.5))
    page_of_both = tmp_path / "both" / "page.html"
    main(["report", str(tmp_path / "a"), str(tmp_path / "b" / "report.html"), f"--output={page_of_both}"])
    assert capsys.readouterr().out.strip().endswith("page.html")
    assert len(read_report(page_of_both)) == 2
    main(["report", str(tmp_path / "a"), str(page_of_both)])
    assert len(read_report(Path("comparison.html"))) == 3


def test_different_models_and_metrics_are_said(tmp_path: Path) -> None:
    [one] = read_report(trained(tmp_path / "a", MagnitudePruning(0.5)))
    [other] = read_report(trained(tmp_path / "b", MagnitudePruning(0.5, targets=["!net.8"])))
    words = " ".join(check(page(one, other)).words)
    assert "These runs train different models or layers (Toy (Sequential)): their layers are not compared" in words
    for row in other["rows"]:
        row["metrics"] = {"score": 1.0}
    assert "These runs have no metric in common: accuracy is left out." in " ".join(check(page(one, other)).words)


@pytest.mark.parametrize(
    ("make", "sentence"), [(None, "holds no report.html; train with SparsityMonitor"), ("<p>", "is not a report of li")]
)
def test_what_is_no_run_is_refused(
    make: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if make:
        (tmp_path / "report.html").write_text(make)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def big_run(layers: int, epochs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10**5, 10**6, (layers,), generator=generator).tolist()
    kept = (torch.rand(epochs, layers, generator=generator) * 1e5).long().tolist()
    names = [f"network.blocks.{i}.attention.projection.weight" for i in range(layers)]
    same = {"phase": "dense", "zeros": 0.1234567, "churn": 0.1, "dead_outputs": 3, "parameters": 10**7, "macs": 10**9}
    rows = [
        same
        | {"epoch": e, "number": e, "step": 391 * e, "sparsity": 1 - sum(kept[e]) / sum(sizes), "layers": kept[e]}
        | {"metrics": {f"val/accuracy_{i}": 0.5 + e / 1000 for i in range(8)}}
        for e in range(epochs)
    ]
    return {
        **dict.fromkeys(("title", "name", "method", "model", "seed"), "big"),
        "metric": "val/accuracy_0",
        "target": 0.9,
        "dense": {"parameters": 10**8, "macs": 10**10},
        "layers": [
            {"name": n, "size": s, "outputs": 512, "dead": 1, "target": s // 10} for n, s in zip(names, sizes, strict=True)
        ],
        "rows": rows,
        "pictures": {name: picture(torch.rand(512, 64, 3, 3, generator=generator) < 0.5) for name in names[:3]},
        "config": "x" * 5000,
        "machine": {"command": "train"},
    }


def test_two_hundred_layers_and_three_hundred_epochs_are_small(tmp_path: Path) -> None:
    run = big_run(200, 300)
    write_report(tmp_path / "big.html", run)
    assert (tmp_path / "big.html").stat().st_size < 2_000_000
    check((tmp_path / "big.html").read_text())
    write_report(tmp_path / "many.html", *[run] * 3)
    assert (tmp_path / "many.html").stat().st_size < 5_000_000


def places(drawing: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', drawing)]


def test_points_lie_where_their_values_are() -> None:
    frame, found = Series("frame", [0, 1], [0, 1]), []
    for x, y in ((0, 0), (0.5, 0.25), (1, 1)):
        found += places(chart([frame, Series("point", [x], [y], marks=True)], "x", "y"))
    a, b, c = found
    assert (b[0] - a[0]) / (c[0] - a[0]) == pytest.approx(0.5, abs=0.01)
    assert (a[1] - b[1]) / (a[1] - c[1]) == pytest.approx(0.25, abs=0.01)
    assert a[1] > c[1], "up is more"
    assert chart([Series("nothing", [None], [1.0])], "x", "y") == ""


def test_sparsities_are_apart_by_what_is_left() -> None:
    drawing = chart(
        [Series("runs", [0.0, 0.5, 0.75, 0.9], [0.9] * 4, marks=True)], "sparsity", "y", x_percent=True, by_density=True
    )
    x = [place for place, _ in places(drawing)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert re.findall(r">([\d.]+ %)<", drawing) == ["0 %", "50 %", "80 %", "90 %"]


def test_long_curves_are_thinned() -> None:
    drawing = chart([Series("long", list(range(5000)), [float(i % 7) for i in range(5000)])], "x", "y")
    assert drawing.count("L") < 320
    drawing = heat_map(["a"], [[i % 2] for i in range(5000)], ["0", "1"])
    assert drawing.count("M") <= 150


def test_neighbors_of_one_shade_are_one_stroke() -> None:
    drawing = heat_map(["a", "b"], [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]], ["1", "3"])
    assert re.findall(r'stroke-opacity="([\d.]+)" d="([^"]*)"', drawing) == [
        ("0.00", "M0 0.5h2"),
        ("1.00", "M2 0.5h1M0 1.5h3"),
    ]


def test_no_words_of_the_page_need_another_file() -> None:
    assert (ROOT / "lightning_sparse" / "observe" / "report.css").stat().st_size < 5000
