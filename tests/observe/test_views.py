"""The saved view and the report, as they would be sent: read from their serialized form, without an account."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lightning_sparse.observe.wandb as board
from lightning_sparse import MagnitudePruning
from lightning_sparse.cli import main
from lightning_sparse.observe import SparsityMonitor
from lightning_sparse.observe.views import INTRODUCTIONS, make_report, make_view, save_dashboard
from lightning_sparse.testing import fit, toy
from tests.helpers.loggers import Written

pytest.importorskip("wandb_workspaces")


def panels_of(found: Any) -> list[dict[str, Any]]:
    """Every panel anywhere in plain values."""
    if isinstance(found, dict):
        mine = [found] if "viewType" in found else []
        return mine + [panel for value in found.values() for panel in panels_of(value)]
    return [panel for value in found for panel in panels_of(value)] if isinstance(found, list) else []


def sent(model: Any) -> Any:
    """What goes over the wire."""
    return json.loads(model.model_dump_json(by_alias=True, exclude_none=True))


@pytest.fixture
def view() -> Any:
    return sent(make_view("team", "digits", "val/accuracy")._to_model().spec)


def test_the_view_has_a_panel_for_every_question(view: Any) -> None:
    sections = [section["name"] for section in view["section"]["panelBankConfig"]["sections"]]
    assert [name for name in sections if name in INTRODUCTIONS] == list(INTRODUCTIONS)
    titles = {panel["config"].get("chartTitle") for panel in panels_of(view)}
    assert {"target against actual", "churn", "dead outputs", "sparsity of each layer", "latency in ms"} <= titles


def test_the_frontier_is_by_method_with_its_seeds_as_a_band(view: Any) -> None:
    panel = next(panel for panel in panels_of(view) if "by method" in panel["config"].get("chartTitle", ""))
    config = panel["config"]
    assert panel["viewType"] == "Run History Line Plot"
    assert (config["xAxis"], config["metrics"]) == ("frontier/density", ["best/val/accuracy"])
    assert config["xLogScale"] is True
    assert config["groupBy"] == "method.value", "of the configuration"
    assert (config["groupAgg"], config["groupArea"]) == ("mean", "minmax")


def test_the_report_says_what_its_panels_show() -> None:
    report = sent(make_report("team", "digits", "val/accuracy")._to_model().spec)
    text = json.dumps(report)
    for title, introduction in INTRODUCTIONS.items():
        assert title in text
        assert introduction in text
    assert len(panels_of(report)) == len(panels_of(sent(make_view("team", "digits", "val/accuracy")._to_model().spec)))


def test_panels_show_what_is_logged(view: Any, tmp_path: Path) -> None:
    written = Written()
    fit(toy(), MagnitudePruning(0.75), SparsityMonitor(table=False, report=False), logger=written, log_every_n_steps=1)
    view = sent(make_view("team", "digits", "val_loss")._to_model().spec)
    asked: set[str] = set()
    for panel in panels_of(view):
        config = panel["config"]
        asked |= {key for key in [*config.get("metrics", []), config.get("xAxis")] if key}
    shown = {key for key in asked if not key.startswith(("export/", "trainer/", "_", "summary:"))}
    assert shown <= set(written.keys), shown - set(written.keys)
    assert len(shown) > 8


def test_the_command_saves_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb_workspaces.reports.v2 as reports
    from wandb_workspaces import workspaces

    saved: list[Any] = []

    def save(self: Any, *args: Any) -> Any:
        saved.append(self)
        return self

    for cls in (workspaces.Workspace, reports.Report):
        monkeypatch.setattr(cls, "save", save)
        monkeypatch.setattr(cls, "url", property(lambda self: f"https://{self.entity}/{self.project}"))
    main(["dashboard", "--project", "digits", "--entity", "team", "--metric", "val/loss"])
    assert capsys.readouterr().out.split() == ["https://team/digits"] * 2
    assert [type(one).__name__ for one in saved] == ["Workspace", "Report"]


def test_without_an_account_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(board, "_has_key", lambda wandb: False)
    with pytest.raises(ValueError, match="no account of Weights & Biases on this machine; `wandb login`"):
        save_dashboard("digits")
    with pytest.raises(SystemExit) as stop:
        main(["dashboard", "--project", "digits"])
    assert stop.value.code == 2
    assert "`wandb login` stores its key" in capsys.readouterr().err
