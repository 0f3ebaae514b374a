"""The examples run, and what they have found is not computed again."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.overlays import ROOT


@pytest.fixture
def language_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the example with a handful of windows and steps, and returns what it has written."""
    file = ROOT / "examples" / "finetune_lm.py"

    def run(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
        example = runpy.run_path(str(file))
        code = example["main"].__globals__
        windows = code["windows"]
        code["windows"] = lambda validation: windows(validation)[: 16 if validation else 64]
        code["AFTER"] = (0, 20)
        out = tmp_path / "results.jsonl"
        monkeypatch.setattr(sys, "argv", [str(file), "--quick", "--steps=40", f"--out={out}"])
        example["main"]()
        return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("ignore:.*`training_step` returned")
def test_a_language_model(language_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines, out = language_model(capsys)
    assert len(lines) == 1 + 2 * 2 * 3
    assert {line["method"] for line in lines} == {"dense", "magnitude", "Wanda", "SparseGPT"}
    assert all(set(line["perplexity"]) == {"0", "1"} for line in lines if line["method"] != "dense")
    assert "| 2:4 | SparseGPT | yes |" in out
    again, out = language_model(capsys)
    assert again == lines
    assert "seconds" not in out


def test_the_page_lists_every_example() -> None:
    folder = ROOT / "examples"
    listed = re.findall(r"\| \[`(\w+\.py)`\]", (folder / "README.md").read_text())
    assert sorted(listed) == sorted(file.name for file in folder.glob("*.py"))


def run(name: str, folder: Path, *options: str) -> str:
    """What an example prints in a process of its own."""
    command = [sys.executable, str(ROOT / "examples" / name), "--quick", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_image_classifier(tmp_path: Path) -> None:
    assert "| SparseGPT, with its dense self as a teacher |" in run("finetune_timm.py", tmp_path)


def test_a_large_model_on_two_ranks_and_then_on_one(tmp_path: Path) -> None:
    run("large_model.py", tmp_path, "--devices=2")
    assert "The plain decoder holds 90.0" in run("large_model.py", tmp_path, "--devices=1", "--resume")
