"""The gains of an export, rung by rung: as a table, as JSON, as a section of a page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lightning_sparse.export.compare_models import Timing
from lightning_sparse.export.kernel_choice import KernelChoice

__all__ = ["ExportReport", "Rung", "Runtime", "dense_in"]

Runtime = Literal["torch", "torch.compile", "onnxruntime", "executorch", "ethos-u85"]
"""The runtime of an artifact; `torch` is eager."""


SMALLER = 0.95
"""A file with less than this fraction of the dense bytes counts as smaller."""

SPREAD = "spread of the times"
SPARED = ("MACs", "parameters", "runtime", "largest change")
"""What a narrow terminal omits: the spread, these columns in this order, then metrics; `report.json` holds it all."""


def dense_in(runtime: Runtime) -> str:
    """The name of the row of the dense model in a runtime.

    Example:
        >>> dense_in("torch"), dense_in("onnxruntime")
        ('dense', 'dense, onnxruntime')
    """
    return "dense" if runtime == "torch" else f"dense, {runtime}"


@dataclass
class Rung:
    """One artifact, or the reason why there is none.

    Args:
        file: file in the folder of the export; None if it was not written.
        bytes: size of the file.
        parameters: number of parameters of the model.
        macs: multiplications per sample, including zeros where the kernel multiplies them.
        change: largest difference of an output from the dense model.
        largest: largest output.
        latency: batch size -> milliseconds.
        metrics: metrics on the test set, if there was one.
        note: what was done, or why not.
        runtime: the runtime that was measured.
        estimates: numbers that a compiler estimates and that were not measured.
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
    runtime: Runtime = "torch"
    estimates: dict[str, float] = field(default_factory=dict)


@dataclass
class ExportReport:
    """All rungs beside the dense model, measured interleaved.

    Args:
        model: name of its class.
        sparsity: fraction of zeros in its weights.
        batch_size: batch size at which latency was measured, besides 1.
        threads: number of torch threads during measurement.
        device: device of the model.
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
        """Speedup of a rung over the dense model in eager torch, its runtime included; None if not measured."""
        return self._ratio("dense", name, batch)

    def gain(self, name: str, batch: int | None = None) -> float | None:
        """Speedup of a rung over the dense model in the same runtime: the gain of the rung itself."""
        return self._ratio(dense_in(self.rungs[name].runtime), name, batch)

    def pace(self, name: str, batch: int | None = None) -> Literal["faster", "no faster", "slower"] | None:
        """How a rung compares with the dense model in the same runtime, given the spread of the measurements.

        Faster or slower only if the interquartile ranges of both do not overlap; None if it was not measured.
        """
        batch = batch or self.batch_size
        dense = self.rungs.get(dense_in(self.rungs[name].runtime), Rung()).latency.get(batch)
        ours = self.rungs[name].latency.get(batch)
        if dense is None or ours is None:
            return None
        return "faster" if ours.high < dense.low else "slower" if ours.low > dense.high else "no faster"

    def share(self, name: str) -> float | None:
        """Bytes of a rung, relative to the dense model in the same runtime."""
        dense = self.rungs.get(dense_in(self.rungs[name].runtime), Rung()).bytes
        ours = self.rungs[name].bytes
        return None if not dense or ours is None else ours / dense

    def outcome(self, name: str) -> str:
        """The gain of a rung in its own runtime, in words."""
        pace, share = self.pace(name), self.share(name)
        if name.startswith("dense") or share is None:
            return ""
        size = "smaller" if share < SMALLER else "no smaller" if share <= 1.05 else "larger"
        if pace is None:
            return size
        return f"{size}{' and' if (size == 'smaller') == (pace == 'faster') else ', but'} {pace}"

    def _ratio(self, dense: str, name: str, batch: int | None) -> float | None:
        batch = batch or self.batch_size
        theirs, ours = self.rungs.get(dense, Rung()).latency.get(batch), self.rungs[name].latency.get(batch)
        return None if ours is None or theirs is None else theirs.median / ours.median

    @property
    def recommendation(self) -> str:
        """Which rung to use, its own gain, and that of its runtime."""
        written = [name for name, rung in self.rungs.items() if rung.file]
        if not written:
            return "Nothing was written: no rung suits this model."
        batch = f"at batch {self.batch_size}"
        speeds = {name: speed for name in written if self.is_other_network(name) and (speed := self.speed(name))}
        best = max(speeds, key=speeds.__getitem__, default=None)
        if best is None or not (speeds[best] > 1.05 and self._beats_dense(best)):
            smallest = min(written, key=lambda name: self.rungs[name].bytes or 0)
            size = (self.rungs[smallest].bytes or 0) / (self.rungs["dense"].bytes or 1)
            measured, smaller = any(rung.latency for rung in self.rungs.values()), size < SMALLER
            if not smaller:
                said = "smaller or faster" if measured else "smaller"
                said = f"No rung is {said} than dense{f' {batch} on this machine' if measured else ''}"
                return f"{said}." if measured else f"{said}; speed was not measured."
            said = f"No rung is faster than dense {batch} on this machine" if measured else "Speed was not measured"
            return f"{said}; use '{smallest}' ({self.rungs[smallest].file}) for its size, {size:.0%} of the dense bytes."
        runtime = self.rungs[best].runtime
        where = "" if runtime == "torch" else f" in {runtime}"
        gain = self.gain(best)
        said = f"Use '{best}' ({self.rungs[best].file}): "
        if self.pace(best) == "faster" or gain is None:
            said += f"{gain or speeds[best]:.1f} times as fast as dense{where} {batch}"
            alone = self.gain(best, 1)
            said += "" if alone is None or self.batch_size == 1 else f" ({alone:.1f} times at batch 1)"
        else:
            said += f"{self.pace(best)} than dense{where} {batch}"
        share = self.share(best)
        said += "" if share is None else f", {share:.0%} of its bytes"
        if runtime == "torch" or gain is None:
            return f"{said}."
        own = f"{speeds[best] / gain:.1f} of it by {runtime} itself"
        return f"{said}; {speeds[best]:.1f} times as fast as dense in eager torch, {own}."

    def is_other_network(self, name: str) -> bool:
        """Whether a rung computes differently from the dense model, and so may be faster or slower."""
        return not name.startswith("dense") and name not in ("plain", "compact")

    def _beats_dense(self, name: str) -> bool:
        """Whether the interquartile range of a rung's times lies below that of the dense model in eager torch."""
        ours, dense = self.rungs[name].latency[self.batch_size], self.rungs["dense"].latency[self.batch_size]
        return ours.high < dense.low

    # ---- as text ----------------------------------------------------------------------------------------------------------

    def header(self) -> list[str]:
        """Column headings."""
        batches = dict.fromkeys(batch for rung in self.rungs.values() for batch in rung.latency)
        metrics = dict.fromkeys(metric for rung in self.rungs.values() for metric in rung.metrics)
        times = [f"ms at batch {batch}" for batch in batches]
        return ["rung", "runtime", "bytes", "parameters", "MACs", *times, "largest change", *metrics, "gains", ""]

    def rows(self) -> list[list[str]]:
        """One row of cells per rung."""
        batches = dict.fromkeys(batch for rung in self.rungs.values() for batch in rung.latency)
        metrics = dict.fromkeys(metric for rung in self.rungs.values() for metric in rung.metrics)
        rows = []
        for name, rung in self.rungs.items():
            counts = ["" if n is None else f"{n:,}" for n in (rung.bytes, rung.parameters, rung.macs)]
            times = []
            for batch in batches:
                timing = rung.latency.get(batch)
                spread = "" if timing is None else f"{timing.low:.3g} to {timing.high:.3g}{self._times_dense(name, batch)}"
                times.append("" if timing is None else f"{timing.median:.3g} ({spread})")
            change = "" if rung.change is None else f"{rung.change:.1e}"
            numbers = [f"{rung.metrics[metric]:.4f}" if metric in rung.metrics else "" for metric in metrics]
            runtime = rung.runtime if rung.bytes else ""
            rows.append([name, runtime, *counts, *times, change, *numbers, self.outcome(name), self._said_of(rung)])
        return rows

    def _times_dense(self, name: str, batch: int) -> str:
        """The gain in the same runtime, and the total where it differs."""
        gain, total = self.gain(name, batch), self.speed(name, batch)
        if name == "dense" or total is None:
            return ""
        if gain is None or self.rungs[name].runtime == "torch":
            return f", {total:.2f}x"
        return f", {total:.2f}x in total" if name.startswith("dense") else f", {gain:.2f}x, {total:.2f}x in total"

    @staticmethod
    def _said_of(rung: Rung) -> str:
        estimates = ", ".join(f"{what} {number:,.0f}" for what, number in rung.estimates.items())
        return "; ".join(filter(None, [estimates and f"estimates, not measured: {estimates}", rung.note]))

    def title(self) -> str:
        """What was exported, and where it was measured."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.model}, {self.sparsity:.1%} zeros, {threads} on {self.device}"

    def table(self) -> RenderableType:
        """A table for a terminal of any width, the remarks on the rungs, and the recommendation."""
        return _Printed(self)

    def html(self) -> str:
        """A section for a page: the table, the layers, the recommendation."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header())
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self.rows())
        layers = "".join(f"<li>{html.escape(str(choice))}</li>" for choice in self.choices)
        listed = f"<h3>Kernels of linear layers</h3><ul>{layers}</ul>" if layers else ""
        return (
            f'<section class="export"><h2>Export</h2><p>{html.escape(self.title())}</p><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table><p><strong>{html.escape(self.recommendation)}</strong></p>{listed}</section>"
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self) | {"recommendation": self.recommendation, "torch": torch.__version__}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExportReport:
        """The report from the contents of a `report.json`, for a page that is made later."""
        report = cls(*(values[name] for name in ("model", "sparsity", "batch_size", "threads", "device")))
        for name, rung in values["rungs"].items():
            latency = {int(batch): Timing(**timing) for batch, timing in rung["latency"].items()}
            report.rungs[name] = Rung(**(rung | {"latency": latency}))
        report.choices = [KernelChoice(**choice) for choice in values["choices"]]
        return report

    def __str__(self) -> str:
        return "\n".join(["  ".join(cell for cell in row if cell) for row in self.rows()] + [self.recommendation])


@dataclass
class _Printed:
    """A report in a terminal: a table of the columns that fit, and the remarks below it."""

    report: ExportReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns, omitted, spread = self.report.header()[:-1], [], True
        metrics = dict.fromkeys(metric for rung in self.report.rungs.values() for metric in rung.metrics)
        for spared in (SPREAD, *SPARED, *metrics):
            if self._is_wide(self._table(columns, spread), console, options):
                spread = False
                omitted.append(spared)
                columns = [column for column in columns if column != spared]
        yield self._table(columns, spread)
        if omitted:
            yield Text(f"In report.json: {', '.join(omitted)}.")
        for name, row in zip(self.report.rungs, self.report.rows(), strict=True):
            if row[-1]:
                yield Text(f"{name}: {row[-1]}")
        yield Text(self.report.recommendation, style="bold")

    @staticmethod
    def _is_wide(table: Table, console: Console, options: ConsoleOptions) -> bool:
        return Measurement.get(console, options.update(max_width=1000), table).maximum > options.max_width

    def _table(self, columns: list[str], spread: bool) -> Table:
        table = Table(title=self.report.title(), title_justify="left")
        for name in columns:
            heading = name if spread else name.replace("ms at ", "ms at\n")
            words = name in ("rung", "gains")
            table.add_column(heading, justify="left" if name == "rung" else "right", no_wrap=not words)
        for name, row in zip(self.report.rungs, self.report.rows(), strict=True):
            cells = dict(zip(self.report.header(), row, strict=True))
            if not spread:
                cells |= {f"ms at batch {batch}": self._time(name, batch) for batch in self.report.rungs[name].latency}
            if any(cells[column] for column in columns[1:]):  # otherwise there is only a remark
                table.add_row(*(cells[column] for column in columns))
        return table

    def _time(self, name: str, batch: int) -> str:
        """The median and the gain in the same runtime, without the spread."""
        gain = None if name.startswith("dense") else self.report.gain(name, batch)
        return f"{self.report.rungs[name].latency[batch].median:.3g}{'' if gain is None else f', {gain:.2f}x'}"
