"""ONNX export, verified in onnxruntime."""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import Call, callee, copy_model, first_line, need, silenced, tensors_in, without_origins

__all__ = ["batch_sizes", "compressed_size", "feed", "onnx_runner", "save_onnx"]


def save_onnx(model: nn.Module, inputs: Any, path: str | Path, network: str | None = None) -> int:
    """Write a model as ONNX, for batches of any size; returns its size in bytes.

    Args:
        model: in evaluation mode.
        inputs: a batch; a tuple holds positional arguments, a dict holds keyword arguments.
        path: path of the file.
        network: name of the submodule that takes the inputs; None finds it.

    Raises:
        ValueError: if onnx or onnxscript is missing, or torch cannot export the model.
    """
    need("onnx", "onnx")
    need("onnxscript", "onnxscript")
    call = Call.of(inputs, network)
    called = callee(copy_model(model).eval(), call.network)[1]
    several = call.first(2).at_least_two().fit(called)
    try:
        with warnings.catch_warnings(), silenced("torch.onnx"), without_origins(), torch.no_grad():
            warnings.simplefilter("ignore")
            if type(called(*several.args, **several.kwargs)) not in (Tensor, tuple, list, dict):
                called = _Leaves(called)
            sizes = batch_sizes(called, several)
            if len(several.args) == 1 and isinstance(several.args[0], Tensor) and not several.kwargs:
                program = torch.onnx.export(called, several.args, dynamo=True, dynamic_shapes=sizes, verbose=False)
            else:  # the exporter would take a trailing dict for keyword arguments
                traced = torch.export.export(called, several.args, dict(several.kwargs), dynamic_shapes=sizes)
                program = torch.onnx.export(traced, dynamo=True, verbose=False)
            assert program is not None
            _strip(program.model)
            program.save(str(path))
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"{type(model).__name__} cannot be exported to ONNX ({reason}); omit the rung 'onnx'.") from None
    return Path(path).stat().st_size


def _strip(model: Any) -> None:
    """Remove the exporter's notes about the source code of each node: a third of a small file."""
    for part in (model, model.graph, *model.graph):
        part.metadata_props.clear()
        part.doc_string = None
    for node in model.graph:
        for output in node.outputs:
            output.metadata_props.clear()


def batch_sizes(called: nn.Module, call: Call) -> Any:
    """The sizes that may change between calls, in the form of `torch.export`: the batch size."""
    rows = torch.export.Dim("batch")

    def size(tensor: Tensor) -> Any:
        return {0: rows} if call.is_batch(tensor) else None

    sizes = call.map(size, lambda value: None)
    return sizes.bind(called) if call.kwargs else sizes.args


class _Leaves(nn.Module):
    """Returns the tensors in a network's output, with its signature: exporters do not know custom classes."""

    def __init__(self, called: nn.Module) -> None:
        super().__init__()
        self.called = called

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            return tuple(tensors_in(called(*args, **kwargs)))

        forward.__signature__ = inspect.signature(called.forward)  # type: ignore[attr-defined]
        self.forward = forward


def onnx_runner(path: str | Path) -> Callable[[Any], Any]:
    """A function that runs a file in onnxruntime, on as many threads as torch uses.

    Tensors among its inputs are passed by name if they are keyword arguments, otherwise in order.
    """
    runtime = need("onnxruntime", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads slow down what runs next
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Any) -> Any:
        outputs = [torch.from_numpy(leaf) for leaf in session.run(None, feed(names, Call.of(inputs)))]
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def feed(names: Sequence[str], call: Call) -> dict[str, Any]:
    """The tensors of a call as arrays, by the names of a graph's inputs.

    Args:
        names: names of the inputs, in order.
        call: keyword arguments go to the inputs of that name, all others to the remaining inputs in order.
    """
    named = {name: value for name, value in call.kwargs.items() if name in names and isinstance(value, Tensor)}
    others = [tensor for tensor in call.tensors if not any(tensor is value for value in named.values())]
    given = dict(zip((name for name in names if name not in named), others, strict=False)) | named
    return {name: tensor.detach().cpu().numpy() for name, tensor in given.items()}


def compressed_size(path: str | Path) -> int:
    """Bytes of a file after deflate, as a web server or a package would send it; zeros compress well.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "zeros").write_bytes(bytes(10_000))
        ...     compressed_size(Path(folder, "zeros")) < 100
        True
    """
    return len(zlib.compress(Path(path).read_bytes(), 9))
