"""What an export gained, rung by rung: as a table, as JSON, as a section of a page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from lightning_sparse.export.compare_models import Timing
from lightning_sparse.export.kernel_choice import KernelChoice

__all__ = ["ExportReport", "Rung"]


@dataclass
class Rung:
    """One artifact, or why there is none.

    Args:
        file: in the folder of the export; None if it was not written.
        bytes: of the file.
        parameters: numbers in the model it makes.
        macs: multiplications per sample, zeros included where the kernel multiplies them.
        change: the largest difference of an output to the dense model.
        largest: the largest output.
        latency: batch size -> milliseconds.
        metrics: on the test set, if there was one.
        note: what was done, or why not.
    """

    file: str | None = None
    bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    change: float | None = None
    largest: float | None = None
    latency: dict[int, Timing] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass
class ExportReport:
    """All rungs beside the dense model, measured in turns.

    Args:
        model: its class.
        sparsity: share of zeros in its weights.
        batch_size: at which latency was measured, beside 1.
        threads: of torch while measuring.
        device: of the model.
        rungs: by name; `dense` first.
        choices: what was measured for each linear layer.
    """

    model: str
    sparsity: float
    batch_size: int
    threads: int
    device: str
    rungs: dict[str, Rung] = field(default_factory=dict)
    choices: list[KernelChoice] = field(default_factory=list)

    def speed(self, name: str, batch: int | None = None) -> float | None:
        """How many times as fast as dense a rung is; None if it was not measured."""
        batch = batch or self.batch_size
        ours, dense = self.rungs[name].latency.get(batch), self.rungs["dense"].latency.get(batch)
        return None if ours is None or dense is None else dense.median / ours.median

    def is_slower(self, name: str, margin: float = 1.05) -> bool:
        """Whether a rung made for speed takes longer than the dense model at the batch size, by more than a margin."""
        speed = self.speed(name)
        return name not in ("dense", "plain", "compact") and speed is not None and speed * margin < 1

    @property
    def recommendation(self) -> str:
        """One sentence: which rung to use."""
        written = {name: rung for name, rung in self.rungs.items() if rung.file}
        if not written:
            return "Nothing was written: no rung suits this model."
        speeds = {name: speed for name in written if name not in ("plain", "compact") and (speed := self.speed(name))}
        best = max(speeds, key=speeds.__getitem__, default=None)
        smallest = min(written, key=lambda name: written[name].bytes or 0)
        dense = self.rungs["dense"].bytes or 1
        if best is not None and speeds[best] > 1.05:
            alone = self.speed(best, 1)
            single = "" if alone is None or self.batch_size == 1 else f" ({alone:.1f} times at batch 1)"
            share = (written[best].bytes or 0) / dense
            return (
                f"Use '{best}' ({written[best].file}): {speeds[best]:.1f} times as fast as dense at batch "
                f"{self.batch_size}{single}, {share:.0%} of its bytes."
            )
        share = (written[smallest].bytes or 0) / dense
        return (
            f"No rung is faster than dense at batch {self.batch_size} on this machine; use '{smallest}' "
            f"({written[smallest].file}) for its size, {share:.0%} of the dense bytes."
        )

    # ---- as text ----------------------------------------------------------------------------------------------------------

    def header(self) -> list[str]:
        """Headings of the columns."""
        batches = dict.fromkeys(batch for rung in self.rungs.values() for batch in rung.latency)
        metrics = dict.fromkeys(metric for rung in self.rungs.values() for metric in rung.metrics)
        times = [f"ms at batch {batch}" for batch in batches]
        return ["rung", "bytes", "parameters", "MACs", *times, "largest change", *metrics, ""]

    def rows(self) -> list[list[str]]:
        """A row of cells for each rung."""
        batches = dict.fromkeys(batch for rung in self.rungs.values() for batch in rung.latency)
        metrics = dict.fromkeys(metric for rung in self.rungs.values() for metric in rung.metrics)
        rows = []
        for name, rung in self.rungs.items():
            counts = ["" if n is None else f"{n:,}" for n in (rung.bytes, rung.parameters, rung.macs)]
            times = []
            for batch in batches:
                timing, speed = rung.latency.get(batch), self.speed(name, batch)
                ratio = "" if name == "dense" or speed is None else f", {speed:.2f}x"
                text = "" if timing is None else f"{timing.median:.3g} ({timing.low:.3g} to {timing.high:.3g}{ratio})"
                times.append(text)
            change = "" if rung.change is None else f"{rung.change:.1e}"
            numbers = [f"{rung.metrics[metric]:.4f}" if metric in rung.metrics else "" for metric in metrics]
            rows.append([name, *counts, *times, change, *numbers, rung.note])
        return rows

    def table(self) -> Table:
        """For a terminal."""
        title = f"{self.model}, {self.sparsity:.1%} zeros, {self.threads} threads on {self.device}"
        table = Table(title=title, title_justify="left", caption=self.recommendation, caption_justify="left")
        for number, heading in enumerate(self.header()):
            last = number == len(self.header()) - 1
            table.add_column(heading, justify="left" if not number or last else "right", overflow="fold")
        for row in self.rows():
            table.add_row(*row)
        return table

    def html(self) -> str:
        """A section for a page: the table, the layers, the recommendation."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header())
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows())
        layers = "".join(f"<li>{html.escape(str(choice))}</li>" for choice in self.choices)
        listed = f"<h3>Kernels of linear layers</h3><ul>{layers}</ul>" if layers else ""
        title = html.escape(f"{self.model}, {self.sparsity:.1%} zeros, {self.threads} threads on {self.device}")
        return (
            f'<section class="export"><h2>Export</h2><p>{title}</p><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table><p><strong>{html.escape(self.recommendation)}</strong></p>{listed}</section>"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"recommendation": self.recommendation, "torch": torch.__version__}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExportReport:
        """From what a `report.json` holds, for a page made later."""
        report = cls(*(values[name] for name in ("model", "sparsity", "batch_size", "threads", "device")))
        for name, rung in values["rungs"].items():
            latency = {int(batch): Timing(**timing) for batch, timing in rung["latency"].items()}
            report.rungs[name] = Rung(**(rung | {"latency": latency}))
        report.choices = [KernelChoice(**choice) for choice in values["choices"]]
        return report

    def __str__(self) -> str:
        return "\n".join(["  ".join(cell for cell in row if cell) for row in self.rows()] + [self.recommendation])
