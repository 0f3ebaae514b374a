"""The ladder: from weights with zeros to smaller and faster artifacts, each verified before anything is written."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_sparse.core import Call, callee, copy_model, count_macs, effective_macs, first_line, is_cut, silenced
from lightning_sparse.export.batch_norm import fold_norms
from lightning_sparse.export.blueprint import Blueprint, load_model, save_model
from lightning_sparse.export.compare_models import difference, interleaved, runner
from lightning_sparse.export.edge import executorch_runner, save_ethos_u85, save_executorch
from lightning_sparse.export.export_report import ExportReport, Rung, Runtime, dense_in
from lightning_sparse.export.int8 import save_int8
from lightning_sparse.export.kernel_choice import KernelChoice
from lightning_sparse.export.kernels import choose_kernels
from lightning_sparse.export.merge import merge_layers
from lightning_sparse.export.merge_report import count_parameters
from lightning_sparse.export.onnx import batch_sizes, compressed_size, onnx_runner, save_onnx
from lightning_sparse.export.quantization import Elsewhere, Quantization, relative_error
from lightning_sparse.export.removal import remove_dead
from lightning_sparse.export.semi_structured import choose_semi_structured

__all__ = ["RUNGS", "RungName", "export_ladder"]

RungName = Literal[
    "plain", "compact", "merged", "removed", "kernels", "semi_structured", "onnx", "int8", "edge", "ethos_u85"
]


@dataclass
class _Made:
    """An artifact in the temporary folder, and what runs it."""

    file: str
    run: Callable[[Call], Any] | None
    """None if nothing here can run it."""
    note: str
    parameters: int | None = None
    macs: int | None = None
    module: nn.Module | None = None
    runtime: Runtime = "torch"
    compiles: bool = False
    """Whether it is a network of its own that torch.compile takes."""
    rounds_off: bool = False
    """Whether its outputs are those of the dense model up to what `Quantization` allows, not up to the tolerance."""
    estimates: Mapping[str, float] = field(default_factory=dict)


class _Ladder:
    """What all rungs stand on."""

    def __init__(self, model: nn.Module, inputs: Call, folder: Path, options: Mapping[str, Any]) -> None:
        self.dense, self.inputs, self.folder = copy_model(model).eval(), inputs, folder
        self.input_range = options["input_range"]
        kind = next(self.dense.parameters()).dtype
        self.tolerance = max(options["tolerance"], 4 * torch.finfo(kind).eps)  # half precision rounds more than that
        self.base, self.blueprint = fold_norms(self.dense) if options["fold"] else (copy_model(self.dense), Blueprint())
        self.quantization: Quantization | None = options["quantization"]
        self.choices: list[KernelChoice] = []
        self.zeros = _zeros(self.dense)

    def macs(self, model: nn.Module) -> dict[str, int]:
        """Multiply-accumulates per sample, by weight."""
        return count_macs(model, runner(model, self.inputs), self.inputs.samples)

    # ---- rungs ------------------------------------------------------------------------------------------------------------

    def plain(self) -> _Made:
        """A state dict that loads strictly."""
        path = self.folder / "plain.pt"
        torch.save({name: tensor.cpu() for name, tensor in self.base.state_dict().items()}, path)
        loaded = self.blueprint.apply(copy_model(self.dense))
        loaded.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return self._made("plain.pt", loaded, self._no_faster())

    def compact(self) -> _Made:
        """The same without its zeros."""
        return self._saved("compact.safetensors", self.base, self.blueprint, f"smaller on disk only; {self._no_faster()}")

    def merged(self) -> _Made:
        """Layers that act linearly, merged: a shallower network as a program of its own."""
        model, report = merge_layers(self.dense, self.inputs, tolerance=0.0, input_range=self.input_range, rounds=0)
        if not report.merged:
            raise ValueError("no layer acts linearly for all inputs, so none is merged; train with LayerSparsity.")
        called = callee(model, self.inputs.network)[1]
        path = self.folder / "merged.pt2"
        several = self.inputs.at_least_two().fit(called)
        sizes = batch_sizes(called, several)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.export.save(
                    torch.export.export(called, several.args, dict(several.kwargs), dynamic_shapes=sizes), path
                )
                program = torch.export.load(path).module()
        except Exception as error:
            text = f"the merged {type(model).__name__} cannot be exported by torch.export ({first_line(error)})."
            raise ValueError(text) from None
        note = f"{report.depth[0]} layers became {report.depth[1]}; torch.export.load reads it, without the model's code"
        macs = sum(self.macs(model).values())
        return _Made(path.name, partial(_call, program), note, report.parameters[1], macs, model, compiles=True)

    def removed(self) -> _Made:
        """Without the channels that do nothing; what comes after stands on it."""
        smaller, removal = remove_dead(self.base, self.inputs, tolerance=self.tolerance)
        blueprint = replace(self.blueprint, kept=removal.blueprint.kept)
        note = f"{sum(removal.removed.values()):,} outputs of {len(removal.removed)} layers are gone"
        if removal.carriers:
            note += f"; {sum(removal.carriers.values())} dead ones stay to carry a constant where zeros are padded"
        if removal.refused:
            name, reason = next(iter(removal.refused.items()))
            note += f"; {len(removal.refused)} groups stay, such as '{name}': {reason}"
        made = self._saved("removed.safetensors", smaller, blueprint, note)
        made.compiles = True
        self.base, self.blueprint = smaller, blueprint
        return made

    def kernels(self) -> _Made:
        """Linear layers in the layout that is fastest here."""
        self.choices = choose_kernels(self.base, self.inputs)
        return self._with_kernels("kernels.safetensors", self.base, self.choices)

    def semi_structured(self) -> _Made:
        """Linear layers on the sparse tensor cores of a GPU."""
        if _device(self.dense).type != "cuda":
            raise ValueError("2:4 needs the model on a CUDA device, in bfloat16 or float16.")
        choices = choose_semi_structured(self.base, self.inputs)
        self.choices += choices
        return self._with_kernels("semi_structured.safetensors", self.base, choices)

    def onnx(self) -> _Made:
        """For onnxruntime and everything else that reads ONNX."""
        if (kind := next(self.base.parameters()).dtype) not in (torch.float32, torch.float64):
            raise ValueError(f"onnxruntime would check it on the CPU, which does not support {kind}; use float32.")
        path = self.folder / "model.onnx"
        save_onnx(self.base, self.inputs, path)
        note = f"{compressed_size(path):,} bytes compressed"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        return _Made(path.name, onnx_runner(path), note, parameters, macs, runtime="onnxruntime")

    def int8(self) -> _Made:
        """In eight bits, with all its zeros."""
        path = self.folder / "model-int8.onnx"
        found = save_int8(self.base, self.inputs, path, self._calibration())
        note = f"{compressed_size(path):,} bytes compressed; {found.zeros:,} zeros of {found.weights:,} weights are all kept"
        if found.left:
            note += f"; {len(found.left)} weights stay float, such as '{found.left[0]}'"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        return _Made(path.name, onnx_runner(path), note, parameters, macs, runtime="onnxruntime", rounds_off=True)

    def edge(self) -> _Made:
        """In eight bits for ExecuTorch on a CPU."""
        path = self.folder / "model.pte"
        left = save_executorch(self.base, self.inputs, path, self._calibration())
        note = f"one sample at a time; {compressed_size(path):,} bytes compressed"
        if left:
            note += f"; not run by XNNPACK: {', '.join(left)}"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        run = executorch_runner(path)
        return _Made(path.name, run, note, parameters, macs, runtime="executorch", rounds_off=True)

    def ethos_u85(self) -> _Made:
        """In eight bits for an accelerator that stores no zeros."""
        path, beside = self.folder / "model-ethos-u85.pte", self.folder / "filled.pte"
        estimates, left = save_ethos_u85(self.base, self.inputs, path, self._calibration())
        without, _ = save_ethos_u85(_filled(self.base), self.inputs, beside, self._calibration())
        estimates |= {f"{what} if no weight were zero": number for what, number in without.items()}
        note = "for one sample at a time; outputs cannot be checked without Arm's simulator or the device"
        if left:
            note += f"; not run by it: {', '.join(left)}"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        return _Made(path.name, None, note, parameters, macs, runtime="ethos-u85", estimates=estimates)

    def _calibration(self) -> list[Call]:
        if self.quantization is None:
            raise ValueError("int8 is calibrated on training batches; give quantization=Quantization(batches).")
        return self.quantization.calls

    # ---- the dense model in every runtime ---------------------------------------------------------------------------------

    def dense_onnx(self) -> _Made:
        """The masked model as it was trained in onnxruntime: what that runtime does without a rung."""
        path = self.folder / "model.onnx"
        if self.blueprint != Blueprint() or not path.exists():
            path = self.folder / "dense.onnx"
            save_onnx(self.dense, self.inputs, path)
        note = f"{compressed_size(path):,} bytes compressed; for comparison, not written"
        return self._dense(path.name, onnx_runner(path), note, "onnxruntime")

    def dense_executorch(self) -> _Made:
        """The masked model as it was trained, in float32."""
        path = self.folder / "dense.pte"
        save_executorch(self.dense, self.inputs, path)
        return self._dense(path.name, executorch_runner(path), "in float32; for comparison, not written", "executorch")

    def _dense(self, file: str, run: Callable[[Call], Any], note: str, runtime: Runtime) -> _Made:
        macs = sum(self.macs(self.dense).values())
        return _Made(file, run, note, count_parameters(self.dense), macs, runtime=runtime)

    # ---- parts of rungs ---------------------------------------------------------------------------------------------------

    def _with_kernels(self, file: str, model: nn.Module, choices: Sequence[KernelChoice]) -> _Made:
        kernels = {choice.layer: choice.chosen for choice in choices if choice.chosen != "dense"}
        if not kernels:
            reasons = "; ".join(f"'{c.layer}': {c.note or 'fastest dense'}" for c in choices[:3]) or "there is none"
            raise ValueError(f"no linear layer is faster with a sparse kernel ({reasons}).")
        named = ", ".join(f"{name} {kernel}" for name, kernel in kernels.items())
        left = len(choices) - len(kernels)
        note = f"{named}{f'; {left} linear layers stay dense' if left else ''}"
        made = self._saved(file, model, replace(self.blueprint, kernels=kernels), note)
        sparse = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in kernels}
        made.macs = sum(effective_macs(self.macs(model), sparse).values())
        return made

    def _saved(self, file: str, model: nn.Module, blueprint: Blueprint, note: str) -> _Made:
        """Write a model, and take what the file makes of the whole one: that is what will be loaded."""
        save_model(model, self.folder / file, blueprint)
        return self._made(file, load_model(copy_model(self.dense), self.folder / file), note, model)

    def _made(self, file: str, model: nn.Module, note: str, like: nn.Module | None = None) -> _Made:
        """An artifact with the size of a model that is like it, but has no kernels that cannot be counted."""
        like = like or model
        macs = sum(self.macs(like).values())
        return _Made(file, partial(_call, callee(model, self.inputs.network)[1]), note, count_parameters(like), macs, model)

    def _no_faster(self) -> str:
        folded = f"{len(self.blueprint.folded)} normalizations are folded; " if self.blueprint.folded else ""
        return f"{folded}{self.zeros:.1%} zeros, which a dense kernel multiplies like any other number: no faster"


RUNGS: dict[str, Callable[[_Ladder], _Made]] = {
    "plain": _Ladder.plain,
    "compact": _Ladder.compact,
    "merged": _Ladder.merged,
    "removed": _Ladder.removed,
    "kernels": _Ladder.kernels,
    "semi_structured": _Ladder.semi_structured,
    "onnx": _Ladder.onnx,
    "int8": _Ladder.int8,
    "edge": _Ladder.edge,
    "ethos_u85": _Ladder.ethos_u85,
}
"""In the order in which they are climbed."""


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
    """Make every artifact that suits a sparse model, verify each against it, measure all beside it, and write them.

    `plain`: a state dict. `compact`: the same without zeros. `merged`: without layers that act linearly. `removed`: without
    dead neurons and filters; the rungs after it stand on it. `kernels`: linear layers in CSR or BSR where that is faster
    here. `semi_structured`: 2:4, on the sparse tensor cores of a GPU. `onnx`. `int8`: ONNX in eight bits. `edge`: a
    program in eight bits for ExecuTorch on a CPU. `ethos_u85`: one for Arm's accelerator, which stores no zeros.

    What is verified is what a file makes of the model, and nothing is written before all are verified. A rung gains what it
    gains beside the dense model in its own runtime, so each runtime has a dense row; what is slower than that and no smaller
    is left out unless `rungs` names it.

    Args:
        model: trained, with exact zeros; it stays as it is.
        inputs: real ones, as many as a batch will have in use; a tuple holds positional arguments, a dictionary named ones.
        to: the folder to write.
        network: the part of the model that takes the inputs, by name; None finds it.
        rungs: which; None takes all that suit, and the report says why the others do not.
        tolerance: the largest change of an output, as a share of the largest output (or of 1 if that is smaller); in half
            precision four of its roundings are allowed.
        fold: batch normalization into the layers in front of it, in all rungs but `merged`.
        input_range: the least and largest input, such as (0, 1), by which `merged` may judge the first layer.
        rounds: of calls by which latency is measured; 0 to not measure.
        compiled: measure the dense model and smaller networks under `torch.compile` too, which takes half a minute each.
        evaluate: metrics of a model, such as its accuracy on a test set.
        quantization: how rungs in eight bits are calibrated and judged; None leaves them out.
        overwrite: files in the folder.

    Raises:
        ValueError: if a rung is unknown, one that was named is not possible, or one fails its verification.
    """
    if is_cut(model):
        raise ValueError(
            f"{type(model).__name__} is cut into shards, and an export needs whole weights; save a checkpoint, and give the "
            "plain model after model.load_state_dict(whole_weights(path))."
        )
    call = Call.of(inputs, network)
    names = _check(rungs, to, call, tolerance, input_range, rounds, overwrite)
    options = {"fold": fold, "input_range": input_range, "tolerance": tolerance, "quantization": quantization}
    with tempfile.TemporaryDirectory() as folder:
        ladder = _Ladder(model, call, Path(folder), options)
        climb = _Climb(ladder, forced=rungs is not None)
        for name in names:
            climb.take(name)
        if evaluate is not None:
            climb.evaluate(evaluate)
        climb.judge_what_rounds_off()
        if rounds:
            climb.compare_runtimes(compiled)
            climb.time(rounds)
            climb.leave_out_what_is_no_gain()
        climb.report.choices = ladder.choices
        climb.write(Path(to))
    return climb.report


class _Climb:
    """One climb of the ladder: what was made so far, and the report on it.

    Args:
        ladder: that is climbed.
        forced: whether rungs were named, so that one which is not possible is an error.
    """

    def __init__(self, ladder: _Ladder, forced: bool) -> None:
        self.ladder, self.forced = ladder, forced
        dense, call = ladder.dense, ladder.inputs
        kind = type(dense).__name__
        try:
            self.expected = _call(callee(dense, call.network)[1], call)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{kind} cannot be called with these inputs ({first_line(error)}); give its arguments as a "
                "tuple or a dictionary, or the network that takes them."
            ) from error
        self.made: dict[str, _Made] = {}
        self.errors: dict[str, float] = {}
        """Of outputs, as a share of them, where a rung rounds off."""
        self.timed: dict[str, Callable[[Call], Any]] = {"dense": partial(_call, callee(dense, call.network)[1])}
        """Everything that is measured, artifacts and dense rows."""
        self.report = ExportReport(kind, ladder.zeros, call.samples, torch.get_num_threads(), str(_device(dense)))
        self.report.rungs["dense"] = Rung(
            bytes=sum(t.numel() * t.element_size() for t in ladder.dense.state_dict().values()),
            parameters=count_parameters(dense),
            macs=sum(ladder.macs(dense).values()),
            note="the masked model as it was trained",
        )

    def take(self, name: str) -> None:
        """Make a rung and verify it, or note why there is none."""
        try:
            rung = RUNGS[name](self.ladder)
            found = self.expected if rung.run is None else rung.run(self.ladder.inputs)
        except Exception as error:  # libraries and kernels have many ways to say that they cannot
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
        """The dense model in every runtime that a rung needs, as a row of its own, and networks compiled, if wanted."""
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

    def _add_dense(self, runtime: Runtime, make: Callable[[], _Made]) -> None:
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
            run = partial(_call, called)
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
        """All in turns, at batch 1 and at that of the inputs; what is compiled is compiled for that of the inputs."""
        dense, inputs = self.ladder.dense, self.ladder.inputs
        for batch in dict.fromkeys((1, inputs.samples)):
            x = inputs.first(batch).fit(dense)
            able = {name: run for name, run in self.timed.items() if batch == inputs.samples or not name.endswith("compile")}
            with torch.no_grad():
                found = interleaved({name: partial(run, x) for name, run in able.items()}, rounds, _device(dense))
            for name, timing in found.items():
                self.report.rungs[name].latency[batch] = timing

    def leave_out_what_is_no_gain(self) -> None:
        """A rung that nobody named, and that is slower than dense in its own runtime without being smaller."""
        for name in [] if self.forced else list(self.made):
            share = self.report.share(name)
            if self.report.is_other_network(name) and self.report.pace(name) == "slower" and (share is None or share > 0.95):
                rung = self.report.rungs[name]
                where = "" if rung.runtime == "torch" else f" in {rung.runtime}"
                rung.note = f"left out: slower than dense{where} and no smaller; {rung.note}"
                rung.file = None
                del self.made[name]

    def evaluate(self, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> None:
        """Metrics of everything that is a module, or can stand in for one."""
        for name, module in {"dense": self.ladder.dense, **{n: m.module for n, m in self.made.items()}}.items():
            if module is not None:
                self.report.rungs[name].metrics = dict(evaluate(module))
        for name in self.errors:
            elsewhere = Elsewhere(self.ladder.dense, self.ladder.inputs, self.timed[name])
            metrics = dict(evaluate(elsewhere.module))
            if elsewhere.calls:
                self.report.rungs[name].metrics = metrics
            else:
                self.report.rungs[name].note += "; evaluate does not call its network, so it has no metrics"

    def judge_what_rounds_off(self) -> None:
        """Metrics where there are some, else outputs, must be close enough to those of the dense model."""
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
        """The files and the report."""
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
        raise ValueError(f"rungs={rungs} names none; choose from {list(RUNGS)}, or leave it out for all that suit.")
    if not inputs.samples:
        raise ValueError("inputs holds no sample; give a batch of real ones.")
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be above 0: rounding alone changes outputs a little.")
    if input_range is not None and not (len(input_range) == 2 and input_range[0] < input_range[1]):
        raise ValueError(f"input_range={input_range} must be the least and the largest input, such as [0, 1].")
    if rounds < 0:
        raise ValueError(f"rounds={rounds} must be 0, for no measurement, or more.")
    if Path(to).is_file() or (Path(to).is_dir() and any(Path(to).iterdir()) and not overwrite):
        raise ValueError(f"to='{to}' already exists; name a new folder, or set overwrite.")
    return [name for name in RUNGS if rungs is None or name in rungs]


def _verified(name: str, made: _Made, found: Any, expected: Any, tolerance: float, folder: Path) -> Rung:
    """The row of a rung whose outputs are those of the dense model.

    Raises:
        ValueError: if they are not.
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


@torch.no_grad()
def _call(called: nn.Module, call: Call) -> Any:
    fitted = call.fit(called)
    return called(*fitted.args, **fitted.kwargs)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _filled(model: nn.Module) -> nn.Module:
    """A copy in which random numbers stand for the zeros of each weight, as large as its others."""
    model = copy_model(model)
    dice = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1 and bool((kept := weight != 0).any()):
            noise = torch.randn(weight.shape, generator=dice).to(weight) * weight[kept].square().mean().sqrt()
            weight.copy_(torch.where(kept, weight, noise))
    return model


def _zeros(model: nn.Module) -> float:
    """Share of zeros in all weights of two or more dimensions."""
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
