"""Programs for ExecuTorch: in eight bits for a CPU (XNNPACK), and for Arm's Ethos-U85, which stores no zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import Call, callee, copy_model, kind_of
from lightning_sparse.export.batch_norm import fold_norms
from lightning_sparse.export.lowering import Job, compiling, ethos_u85, need_compiler, need_edge
from lightning_sparse.export.quantization import check_reached

__all__ = ["check_codes", "ethos_u85_job", "executorch_job", "executorch_runner", "save_ethos_u85", "save_executorch"]


def save_executorch(
    model: nn.Module, inputs: Any, path: str | Path, calibration: Sequence[Any] = (), network: str | None = None
) -> list[str]:
    """Write a model as an ExecuTorch program for a CPU, one sample at a time; returns operators that XNNPACK does not run.

    Args:
        model: trained, with exact zeros.
        inputs: a batch; a tuple holds positional arguments, a dict holds keyword arguments.
        path: path of the file.
        calibration: batches of training inputs, for an int8 program: one scale per output and no zero point, so that zero is
            code 0. Without any, the program computes in float32.
        network: name of the submodule that takes the inputs; None finds it.

    Raises:
        ValueError: if executorch is missing, the calibration data never reaches a layer, an operator has no kernel, or a
            zero would be lost.
    """
    return executorch_job(model, inputs, path, calibration, network).run().left


def executorch_job(
    model: nn.Module, inputs: Any, path: str | Path, calibration: Sequence[Any] = (), network: str | None = None
) -> Job:
    """Prepare what `save_executorch` lowers."""
    need_compiler("ExecuTorch")
    call = Call.of(inputs, network)
    called, one = _prepared(model, call, calibration)
    name = type(model).__name__
    with compiling(name, "ExecuTorch"):
        if calibration:
            library = need_edge("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
            config = library.get_symmetric_quantization_config(is_per_channel=True)
            quantizer = library.XNNPACKQuantizer().set_global(config)
            patterns = quantizer.SUPPORTED_PATTERNS  # to look for normalizations takes seconds, and they are folded
            quantizer.SUPPORTED_PATTERNS = [pattern for pattern in patterns if "_bn" not in pattern.name]
            called = _quantized(called, one, quantizer, calibration)
        program = torch.export.export(called, one.args, dict(one.kwargs))
    return Job(program, "ExecuTorch", Path(path), name)


def save_ethos_u85(
    model: nn.Module, inputs: Any, path: str | Path, calibration: Sequence[Any], network: str | None = None
) -> tuple[dict[str, float], list[str]]:
    """Write a model as an int8 program for Arm's Ethos-U85-256, compiled by Vela, for one sample at a time.

    Vela encodes weights without their zeros, so here unstructured sparsity makes a program smaller. Linear layers have one
    scale, which gives smaller codes that take fewer bits; convolutions have one per output. Nothing can be run here: outputs
    need Arm's simulator or the device, and the numbers are the compiler's estimates.

    Args:
        model: trained, with exact zeros.
        inputs: a batch; a tuple holds positional arguments, a dictionary named ones.
        path: of the file.
        calibration: batches of training inputs.
        network: the part of the model that takes the inputs, by name; None finds it.

    Returns:
        Vela's estimates (bytes of encoded weights, multiply-accumulates, cycles), and operators that stay on the CPU.

    Raises:
        ValueError: if executorch or ethos-u-vela is missing, the calibration data never reaches a layer, or a zero would be
            lost.
    """
    lowered = ethos_u85_job(model, inputs, path, calibration, network).run()
    return lowered.estimates, lowered.left


def ethos_u85_job(
    model: nn.Module, inputs: Any, path: str | Path, calibration: Sequence[Any], network: str | None = None
) -> Job:
    """Prepare what `save_ethos_u85` lowers."""
    need_compiler("Vela")
    library = need_edge("executorch.backends.arm.quantizer")
    call = Call.of(inputs, network)
    called, one = _prepared(model, call, calibration)
    name = type(model).__name__
    with compiling(name, "Vela"):
        by_output, by_layer = (library.get_symmetric_quantization_config(is_per_channel=each) for each in (True, False))
        quantizer = library.EthosUQuantizer(ethos_u85()).set_global(by_output).set_module_type(nn.Linear, by_layer)
        converted = _quantized(called, one, quantizer, calibration)
        program = torch.export.export(converted, one.args, dict(one.kwargs))
    return Job(program, "Vela", Path(path), name)


def executorch_runner(path: str | Path) -> Callable[[Any], Any]:
    """A function that runs a program in ExecuTorch's own runtime, sample by sample.

    Tensors among its inputs are passed in order.
    """
    return _Program(path)


class _Program:
    """A loaded program; the runtime reads from its source buffer until the end."""

    def __init__(self, path: str | Path) -> None:
        runtime = need_edge("executorch.runtime").Runtime.get()
        self.data = Path(path).read_bytes()
        self.program = runtime.load_program(self.data)
        self.method = self.program.load_method("forward")

    def __call__(self, inputs: Any) -> Any:
        rows = []
        for sample in samples_of(Call.of(inputs)):
            outputs = self.method.execute([tensor.detach().cpu().contiguous() for tensor in sample.tensors])
            rows.append([tensor.clone() for tensor in outputs])  # the next call writes into the same memory
        found = [torch.cat(column) for column in zip(*rows, strict=True)]
        return found[0] if len(found) == 1 else found


def samples_of(call: Call) -> Iterator[Call]:
    """One call per sample."""
    for row in range(call.samples):
        yield call.map(lambda tensor, row=row: tensor[row : row + 1] if call.is_batch(tensor) else tensor)  # type: ignore[misc]


# ---- what both have in common -------------------------------------------------------------------------------------------


def _prepared(model: nn.Module, call: Call, calibration: Sequence[Any]) -> tuple[nn.Module, Call]:
    """The network with its normalizations folded, and one sample."""
    whole = fold_norms(model, call)[0] if calibration else copy_model(model)
    called = callee(whole.eval(), call.network)[1]
    given = Call(call.args, call.kwargs).fit(called)
    if calibration:
        check_reached(called, given, [_of_itself(batch).fit(called) for batch in calibration])
    return called, given.first(1)


def _of_itself(batch: Any) -> Call:
    """A call of the network itself."""
    return replace(Call.of(batch), network=None)


_SAMPLES = 256
"""How many samples calibrate a network that takes no batch, evenly spread over the batches; each is a pass of its own."""


@torch.no_grad()
def _quantized(called: nn.Module, one: Call, quantizer: Any, calibration: Sequence[Any]) -> Any:
    """The network for one sample in int8, with ranges from the calibration data."""
    tools = need_edge("torchao.quantization.pt2e.quantize_pt2e", "torchao")

    def observed(call: Call) -> Any:
        program = torch.export.export(called, call.args, dict(call.kwargs))
        return tools.prepare_pt2e(program.module(check_guards=False), quantizer)  # Arm's passes take no guards

    single = observed(one)
    batches = [_of_itself(batch).fit(called) for batch in calibration]
    left = _observe_batches(observed, batches, single)
    samples = [sample for batch in left for sample in samples_of(batch)]
    for sample in samples[:: -(-len(samples) // _SAMPLES) or 1]:
        single.forward(*sample.args, **sample.kwargs)
    converted = tools.convert_pt2e(single)
    weights = [
        weight.detach()
        for layer in called.modules()
        for name, weight in layer.named_parameters(recurse=False)
        if kind_of(layer, name) is not None
    ]
    sizes = {weight.shape for weight in weights}  # what scales the outputs of a layer is no weight, and has an offset
    check_codes(weights, [held for held in (*converted.buffers(), *converted.parameters()) if held.shape in sizes])
    return converted


def _observe_batches(observed: Callable[[Call], Any], batches: Sequence[Call], single: Any) -> Sequence[Call]:
    """Give the graph for one sample the ranges of all batches that are as large as the first one; returns the other batches.

    A network that takes no batch, or whose graph depends on the batch size, leaves them all.
    """
    alike = [batch for batch in batches if batch.samples == batches[0].samples]
    try:
        several = observed(batches[0])
        for batch in alike:
            several.forward(*batch.args, **batch.kwargs)  # a graph module that is called prints its errors
    except Exception:
        return batches
    operators = [[node.target for node in graph.graph.nodes if node.op != "get_attr"] for graph in (single, several)]
    state = several.state_dict()
    if operators[0] != operators[1] or state.keys() != single.state_dict().keys():
        return batches
    single.load_state_dict(state)
    return [batch for batch in batches if batch.samples != batches[0].samples]


def check_codes(weights: Sequence[Tensor], tensors: Iterable[Tensor]) -> None:
    """Check that every int8 matrix is the rounding of a weight, with code 0 wherever the weight is zero.

    Args:
        weights: in float.
        tensors: of the converted network; those that are not int8 matrices are ignored.

    Raises:
        ValueError: if one is not.
    """
    for codes in tensors:
        if codes.dtype is not torch.int8 or codes.ndim < 2:
            continue
        alike = [weight for weight in weights if weight.shape == codes.shape and _has_signs_of(weight, codes)]
        if not any(not bool(codes[weight == 0].any()) for weight in alike):
            raise ValueError(f"zeros of a weight of shape {tuple(codes.shape)} would be lost: their code is not 0.")


def _has_signs_of(weight: Tensor, codes: Tensor) -> bool:
    """Whether codes can belong to a weight, whatever their scales: signs agree where neither is zero."""
    both = (weight != 0) & (codes != 0)
    return torch.equal(weight[both].sign(), codes[both].sign().to(weight.dtype))
