"""The report of an export: what was measured, what is recommended, and a table that fits the terminal."""

from __future__ import annotations

import io
import json

import pytest

from lightning_sparse.export import ExportReport, KernelChoice, Rung
from lightning_sparse.export.compare_models import Timing


def report(**speeds: float) -> ExportReport:
    made = ExportReport("Net", 0.9, 64, 1, "cpu")
    made.rungs["dense"] = Rung(bytes=1000, latency={64: Timing(10, 9, 11), 1: Timing(2, 2, 2)})
    for name, speed in speeds.items():
        times = {64: Timing(10 / speed, 9 / speed, 11 / speed), 1: Timing(1, 1, 1)}
        made.rungs[name] = Rung(f"{name}.file", 200, latency=times, note="<no> faster")
    return made


def in_another_runtime(dense: float, rung: float, size: int = 400) -> ExportReport:
    """A rung in onnxruntime that takes so many milliseconds, and the dense model there."""
    made = report()
    times = {64: Timing(dense, dense, dense), 1: Timing(dense / 10, dense / 10, dense / 10)}
    made.rungs["dense, onnxruntime"] = Rung(bytes=800, latency=times, runtime="onnxruntime")
    times = {64: Timing(rung, rung, rung), 1: Timing(rung / 10, rung / 10, rung / 10)}
    made.rungs["onnx"] = Rung("model.onnx", size, latency=times, runtime="onnxruntime")
    return made


def test_the_recommendation_says_what_was_measured() -> None:
    made = report(compact=1.3, removed=2.0, kernels=3.0)
    assert made.recommendation == (
        "Use 'kernels' (kernels.file): 3.0 times as fast as dense at batch 64 (2.0 times at batch 1), 20% of its bytes."
    )
    assert report(compact=2.0, removed=1.02).recommendation == (
        "No rung is faster than dense at batch 64 on this machine; use 'compact' (compact.file) for its size, 20% of the "
        "dense bytes."
    )
    assert report(compact=2.0, removed=1.1).recommendation.startswith("No rung is faster"), "their middle halves overlap"
    assert report().recommendation.startswith("Nothing was written")
    made = report(compact=1.0)
    made.rungs["compact"].bytes = 960
    assert made.recommendation == "No rung is smaller or faster than dense at batch 64 on this machine."
    made.rungs["dense"].latency, made.rungs["compact"].latency = {}, {}
    assert made.recommendation == "No rung is smaller than dense; speed was not measured."
    made.rungs["compact"].bytes = 940
    assert made.recommendation == (
        "Speed was not measured; use 'compact' (compact.file) for its size, 94% of the dense bytes."
    )


def test_a_rung_gains_beside_dense_in_its_own_runtime() -> None:
    made = in_another_runtime(dense=2.0, rung=1.0)
    assert (made.gain("onnx"), made.speed("onnx"), made.speed("dense, onnxruntime")) == (2.0, 10.0, 5.0)
    assert made.share("onnx") == 0.5
    assert made.recommendation == (
        "Use 'onnx' (model.onnx): 2.0 times as fast as dense in onnxruntime at batch 64 (2.0 times at batch 1), 50% of its "
        "bytes; 10.0 times as fast as dense in eager torch, 5.0 of it by onnxruntime itself."
    )
    assert in_another_runtime(dense=1.0, rung=1.0).recommendation == (
        "Use 'onnx' (model.onnx): no faster than dense in onnxruntime at batch 64, 50% of its bytes; 10.0 times as fast as "
        "dense in eager torch, 10.0 of it by onnxruntime itself."
    )


def test_what_a_rung_gains_is_said_in_words() -> None:
    assert report(removed=2.0).outcome("removed") == "smaller and faster"
    assert report(removed=1.05).outcome("removed") == "smaller, but no faster"
    assert report(removed=0.5).outcome("removed") == "smaller, but slower"
    assert report(removed=2.0).outcome("dense") == ""
    assert in_another_runtime(1.0, 1.0, size=800).outcome("onnx") == "no smaller and no faster"
    assert in_another_runtime(2.0, 1.0, size=900).outcome("onnx") == "larger, but faster"
    untimed = report()
    untimed.rungs["removed"] = Rung("removed.file", 200)
    assert untimed.outcome("removed") == "smaller"


def test_the_report_is_a_table_a_section_and_json() -> None:
    from rich.console import Console

    made = in_another_runtime(dense=2.0, rung=1.0)
    made.rungs["removed"] = report(removed=2.0).rungs["removed"]
    made.rungs["removed"].estimates = {"cycles": 1234567}
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(made.table())
    text = console.export_text()
    assert "5 (4.5 to 5.5, 2.00x)" in text
    assert "1 (1 to 1, 2.00x, 10.00x in total)" in text
    assert "2 (2 to 2, 5.00x in total)" in text
    assert "estimates, not measured: cycles 1,234,567" in text
    assert "Use 'onnx'" in text
    assert "Net, 90.0% zeros, 1 thread on cpu" in text
    section = made.html()
    assert section.startswith('<section class="export">')
    assert "&lt;no&gt; faster" in section
    made.choices = [KernelChoice("fc", 0.9, {"dense": 1.0}, "dense")]
    assert "<li>fc, 90.0% zeros: dense (dense 1 ms)</li>" in made.html()
    written = json.loads(json.dumps(made.to_json()))
    assert written["rungs"]["removed"]["latency"]["64"]["median"] == 5
    assert ExportReport.from_json(written) == made


@pytest.mark.parametrize(("width", "heading"), [(80, "bytes"), (120, "test/accuracy"), (240, "5 (4.5 to 5.5, 2.00x)")])
def test_a_terminal_gets_the_columns_that_fit(width: int, heading: str) -> None:
    from rich.console import Console

    made = in_another_runtime(dense=2.0, rung=1.0)
    made.rungs["removed"] = report(removed=2.0).rungs["removed"]
    made.rungs["kernels"] = Rung(note="no linear layer is faster with a sparse kernel")
    for rung in made.rungs.values():
        rung.metrics = {"test/accuracy": 0.98, "test/loss": 0.1} if rung.bytes else {}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(made.table())
    lines = console.export_text().splitlines()
    table = [line for line in lines if line[:1] in "┃│"]
    assert any(heading in line for line in table)
    for row in ("removed", "1,000", "5, 2.00x" if width < 240 else "2.00x", "smaller and"):
        assert any(row in line for line in table), row
    assert not any("kernel" in line for line in table), "nothing but a remark"
    assert "kernels: no linear layer is faster with a sparse kernel" in lines
    assert any(line.startswith("In report.json: spread of the times, MACs") for line in lines) == (width < 240)
