"""ONNX, checked in onnxruntime."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import callee, copy_model, first_line, fit_to, need

__all__ = ["compressed_size", "onnx_runner", "save_onnx"]


def save_onnx(model: nn.Module, inputs: Tensor, path: str | Path) -> int:
    """Write a model as ONNX, for batches of any size; returns its size in bytes.

    Args:
        model: in evaluation mode.
        inputs: a batch.
        path: of the file.

    Raises:
        ValueError: if onnx or onnxscript is missing, or torch cannot export the model.
    """
    need("onnx", "onnx")
    need("onnxscript", "onnxscript")
    called = callee(copy_model(model).eval())[1]
    several = fit_to(
        called, inputs[:2] if len(inputs) > 1 else torch.cat([inputs, inputs])
    )  # one would be taken for a constant
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            sizes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(called, (several,), dynamo=True, dynamic_shapes=sizes, verbose=False)
            assert program is not None
            program.save(str(path))
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(
            f"{type(model).__name__} cannot be exported to ONNX ({reason}); leave the rung 'onnx' out."
        ) from None
    finally:
        logger.setLevel(level)
    return Path(path).stat().st_size


def onnx_runner(path: str | Path) -> Callable[[Tensor], Any]:
    """A function that runs a file in onnxruntime, on as many threads as torch uses."""
    runtime = need("onnxruntime", "onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads slow down what runs next
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Any:
        outputs = [torch.from_numpy(leaf) for leaf in session.run(None, {name: x.detach().cpu().numpy()})]
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def compressed_size(path: str | Path) -> int:
    """Bytes of a file after deflate, as a web server or a package would send it: zeros shrink there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "zeros").write_bytes(bytes(10_000))
        ...     compressed_size(Path(folder, "zeros")) < 100
        True
    """
    return len(zlib.compress(Path(path).read_bytes(), 9))
