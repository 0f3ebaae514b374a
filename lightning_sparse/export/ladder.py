"""The ladder: from weights with zeros to smaller and faster artifacts, each verified before anything is written."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_sparse.core import Call, callee, copy_model, count_macs, effective_macs, first_line, is_cut
from lightning_sparse.export.batch_norm import fold_norms
from lightning_sparse.export.blueprint import Blueprint, load_model, save_model
from lightning_sparse.export.compare_models import difference, interleaved, runner
from lightning_sparse.export.export_report import ExportReport, Rung
from lightning_sparse.export.kernel_choice import KernelChoice
from lightning_sparse.export.kernels import choose_kernels
from lightning_sparse.export.merge import merge_layers
from lightning_sparse.export.merge_report import count_parameters
from lightning_sparse.export.onnx import batch_sizes, compressed_size, onnx_runner, save_onnx
from lightning_sparse.export.removal import remove_dead
from lightning_sparse.export.semi_structured import choose_semi_structured

__all__ = ["RUNGS", "RungName", "export_ladder"]

RungName = Literal["plain", "compact", "merged", "removed", "kernels", "semi_structured", "onnx"]

SLOWER = 1.05
"""Times the dense median; what takes longer is no gain, whatever it is called."""


@dataclass
class _Made:
    """An artifact in the temporary folder, and what runs it."""

    file: str
    run: Callable[[Call], Any]
    note: str
    parameters: int | None = None
    macs: int | None = None
    module: nn.Module | None = None


class _Ladder:
    """What all rungs stand on."""

    def __init__(self, model: nn.Module, inputs: Call, folder: Path, options: Mapping[str, Any]) -> None:
        self.dense, self.inputs, self.folder = copy_model(model).eval(), inputs, folder
        self.input_range = options["input_range"]
        kind = next(self.dense.parameters()).dtype
        self.tolerance = max(options["tolerance"], 4 * torch.finfo(kind).eps)  # half precision rounds more than that
        self.base, self.blueprint = fold_norms(self.dense) if options["fold"] else (copy_model(self.dense), Blueprint())
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
        return _Made(path.name, partial(_call, program), note, report.parameters[1], sum(self.macs(model).values()), model)

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
        note = f"{compressed_size(path):,} bytes compressed; measured in onnxruntime on the CPU"
        return _Made(path.name, onnx_runner(path), note, count_parameters(self.base), sum(self.macs(self.base).values()))

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
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Make every artifact that suits a sparse model, verify each against it, measure all beside it, and write them.

    `plain`: a state dict. `compact`: the same without zeros. `merged`: without layers that act linearly. `removed`: without
    dead neurons and filters; the rungs after it stand on it. `kernels`: linear layers in CSR or BSR where that is faster
    here. `semi_structured`: 2:4, on the sparse tensor cores of a GPU. `onnx`. What is verified is what a file makes of the
    model. Nothing is written before all are verified; what turns out slower than dense is left out unless `rungs` names it.

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
        evaluate: metrics of a model, such as its accuracy on a test set.
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
    with tempfile.TemporaryDirectory() as folder:
        ladder = _Ladder(model, call, Path(folder), {"fold": fold, "input_range": input_range, "tolerance": tolerance})
        try:
            expected = _call(callee(ladder.dense, call.network)[1], call)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot be called with these inputs ({first_line(error)}); give its arguments as a "
                "tuple or a dictionary, or the network that takes them."
            ) from error
        made: dict[str, _Made] = {}
        report = ExportReport(type(model).__name__, ladder.zeros, call.samples, torch.get_num_threads(), str(_device(model)))
        report.rungs["dense"] = Rung(
            bytes=sum(t.numel() * t.element_size() for t in ladder.dense.state_dict().values()),
            parameters=count_parameters(ladder.dense),
            macs=sum(ladder.macs(ladder.dense).values()),
            note="the masked model as it was trained",
        )
        for name in names:
            try:
                rung = RUNGS[name](ladder)
                found = rung.run(call)
            except Exception as error:  # libraries and kernels have many ways to say that they cannot
                reason = str(error) if isinstance(error, ValueError) else f"it does not run ({first_line(error)})."
                if rungs is not None:
                    raise ValueError(f"rung '{name}': {reason.rstrip('.')}. Nothing was written.") from None
                report.rungs[name] = Rung(note=reason)
                continue
            report.rungs[name] = _verified(name, rung, found, expected, ladder.tolerance, Path(folder))
            made[name] = rung
        if rounds:
            _time(report, ladder.dense, made, call, rounds)
        for name in list(made):
            if rungs is None and report.is_slower(name, SLOWER):
                report.rungs[name].note = f"left out: slower than dense here; {report.rungs[name].note}"
                report.rungs[name].file = None
                del made[name]
        if evaluate is not None:
            for name, module in {"dense": ladder.dense, **{n: m.module for n, m in made.items()}}.items():
                if module is not None:
                    report.rungs[name].metrics = dict(evaluate(module))
        report.choices = ladder.choices
        Path(to).mkdir(parents=True, exist_ok=True)
        for rung in made.values():
            shutil.copyfile(Path(folder) / rung.file, Path(to) / rung.file)
        (Path(to) / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return report


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
    return Rung(made.file, size, made.parameters, made.macs, change, largest, note=made.note)


def _time(report: ExportReport, dense: nn.Module, made: Mapping[str, _Made], inputs: Call, rounds: int) -> None:
    """All beside each other, at batch 1 and at that of the inputs."""
    for batch in dict.fromkeys((1, inputs.samples)):
        x = inputs.first(batch).fit(dense)
        functions = {
            "dense": partial(_call, callee(dense, x.network)[1], x),
            **{name: partial(m.run, x) for name, m in made.items()},
        }
        with torch.no_grad():
            for name, timing in interleaved(functions, rounds, _device(dense)).items():
                report.rungs[name].latency[batch] = timing


@torch.no_grad()
def _call(called: nn.Module, call: Call) -> Any:
    fitted = call.fit(called)
    return called(*fitted.args, **fitted.kwargs)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _zeros(model: nn.Module) -> float:
    """Share of zeros in all weights of two or more dimensions."""
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
