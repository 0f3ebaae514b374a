"""The page: everything inside, small, true to the run, and several runs side by side."""

from __future__ import annotations

import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse import MagnitudePruning, RigL
from lightning_sparse.cli import main
from lightning_sparse.observe import SparsityMonitor
from lightning_sparse.observe.page import page
from lightning_sparse.observe.pictures import picture
from lightning_sparse.observe.report import find_reports, read_report, why_unwritable, write_report
from lightning_sparse.testing import Toy, fit, loader, toy, trainer

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
    style = re.search(r"<style>(.*?)</style>", text, flags=re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert text.count("<script") == text.count("</script>") == 4, "data, charts, the library, and what calls it"
    return checker


def specs(text: str) -> list[dict[str, Any]]:
    """The charts of a page."""
    match = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, flags=re.S)
    assert match is not None
    return list(json.loads(match[1])["specs"].values())


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
    assert len(specs(file.read_text())) == 4 + 1, "curves, layers"
    assert file.read_text().count('class="bits"') == 3
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
    assert "dense" in words
    frontier = json.dumps(specs(page(*runs))[0])
    assert frontier.count('"series": "MagnitudePruning') == 2
    assert frontier.count('"series": "dense"') == 1, "a line of reference"
    assert "different" not in words


def test_the_command_lays_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "a", MagnitudePruning(0.5))
    trained(tmp_path / "b", RigL(0.5))
    page_of_both = tmp_path / "both.html"
    main(["report", str(tmp_path / "a"), str(tmp_path / "b" / "report.html"), f"--output={page_of_both}"])
    assert capsys.readouterr().out.strip().endswith("both.html")
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
    assert (tmp_path / "big.html").stat().st_size < 3_000_000
    check((tmp_path / "big.html").read_text())
    write_report(tmp_path / "many.html", *[run] * 3)
    assert (tmp_path / "many.html").stat().st_size < 5_000_000


class WithTest(Toy):
    """Has a test."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


def test_the_test_stands_before_the_validation_and_dense_beside_sparse(tmp_path: Path) -> None:
    module, monitor = WithTest(), SparsityMonitor(table=False)
    run = trainer(MagnitudePruning(0.75), monitor, default_root_dir=tmp_path)
    run.fit(module, loader(), loader())
    words = " ".join(check((tmp_path / "report.html").read_text()).words)
    assert "not tested" in words
    [tested] = run.test(module, loader(), verbose=False)
    monitor.beside_dense({"test_loss": 0.25})
    [saved] = read_report(tmp_path / "report.html")
    assert saved["test"] == pytest.approx(tested)
    words = " ".join(check((tmp_path / "report.html").read_text()).words)
    assert "not tested" not in words
    assert f"test loss {tested['test_loss']:.4g} the dense model has 0.25 val_loss" in words
    other = WithTest()
    run.test(other, loader(), verbose=False)
    assert read_report(tmp_path / "report.html")[0]["test"] == pytest.approx(tested), "that was another model"


def test_three_readings_of_sparsity_stand_side_by_side(tmp_path: Path) -> None:
    [run] = read_report(trained(tmp_path, MagnitudePruning(0.75)))
    run["rows"][-1]["zeros"] = 0.5
    words = " ".join(check(page(run)).words)
    assert "75.00% of the chosen weights, by masks target 75.00% exact zeros 50.00%" in words
    kept, dense = run["rows"][-1]["parameters"], run["dense"]["parameters"]
    assert f"whole model {1 - kept / dense:.2%} {kept:,} of {dense:,} parameters left" in words


def test_ten_runs_have_ten_marks_and_more_have_those_of_their_methods(tmp_path: Path) -> None:
    [run] = read_report(trained(tmp_path, MagnitudePruning(0.75)))
    runs = [run | {"seed": str(seed), "name": f"run {seed}"} for seed in range(11)]
    keys = check(page(*runs[:10]))
    assert keys.counts["button"] == 10
    assert len(set(re.findall(r'transform="translate\(17 7\) scale\(5.2\)"', page(*runs[:10])))) == 1
    marks = re.findall(r'<path d="(M[^"]+)" transform', page(*runs[:10]))
    assert len(set(marks)) == 10
    assert check(page(*runs)).counts["button"] == 1, "they are of one method"


def test_names_of_runs_are_distinct(tmp_path: Path) -> None:
    [run] = read_report(trained(tmp_path, MagnitudePruning(0.75)))
    text = page(run, run, run | {"seed": "3"})
    assert re.findall(r'data-series="([^"]+)"', text) == [
        f"MagnitudePruning 75%, {run['name']} (1)",
        f"MagnitudePruning 75%, {run['name']} (2)",
        "MagnitudePruning 75%, seed 3",
    ]


def test_no_room_for_a_report_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = toy()
    with pytest.raises(ValueError, match=r"SparsityMonitor cannot write its report into '.*file.*' .*; choose another"):
        fit(module, MagnitudePruning(0.5), SparsityMonitor(table=False), default_root_dir=tmp_path / "file" / "x")
    assert module.trainer.global_step == 0


def test_a_disk_that_is_full_in_the_end_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **options: Any) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    module = toy()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.warns(
            UserWarning, match=r"report.html' cannot be written \(No space left on device\), and the run continues"
        ):
            ended = fit(module, MagnitudePruning(0.5), SparsityMonitor(table=False), default_root_dir=tmp_path)
    assert ended.state.finished
    assert list(tmp_path.iterdir()) == [], "no half of a page"


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    monkeypatch.setattr("lightning_sparse.observe.report.page", lambda *runs: "after")
    with pytest.raises(OSError, match="Input/output error"):
        write_report(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_room_is_asked_for_before_a_report_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_unwritable(tmp_path / "not" / "there" / "yet") is None
    assert why_unwritable(Path("/dev/null/x")) == "Not a directory"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**20))
    assert why_unwritable(tmp_path) == "1.0 MB free, and 4 MB are needed"
    with pytest.raises(ValueError, match=r"cannot write its report into '.*' \(1.0 MB free, and 4 MB are needed\)"):
        trained(tmp_path, MagnitudePruning(0.75))
