"""Eight bits per weight and activation, as ONNX; quantization keeps every zero."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor, nn

from lightning_sparse.core import Call, first_line, need, silenced
from lightning_sparse.export.batch_norm import fold_norms
from lightning_sparse.export.onnx import feed, save_onnx
from lightning_sparse.export.quantization import check_reached

__all__ = ["Int8Weights", "save_int8"]


@dataclass(frozen=True)
class Int8Weights:
    """The result for the weights.

    Args:
        weights: number of entries stored in int8.
        zeros: how many of them are zero in float; all have code 0.
        rounded: how many of them are zero only in int8.
        left: weights that stay float, because the runtime has no int8 operator for them.
    """

    weights: int
    zeros: int
    rounded: int
    left: tuple[str, ...] = ()


def save_int8(
    model: nn.Module, inputs: Any, path: str | Path, calibration: Sequence[Any], network: str | None = None
) -> Int8Weights:
    r"""Write a model as ONNX with int8 weights and activations, for any runtime that reads QDQ.

    $$ w \approx s_o \, q, \quad s_o = \max_i |w_{oi}| / 127, \quad q \in \{-127, \dots, 127\} $$

    with one scale per output o and no zero point, so that zero is exactly code 0; activations have one scale and zero point
    per tensor, from the smallest and the largest value on the calibration data (Jacob et al. 2018,
    https://arxiv.org/abs/1712.05877). Batch normalization is folded first. Before the file is written, it is checked entry
    by entry that no zero is lost.

    Args:
        model: trained, with exact zeros.
        inputs: a batch; a tuple holds positional arguments, a dict holds keyword arguments.
        path: path of the file.
        calibration: batches of training inputs.
        network: name of the submodule that takes the inputs; None finds it.

    Raises:
        ValueError: if the calibration data never reaches a layer, onnxruntime is missing or cannot quantize the model, or a
            zero would be lost.
    """
    tools = need("onnxruntime.quantization", "onnxruntime")
    call = Call.of(inputs, network)
    folded = fold_norms(model, call)[0]
    batches = [Call.of(batch, call.network).fit(folded) for batch in calibration]
    check_reached(folded, call.fit(folded), batches)
    with tempfile.TemporaryDirectory() as folder:
        whole, made = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        save_onnx(folded, call, whole)
        names = [given.name for given in need("onnx", "onnx").load(str(whole)).graph.input]
        reader = _reader(tools, names, batches)
        try:
            with silenced(""):  # it recommends a preparation step that is done here
                tools.quantize_static(
                    str(whole),
                    str(made),
                    reader,
                    quant_format=tools.QuantFormat.QDQ,
                    per_channel=True,
                    weight_type=tools.QuantType.QInt8,
                    activation_type=tools.QuantType.QInt8,
                    extra_options={"WeightSymmetric": True, "ActivationSymmetric": False, "QuantizeBias": False},
                )
        except Exception as error:
            raise ValueError(f"onnxruntime cannot quantize {type(model).__name__} ({first_line(error)}).") from None
        found = check_zeros(whole, made, {name: w for name, w in folded.named_parameters() if w.ndim > 1})
        Path(path).write_bytes(_without_names(made))
    return found


def _without_names(made: Path) -> bytes:
    """A file whose codes and biases are named after their parameters, and the rest numbered: a quarter fewer bytes."""
    model = need("onnx", "onnx").load(str(made))
    graph = model.graph
    names = {value.name: value.name for value in (*graph.input, *graph.output)}
    numbers = map(str, itertools.count())
    for tensor in graph.initializer:
        name = tensor.name
        plain = not name.endswith(("_scale", "_zero_point"))
        tensor.name = names[name] = name.removesuffix("_quantized") if plain else next(numbers)
    for node in graph.node:  # in execution order
        node.name = ""
        for index, name in enumerate(node.input):
            node.input[index] = names[name] if name else ""
        for index, name in enumerate(node.output):
            node.output[index] = names.setdefault(name, next(numbers)) if name else ""
    del graph.value_info[:]
    written: bytes = model.SerializeToString()
    return written


def _reader(tools: Any, names: Sequence[str], batches: Sequence[Call]) -> Any:
    """The calibration data in the form that onnxruntime expects."""
    feeds: Iterator[Mapping[str, Any]] = iter([feed(names, batch) for batch in batches])

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feeds, None)

    return Reader()


_MULTIPLY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose second input is a weight."""


def check_zeros(whole: str | Path, made: str | Path, weights: Mapping[str, Tensor]) -> Int8Weights:
    """Compare the weights of a float and an int8 file entry by entry.

    Args:
        whole: the float file.
        made: the int8 file that onnxruntime made from it.
        weights: the weights of the model, by name, to find out which of them stay float.

    Raises:
        ValueError: naming a weight in which a zero is lost or has a code other than 0.
    """
    onnx = need("onnx", "onnx")
    arrays = need("onnx.numpy_helper", "onnx")
    graphs = [onnx.load(str(file)).graph for file in (whole, made)]
    before, after = ({tensor.name: tensor for tensor in graph.initializer} for graph in graphs)
    multiply = {node.input[1] for node in graphs[0].node if node.op_type in _MULTIPLY}
    quantized = zeros = rounded = 0
    left: list[str] = []
    for name, tensor in before.items():
        if len(tensor.dims) < 2 or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = arrays.to_array(tensor)
        if f"{name}_quantized" not in after:
            left += _whose(name, values, weights)
            continue
        codes = arrays.to_array(after[f"{name}_quantized"])
        offsets = arrays.to_array(after[f"{name}_zero_point"])
        if name not in multiply and offsets.size == 1 and not ((values == 0) & (codes != offsets)).any():
            continue  # what scales the outputs of a layer is no weight; zero is exact there, with another code
        lost = int(((values == 0) & (codes != 0)).sum())
        if lost or offsets.any():
            raise ValueError(
                f"zeros of '{name}' would be lost: {lost} have a code other than 0, and code 0 stands for another number in "
                f"{int((offsets != 0).sum())} outputs."
            )
        quantized, zeros = quantized + values.size, zeros + int((values == 0).sum())
        rounded += int(((values != 0) & (codes == 0)).sum())
    if not quantized:
        raise ValueError("onnxruntime quantizes no weight of this model; it has no int8 operator for its layers.")
    return Int8Weights(quantized, zeros, rounded, tuple(left))


def _whose(name: str, values: Any, weights: Mapping[str, Tensor]) -> list[str]:
    """The weights that are stored in an array: transposed, in another order, or stacked; empty for all other constants."""
    if name in weights:
        return [name]
    ordered = numpy.sort(values, axis=None)
    for other, weight in weights.items():
        if weight.numel() == values.size:
            sorted_weight = numpy.sort(weight.detach().float().cpu().numpy(), axis=None)
            if numpy.array_equal(ordered, sorted_weight):
                return [other]
    return [owner for part in values for owner in _whose("", part, weights)] if values.ndim > 2 else []  # two directions
