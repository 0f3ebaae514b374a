"""The artifacts of an export: one function per artifact; each builds on the result of the previous ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_sparse.core import Call, callee, copy_model, count_macs, effective_macs, first_line, without_nested_tensors
from lightning_sparse.export.batch_norm import fold_norms
from lightning_sparse.export.blueprint import Blueprint, load_model, save_model
from lightning_sparse.export.compare_models import runner, steady
from lightning_sparse.export.edge import ethos_u85_job, executorch_job, executorch_runner
from lightning_sparse.export.export_report import Runtime
from lightning_sparse.export.int8 import save_int8
from lightning_sparse.export.kernel_choice import KernelChoice
from lightning_sparse.export.kernels import choose_kernels
from lightning_sparse.export.lowering import Job, Lowered, SecondProcess
from lightning_sparse.export.merge import merge_layers
from lightning_sparse.export.merge_report import count_parameters
from lightning_sparse.export.onnx import batch_sizes, compressed_size, onnx_runner, save_onnx
from lightning_sparse.export.quantization import Quantization
from lightning_sparse.export.removal import remove_dead
from lightning_sparse.export.semi_structured import choose_semi_structured

__all__ = ["RUNGS", "UNTIMED", "Ladder", "Made", "RungName", "call_with", "device_of"]

RungName = Literal[
    "plain", "compact", "merged", "removed", "kernels", "semi_structured", "onnx", "int8", "edge", "ethos_u85"
]
"""The name of a rung of the export ladder."""


@dataclass
class Made:
    """An artifact in the temporary folder, and a function that runs it."""

    file: str
    run: Callable[[Call], Any] | None
    """None if it cannot run on this machine."""
    note: str
    parameters: int | None = None
    macs: int | None = None
    module: nn.Module | None = None
    runtime: Runtime = "torch"
    compiles: bool = False
    """Whether it is a separate network that torch.compile supports."""
    rounds_off: bool = False
    """Whether its outputs must match the dense model within what `Quantization` allows, not within the tolerance."""
    estimates: Mapping[str, float] = field(default_factory=dict)


class Ladder:
    """The model, inputs and options that all rungs share."""

    def __init__(self, model: nn.Module, inputs: Call, folder: Path, options: Mapping[str, Any]) -> None:
        self.dense, self.inputs, self.folder = without_nested_tensors(copy_model(model).eval()), inputs, folder
        self.input_range = options["input_range"]
        kind = next(self.dense.parameters()).dtype
        self.tolerance = max(options["tolerance"], 4 * torch.finfo(kind).eps)  # half precision has larger rounding errors
        self.expected = self._expected()
        self.base, self.blueprint = (
            fold_norms(self.dense, inputs) if options["fold"] else (copy_model(self.dense), Blueprint())
        )
        self.quantization: Quantization | None = options["quantization"]
        self.choices: list[KernelChoice] = []
        self._begun: dict[str, Callable[[], Lowered]] = {}
        self.zeros = _zeros(self.dense)

    def _expected(self) -> Any:
        """Return the outputs of the dense model."""
        dense, call = self.dense, self.inputs
        try:
            return steady(partial(call_with, callee(dense, call.network)[1], call), type(dense).__name__, self.tolerance)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{type(dense).__name__} cannot be called with these inputs ({first_line(error)}); give its arguments as a "
                "tuple or a dictionary, or the network that takes them."
            ) from error

    def macs(self, model: nn.Module) -> dict[str, int]:
        """Return the multiply-accumulates per sample, by weight."""
        return count_macs(model, runner(model, self.inputs), self.inputs.samples)

    # ---- rungs ------------------------------------------------------------------------------------------------------------

    def plain(self) -> Made:
        """Make a state dict that loads strictly."""
        path = self.folder / "plain.pt"
        torch.save({name: tensor.cpu() for name, tensor in self.base.state_dict().items()}, path)
        loaded = self.blueprint.apply(copy_model(self.dense))
        loaded.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return self._made("plain.pt", loaded, self._no_faster())

    def compact(self) -> Made:
        """Make the same file without the zeros."""
        return self._saved("compact.safetensors", self.base, self.blueprint, f"smaller on disk only; {self._no_faster()}")

    def merged(self) -> Made:
        """Merge layers that act linearly: a shallower network, as a separate program."""
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
        return Made(path.name, partial(call_with, program), note, report.parameters[1], macs, model, compiles=True)

    def removed(self) -> Made:
        """Remove the channels that do nothing; later rungs build on the result."""
        smaller, removal = remove_dead(self.base, self.inputs, tolerance=self.tolerance)
        blueprint = replace(self.blueprint, kept=removal.blueprint.kept, sizes=removal.blueprint.sizes)
        gone = [f"{sum(removal.heads.values()):,} heads of {len(removal.heads)} attentions"] if removal.heads else []
        gone += [f"{sum(removal.removed.values()):,} outputs of {len(removal.removed)} layers"] if removal.removed else []
        note = f"{' and '.join(gone)} are gone"
        if removal.carriers:
            note += f"; {sum(removal.carriers.values())} dead ones stay to carry a constant where zeros are padded"
        if removal.refused:
            name, reason = next(iter(removal.refused.items()))
            note += f"; {len(removal.refused)} groups stay, such as '{name}': {reason}"
        made = self._saved("removed.safetensors", smaller, blueprint, note)
        made.compiles = True
        self.base, self.blueprint = smaller, blueprint
        return made

    def kernels(self) -> Made:
        """Store linear layers in the format that is fastest on this machine."""
        self.choices = choose_kernels(self.base, self.inputs)
        return self._with_kernels("kernels.safetensors", self.base, self.choices)

    def semi_structured(self) -> Made:
        """Run linear layers on the sparse tensor cores of a GPU."""
        if device_of(self.dense).type != "cuda":
            raise ValueError("2:4 needs the model on a CUDA device, in bfloat16 or float16.")
        choices = choose_semi_structured(self.base, self.inputs)
        self.choices += choices
        return self._with_kernels("semi_structured.safetensors", self.base, choices)

    def onnx(self) -> Made:
        """Export to ONNX, for onnxruntime and other runtimes that read it."""
        if (kind := next(self.base.parameters()).dtype) not in (torch.float32, torch.float64):
            raise ValueError(f"onnxruntime would check it on the CPU, which does not support {kind}; use float32.")
        path = self.folder / "model.onnx"
        save_onnx(self.base, self.inputs, path)
        note = f"{compressed_size(path):,} bytes compressed"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        return Made(path.name, onnx_runner(path), note, parameters, macs, runtime="onnxruntime")

    def int8(self) -> Made:
        """Quantize to int8 and keep all zeros."""
        path = self.folder / "model-int8.onnx"
        found = save_int8(self.base, self.inputs, path, self._calibration())
        note = f"{compressed_size(path):,} bytes compressed; {found.zeros:,} zeros of {found.weights:,} weights are all kept"
        if found.left:
            note += f"; {len(found.left)} weights stay float, such as '{found.left[0]}'"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        return Made(path.name, onnx_runner(path), note, parameters, macs, runtime="onnxruntime", rounds_off=True)

    def edge(self) -> Made:
        """Quantize to int8 for ExecuTorch on a CPU."""
        path = self.folder / _FILES["edge"]
        left = self._lowered("edge").left
        note = f"one sample at a time; {compressed_size(path):,} bytes compressed"
        if left:
            note += f"; not run by XNNPACK: {', '.join(left)}"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        run = executorch_runner(path)
        return Made(path.name, run, note, parameters, macs, runtime="executorch", rounds_off=True)

    def ethos_u85(self) -> Made:
        """Quantize to int8 for an accelerator that stores no zeros."""
        lowered = self._lowered("ethos_u85")
        without = self._lowered("filled") if self._stores_zeros() else lowered
        estimates = lowered.estimates | {f"{what} if no weight were zero": n for what, n in without.estimates.items()}
        note = "for one sample at a time; outputs cannot be checked without Arm's simulator or the device"
        if lowered.left:
            note += f"; not run by it: {', '.join(lowered.left)}"
        parameters, macs = count_parameters(self.base), sum(self.macs(self.base).values())
        return Made(_FILES["ethos_u85"], None, note, parameters, macs, runtime="ethos-u85", estimates=estimates)

    def _calibration(self) -> list[Call]:
        if self.quantization is None:
            raise ValueError("int8 is calibrated on training batches; give quantization=Quantization(batches).")
        return self.quantization.calls

    # ---- the dense model in every runtime ---------------------------------------------------------------------------------

    def dense_onnx(self) -> Made:
        """Run the masked model as trained in onnxruntime, as the baseline of that runtime."""
        path = self.folder / "model.onnx"
        if self.blueprint != Blueprint() or not path.exists():
            path = self.folder / "dense.onnx"
            save_onnx(self.dense, self.inputs, path)
        note = f"{compressed_size(path):,} bytes compressed; for comparison, not written"
        return self._dense(path.name, onnx_runner(path), note, "onnxruntime")

    def dense_executorch(self) -> Made:
        """Run the masked model as trained in ExecuTorch, in float32, as the baseline of that runtime."""
        path = self.folder / _FILES["dense"]
        self._lowered("dense")
        return self._dense(path.name, executorch_runner(path), "in float32; for comparison, not written", "executorch")

    def _dense(self, file: str, run: Callable[[Call], Any], note: str, runtime: Runtime) -> Made:
        macs = sum(self.macs(self.dense).values())
        return Made(file, run, note, count_parameters(self.dense), macs, runtime=runtime)

    # ---- programs for ExecuTorch ------------------------------------------------------------------------------------------

    @contextmanager
    def second_process(self, names: Sequence[str], times: bool, compiles: bool) -> Iterator[None]:
        """While active, a second process lowers what this one will need after the first program.

        Args:
            names: the rungs to come.
            times: whether the dense model's program will be needed.
            compiles: whether torch.compile will be needed.
        """
        wanted = [name for name in ("ethos_u85", "edge") if name in names]
        wanted += ["filled"] if "ethos_u85" in names and self._stores_zeros() else []
        if len(wanted) < 2 or self.quantization is None or not find_spec("executorch"):
            yield
            return
        second = SecondProcess()
        try:
            for name in wanted[1:] + (["dense"] if times and "edge" in names else []):
                with suppress(Exception):  # the rung will say so
                    self._begun[name] = second.lower(self._job(name))
            if compiles:
                second.warm_up()
            yield
        finally:
            second.close()

    def _job(self, name: str) -> Job:
        path = self.folder / _FILES[name]
        if name == "dense":
            return executorch_job(self.dense, self.inputs, path)
        model = _filled(self.base) if name == "filled" else self.base
        return (executorch_job if name == "edge" else ethos_u85_job)(model, self.inputs, path, self._calibration())

    def _lowered(self, name: str) -> Lowered:
        """Lower a program, unless the second process did."""
        return self._begun[name]() if name in self._begun else self._job(name).run()

    def _stores_zeros(self) -> bool:
        return any(weight.ndim > 1 and bool((weight == 0).any()) for weight in self.base.parameters())

    # ---- parts of rungs ---------------------------------------------------------------------------------------------------

    def _with_kernels(self, file: str, model: nn.Module, choices: Sequence[KernelChoice]) -> Made:
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

    def _saved(self, file: str, model: nn.Module, blueprint: Blueprint, note: str) -> Made:
        """Write a model, and load the file into a copy of the dense model, as users will do."""
        save_model(model, self.folder / file, blueprint)
        return self._made(file, load_model(copy_model(self.dense), self.folder / file), note, model)

    def _made(self, file: str, model: nn.Module, note: str, like: nn.Module | None = None) -> Made:
        """Return an artifact; its size is counted on `like`, an equal model without kernels that cannot be counted."""
        like = like or model
        macs = sum(self.macs(like).values())
        return Made(
            file, partial(call_with, callee(model, self.inputs.network)[1]), note, count_parameters(like), macs, model
        )

    def _no_faster(self) -> str:
        folded = f"{len(self.blueprint.folded)} normalizations are folded; " if self.blueprint.folded else ""
        return f"{folded}{self.zeros:.1%} zeros, which a dense kernel multiplies like any other number: no faster"


_FILES = {"edge": "model.pte", "ethos_u85": "model-ethos-u85.pte", "filled": "filled.pte", "dense": "dense.pte"}
"""The files of programs for ExecuTorch."""

RUNGS: dict[str, Callable[[Ladder], Made]] = {
    "plain": Ladder.plain,
    "compact": Ladder.compact,
    "merged": Ladder.merged,
    "removed": Ladder.removed,
    "kernels": Ladder.kernels,
    "semi_structured": Ladder.semi_structured,
    "onnx": Ladder.onnx,
    "int8": Ladder.int8,
    "edge": Ladder.edge,
    "ethos_u85": Ladder.ethos_u85,
}
"""The rungs by name; each builds on the result of the ones before it."""

UNTIMED = ("onnx", "int8", "ethos_u85", "edge")
"""Rungs that measure nothing while they are made, in the order in which they are made: a second process lowers the last."""


@torch.no_grad()
def call_with(called: nn.Module, call: Call) -> Any:
    """Return a network's outputs, without gradients, for a call that is moved to its device and dtype."""
    fitted = call.fit(called)
    return called(*fitted.args, **fitted.kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights."""
    return next(model.parameters()).device


@torch.no_grad()
def _filled(model: nn.Module) -> nn.Module:
    """Return a copy with the zeros of each weight replaced by random numbers at the scale of its other entries."""
    model = copy_model(model)
    dice = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1 and bool((kept := weight != 0).any()):
            noise = torch.randn(weight.shape, generator=dice).to(weight) * weight[kept].square().mean().sqrt()
            weight.copy_(torch.where(kept, weight, noise))
    return model


def _zeros(model: nn.Module) -> float:
    """Return the fraction of zeros in all weights with two or more dimensions."""
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
