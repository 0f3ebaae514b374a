"""The examples run, and what they have found is not computed again."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sparse.functional import round_symmetric
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


def run(name: str, folder: Path, *options: str) -> str:
    """What an example prints in a process of its own."""
    command = [sys.executable, str(ROOT / "examples" / name), "--quick", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_image_classifier(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]*) ?\|$", run("finetune_timm.py", tmp_path), flags=re.M)
    (_, dense, _), *others = rows
    assert [name for name, *_ in rows] == [
        "nothing",
        "magnitude",
        "Wanda",
        "SparseGPT",
        "SparseGPT, with its dense self as a teacher",
    ]
    assert len({pruned for _, pruned, _ in others}) == 3, "the teacher changes nothing before the first step"
    assert all(float(after) > 0.5 for _, _, after in others)
    assert float(dense) > 0.5


def test_a_large_model_on_two_ranks_and_then_on_one(tmp_path: Path) -> None:
    run("large_model.py", tmp_path, "--devices=2")
    resumed = run("large_model.py", tmp_path, "--devices=1", "--resume")
    assert "The plain decoder holds 90.0" in resumed


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


def test_a_sparse_network_is_made_ready_for_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    runpy.run_path(str(ROOT / "examples" / "sparse_int8.py"))["main"](str(tmp_path), 3)
    said = capsys.readouterr().out
    zeros = [int(count.replace(",", "")) for count in re.findall(r"with ([\d,]+) zeros", said)]
    weights = torch.load(tmp_path / "ready" / "last.ckpt", weights_only=True)["state_dict"]
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    assert len(zeros) == 2
    assert zeros[1] == sum(int((weight == 0).sum()) for weight in matrices)
    assert zeros[1] >= zeros[0] > 0.6 * sum(weight.numel() for weight in matrices)
    assert all(torch.equal(weight, round_symmetric(weight)) for weight in matrices), "on the grid of int8"
    assert (tmp_path / "deployed" / "model-int8.onnx").exists()
