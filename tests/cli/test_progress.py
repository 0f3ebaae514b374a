"""What a terminal of 80 columns shows while a run trains, and when it is over."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from lightning_sparse import MagnitudePruning, SparsityMonitor
from lightning_sparse.cli import main
from lightning_sparse.cli.progress import OneLineBar, fitting
from lightning_sparse.cli.trainer import SparseTrainer
from lightning_sparse.core import LayerRow
from lightning_sparse.observe.table import render
from lightning_sparse.testing import Toy, loader

WIDTH = 80


class Talkative(Toy):
    """Logs more than a line holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for i in range(4):
            self.log(f"train/a_long_name_{i}", 0.25, prog_bar=True)
        self.log("x", 1.0, prog_bar=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", 0.5, prog_bar=True)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """One of 80 columns, and what it is sent."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=WIDTH, color_system=None)
    monkeypatch.setattr(rich, "_console", console)
    return file


def lines(sent: str) -> list[str]:
    """All lines that were ever shown, without what moves the cursor."""
    return [line.rstrip() for line in re.split(r"\n|\r", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", sent)) if line.strip()]


def test_the_bar_stays_on_one_line(terminal: io.StringIO) -> None:
    bar = OneLineBar(console_kwargs={"file": terminal, "force_terminal": True, "width": WIDTH, "color_system": None})
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[MagnitudePruning(0.5), SparsityMonitor(report=False), bar],
    )
    trainer.fit(Talkative(), loader(), loader())
    shown = [line for line in lines(terminal.getvalue()) if "`Trainer.fit` stopped" not in line]
    bars = [line for line in shown if re.match("Epoch|Validation|Sanity", line)]
    table = shown[shown.index(MagnitudePruning.__name__) + 1 :]
    assert max(map(len, shown)) <= WIDTH
    assert len(bars) > 4
    assert [line for line in shown[: -len(table) - 1] if line not in bars] == [], "nothing is wrapped"
    assert re.search(r"━ 4/4 +\d:\d\d:\d\d +.*train/a_long_name_0: 0.250", bars[-1]), bars[-1]
    assert "v_num" not in terminal.getvalue()
    assert all(line[0] in "┏┃┡│├└" for line in table), "the bar has ended before the table, which is whole"
    assert "whole model" in table[-2]


def test_the_command_line_has_this_bar_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])
    seen: list[list[str]] = []

    def fit(trainer: L.Trainer, *args: Any, **options: Any) -> None:
        seen.append([type(one).__name__ for one in trainer.callbacks if isinstance(one, ProgressBar)])  # type: ignore[attr-defined]

    monkeypatch.setattr(SparseTrainer, "fit", fit)
    run = ["fit", "--config=quickstart", "--beside_dense=false"]
    main(run)
    main([*run, "--trainer.callbacks+=TQDMProgressBar"])
    main([*run, "--trainer.enable_progress_bar=false"])
    assert seen == [["OneLineBar"], ["TQDMProgressBar"], []]


def test_long_names_keep_their_end(terminal: io.StringIO) -> None:
    rows = [LayerRow("model.encoder.layers.11.self_attention.query.weight", 1_234_567, 12_345_678, None)]
    rich.get_console().print(render([*rows, LayerRow("total", 1_234_567, 12_345_678, 1_234_567)], "GraNet"))
    shown = lines(terminal.getvalue())
    assert len(shown) == 1 + 3 + 1 + 1 + 1 + 1
    assert max(map(len, shown)) <= WIDTH
    assert "…" in shown[4]
    assert "attention.query.weight" in shown[4]


def test_metrics_give_way() -> None:
    assert fitting({"a": 1.0, "words": "at target"}, 100) == {"a": "1.000", "words": "at target"}
    assert fitting({"long_name": 1.0, "b": 2.0}, 10) == {"b": "2.000"}
    assert fitting({"a": 1.0}, 8) == {"a": "1.000"}
    assert fitting({"a": 1.0}, 7) == {}


def test_the_version_of_a_run_takes_no_room(tmp_path: Path) -> None:
    options: Any = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(logger=CSVLogger(tmp_path, version=7), callbacks=[OneLineBar()], **options)
    module = Talkative()
    trainer.fit(module, loader(), loader(1))
    assert ProgressBar().get_metrics(trainer, module)["v_num"] == 7
    assert OneLineBar().get_metrics(trainer, module).keys() >= {"x"}
    assert "v_num" not in OneLineBar().get_metrics(trainer, module)
