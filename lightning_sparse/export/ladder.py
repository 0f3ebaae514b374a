"""The export ladder: from weights with zeros to smaller and faster artifacts, all verified before anything is written."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_sparse.core import Call, callee, first_line, is_cut, silenced
from lightning_sparse.export.compare_models import difference, have_equal_weights, interleaved
from lightning_sparse.export.export_report import ExportReport, Rung, Runtime, dense_in
from lightning_sparse.export.merge_report import count_parameters
from lightning_sparse.export.quantization import Elsewhere, Quantization, relative_error
from lightning_sparse.export.rungs import RUNGS, UNTIMED, Ladder, Made, RungName, call_with, device_of

__all__ = ["RUNGS", "RungName", "export_ladder"]


def export_ladder(
    model: nn.Module,
    inputs: Any,
    to: str | Path,
    *,
    network: str | None = None,
    rungs: Sequence[RungName] | None = None,
    tolerance: float = 1e-5,
    fold: bool = False,
    input_range: Sequence[float] | None = None,
    rounds: int = 30,
    compiled: bool = True,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    quantization: Quantization | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Make every artifact that suits a sparse model, verify each one, measure them all against the model, and write them.

    `plain`: a state dict. `compact`: the same without zeros. `merged`: without layers that act linearly. `removed`: without
    dead neurons and filters; later rungs build on it. `kernels`: linear layers in CSR or BSR where that is faster on this
    machine. `semi_structured`: 2:4, on the sparse tensor cores of a GPU. `onnx`. `int8`: ONNX in eight bits. `edge`: an int8
    program for ExecuTorch on a CPU. `ethos_u85`: one for Arm's accelerator, which stores no zeros.

    Verification uses the model as loaded from the file, and nothing is written before everything is verified. The gain of a
    rung is measured against the dense model in the same runtime, so each runtime has a dense row. A rung that is slower than
    this row and not smaller is dropped, unless `rungs` names it.

    Args:
        model: trained, with exact zeros; it is not changed.
        inputs: real inputs, as many as a batch will have in deployment; a tuple holds positional arguments, a dict holds
            keyword arguments.
        to: output folder.
        network: name of the submodule that takes the inputs; None finds it.
        rungs: the rungs to make; None makes all that suit the model, and the report says why the others do not.
        tolerance: maximum change of an output, relative to the largest output (or to 1 if that is smaller); in half
            precision, four rounding errors are allowed.
        fold: fold batch normalization into the preceding layers, in all rungs except `merged`.
        input_range: the smallest and largest input, such as (0, 1); `merged` needs it to judge the first layer.
        rounds: number of calls for measuring latency; 0 skips it.
        compiled: also measure the dense model and smaller networks under `torch.compile`, which takes seconds each, and
            half a minute the first time on a machine.
        evaluate: computes metrics of a model, such as its accuracy on a test set.
        quantization: how int8 rungs are calibrated and judged; None skips them.
        overwrite: overwrite files in the folder.

    Raises:
        ValueError: if a rung is unknown, a requested one is not possible, or one fails its verification.
    """
    if is_cut(model):
        raise ValueError(
            f"{type(model).__name__} is sharded, and an export needs whole weights; save a checkpoint, and give the "
            "plain model after model.load_state_dict(whole_weights(path))."
        )
    call = Call.of(inputs, network)
    names = _check(rungs, to, call, tolerance, input_range, rounds, overwrite)
    options = {"fold": fold, "input_range": input_range, "tolerance": tolerance, "quantization": quantization}
    with tempfile.TemporaryDirectory() as folder:
        ladder = Ladder(model, call, Path(folder), options)
        climb = _Climb(ladder, forced=rungs is not None)
        for name in names:
            if name not in UNTIMED:
                climb.take(name)
        with ladder.second_process(names, times=rounds > 0, compiles=compiled and rounds > 0):
            for name in UNTIMED:
                if name in names:
                    climb.take(name)
            climb.report.rungs = {name: climb.report.rungs[name] for name in ("dense", *names)}
            if evaluate is not None:
                climb.evaluate(evaluate)
            climb.judge_what_rounds_off()
            if rounds:
                climb.compare_runtimes(compiled)
        if rounds:
            climb.time(rounds)
            climb.leave_out_what_is_no_gain()
        climb.report.choices = ladder.choices
        climb.write(Path(to))
    return climb.report


class _Climb:
    """One run of the ladder: the artifacts made so far, and the report on them.

    Args:
        ladder: the ladder.
        forced: whether rungs were requested by name, so that an impossible one is an error.
    """

    def __init__(self, ladder: Ladder, forced: bool) -> None:
        self.ladder, self.forced = ladder, forced
        dense, call = ladder.dense, ladder.inputs
        kind, self.expected = type(dense).__name__, ladder.expected
        self.made: dict[str, Made] = {}
        self.errors: dict[str, float] = {}
        """The allowed relative error of the outputs of rungs that round."""
        self.timed: dict[str, Callable[[Call], Any]] = {"dense": partial(call_with, callee(dense, call.network)[1])}
        """Everything that is measured: artifacts and dense rows."""
        self.report = ExportReport(kind, ladder.zeros, call.samples, torch.get_num_threads(), str(device_of(dense)))
        self.report.rungs["dense"] = Rung(
            bytes=sum(t.numel() * t.element_size() for t in ladder.dense.state_dict().values()),
            parameters=count_parameters(dense),
            macs=sum(ladder.macs(dense).values()),
            note="the masked model as it was trained",
        )

    def take(self, name: str) -> None:
        """Make a rung and verify it, or record why it was not made."""
        try:
            rung = RUNGS[name](self.ladder)
            found = self.expected if rung.run is None else rung.run(self.ladder.inputs)
        except Exception as error:  # libraries and kernels fail in many ways
            reason = str(error) if isinstance(error, ValueError) else f"it does not run ({first_line(error)})."
            if self.forced:
                raise ValueError(f"rung '{name}': {reason.rstrip('.')}. Nothing was written.") from None
            self.report.rungs[name] = Rung(note=reason)
            return
        allowed = float("inf") if rung.rounds_off else self.ladder.tolerance
        self.report.rungs[name] = _verified(name, rung, found, self.expected, allowed, self.ladder.folder)
        if rung.rounds_off:
            self.errors[name] = relative_error(self.expected, found)
        if rung.run is None:
            self.report.rungs[name].change = self.report.rungs[name].largest = None
        self.made[name] = rung
        if rung.run is not None:
            self.timed[name] = rung.run

    def compare_runtimes(self, compiled: bool) -> None:
        """Add a dense row for every runtime that a rung uses, and rows for compiled networks if requested."""
        if any(rung.runtime == "onnxruntime" for rung in self.made.values()):
            self._add_dense("onnxruntime", self.ladder.dense_onnx)
        if any(rung.runtime == "executorch" for rung in self.made.values()):
            self._add_dense("executorch", self.ladder.dense_executorch)
        networks = {"dense": self.ladder.dense, **{n: m.module for n, m in self.made.items() if m.compiles}}
        worth_it = compiled and any(map(self.report.is_other_network, self.made))
        for name, network in networks.items() if worth_it else ():
            if network is not None:
                self._add_compiled(name, network)
        rows = self.report.rungs
        self.report.rungs = dict(sorted(rows.items(), key=lambda row: not row[0].startswith("dense")))

    def _add_dense(self, runtime: Runtime, make: Callable[[], Made]) -> None:
        row = dense_in(runtime)
        try:
            dense = make()
            assert dense.run is not None
            dense.run(self.ladder.inputs)
        except Exception as error:
            self.report.rungs[row] = Rung(runtime=runtime, note=f"it does not run ({first_line(error)}).")
            return
        size = (self.ladder.folder / dense.file).stat().st_size
        self.report.rungs[row] = Rung(None, size, dense.parameters, dense.macs, note=dense.note, runtime=runtime)
        self.timed[row] = dense.run

    def _add_compiled(self, name: str, network: nn.Module) -> None:
        runtime: Runtime = "torch.compile"
        eager, row = self.report.rungs[name], f"{name}, {runtime}"
        try:
            called: Any = torch.compile(callee(network, self.ladder.inputs.network)[1])
            run = partial(call_with, called)
            with warnings.catch_warnings(), silenced("torch"):
                warnings.simplefilter("ignore")
                change = difference(self.expected, run(self.ladder.inputs))
        except Exception as error:
            self.report.rungs[row] = Rung(runtime=runtime, note=f"torch.compile cannot ({first_line(error)}).")
            return
        note = f"at batch {self.ladder.inputs.samples}; the same file"
        self.report.rungs[row] = Rung(None, eager.bytes, eager.parameters, eager.macs, *change, note=note, runtime=runtime)
        self.timed[row] = run

    def time(self, rounds: int) -> None:
        """Time everything, interleaved, at batch size 1 and at that of the inputs; compiled networks only at the latter."""
        dense, inputs = self.ladder.dense, self.ladder.inputs
        same = [name for name in self.made if self._is_dense(name)]
        for batch in dict.fromkeys((1, inputs.samples)):
            x = inputs.first(batch).fit(dense)
            able = [name for name in self.timed if batch == inputs.samples or not name.endswith("compile")]
            runs = {name: partial(self.timed[name], x) for name in able if name not in same}
            with torch.no_grad():
                found = interleaved(runs, rounds, device_of(dense))
            for name, timing in found.items():
                self.report.rungs[name].latency[batch] = timing
            for name in same:
                self.report.rungs[name].latency[batch] = found["dense"]

    def leave_out_what_is_no_gain(self) -> None:
        """Drop rungs that were not requested and are slower than dense in their runtime without being smaller."""
        for name in [] if self.forced else list(self.made):
            share = self.report.share(name)
            if self.report.is_other_network(name) and self.report.pace(name) == "slower" and (share is None or share > 0.95):
                rung = self.report.rungs[name]
                where = "" if rung.runtime == "torch" else f" in {rung.runtime}"
                rung.note = f"left out: slower than dense{where} and no smaller; {rung.note}"
                rung.file = None
                del self.made[name]

    def evaluate(self, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> None:
        """Compute metrics of everything that is a module or can be used like one."""
        dense = self.ladder.dense
        known = self.report.rungs["dense"].metrics = dict(evaluate(dense))
        for name, made in self.made.items():
            if made.module is not None:
                self.report.rungs[name].metrics = dict(known if self._is_dense(name) else evaluate(made.module))
        for name in self.errors:
            elsewhere = Elsewhere(self.ladder.dense, self.ladder.inputs, self.timed[name])
            metrics = dict(evaluate(elsewhere.module))
            if elsewhere.calls:
                self.report.rungs[name].metrics = metrics
            else:
                self.report.rungs[name].note += "; evaluate does not call its network, so it has no metrics"

    def _is_dense(self, name: str) -> bool:
        """Whether a rung is the dense model in another file, so that the dense model's metrics and times are its own."""
        module = self.made[name].module
        if module is None or self.report.is_other_network(name):
            return False
        return have_equal_weights(module, self.ladder.dense)

    def judge_what_rounds_off(self) -> None:
        """Require that the metrics, or without metrics the outputs, are close enough to those of the dense model."""
        for name, error in self.errors.items():
            assert self.ladder.quantization is not None
            rung = self.report.rungs[name]
            reason = self.ladder.quantization.verdict(self.report.rungs["dense"].metrics, rung.metrics, error)
            if not reason:
                rung.note = f"outputs off by {error:.1%} (root mean square); {rung.note}"
                continue
            if self.forced:
                raise ValueError(f"rung '{name}': {reason}. Nothing was written.")
            self.report.rungs[name] = Rung(change=rung.change, largest=rung.largest, metrics=rung.metrics, note=f"{reason}.")
            del self.made[name], self.timed[name]

    def write(self, to: Path) -> None:
        """Write the files and the report."""
        to.mkdir(parents=True, exist_ok=True)
        for rung in self.made.values():
            shutil.copyfile(self.ladder.folder / rung.file, to / rung.file)
        (to / "report.json").write_text(json.dumps(self.report.to_json(), indent=1) + "\n")


def _check(
    rungs: Sequence[RungName] | None,
    to: str | Path,
    inputs: Call,
    tolerance: float,
    input_range: Sequence[float] | None,
    rounds: int,
    overwrite: bool,
) -> list[str]:
    unknown = [name for name in rungs or () if name not in RUNGS]
    if unknown:
        raise ValueError(f"rung '{unknown[0]}' is unknown; choose from {list(RUNGS)}.")
    if rungs is not None and not rungs:
        raise ValueError(f"rungs={rungs} is empty; choose from {list(RUNGS)}, or omit it for all that suit.")
    if not inputs.samples:
        raise ValueError("inputs contains no sample; give a batch of real ones.")
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be above 0: rounding alone changes outputs a little.")
    if input_range is not None and not (len(input_range) == 2 and input_range[0] < input_range[1]):
        raise ValueError(f"input_range={input_range} must be the smallest and the largest input, such as [0, 1].")
    if rounds < 0:
        raise ValueError(f"rounds={rounds} must be >= 0; 0 measures nothing.")
    if Path(to).is_file() or (Path(to).is_dir() and any(Path(to).iterdir()) and not overwrite):
        raise ValueError(f"to='{to}' already exists; name a new folder, or set overwrite.")
    return [name for name in RUNGS if rungs is None or name in rungs]


def _verified(name: str, made: Made, found: Any, expected: Any, tolerance: float, folder: Path) -> Rung:
    """Return the row of a rung after verifying that its outputs match those of the dense model.

    Raises:
        ValueError: if they do not match.
    """
    change, largest = difference(expected, found)
    allowed = tolerance * max(1.0, largest)
    if not change <= allowed:
        raise ValueError(
            f"rung '{name}' fails its verification: outputs differ by {change:.3g} where {allowed:.3g} is allowed (the "
            f"largest output is {largest:.3g}). Nothing was written."
        )
    size = (folder / made.file).stat().st_size
    return Rung(
        made.file,
        size,
        made.parameters,
        made.macs,
        change,
        largest,
        note=made.note,
        runtime=made.runtime,
        estimates=dict(made.estimates),
    )
