"""Checkpoints on the command line: problems are reported before anything else is done."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_sparse.export import whole_weights
from lightning_sparse.observe.checkpoint_io import newest_readable, why_unreadable

__all__ = ["check_fit", "load_weights", "usable"]

BY_NAME = ("last", "best", "hpc")
"""Names that Lightning resolves by itself."""


def usable(ckpt_path: str, resume: bool = False) -> str:
    """The checkpoint to work with. If the given one cannot be read, a run resumes from the newest readable one.

    Args:
        ckpt_path: path as given.
        resume: whether training resumes from it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if none is given, or it is not a Lightning checkpoint, or it holds too little.
    """
    if not ckpt_path:
        raise ValueError("ckpt_path is missing; write --ckpt_path FILE.")
    if ckpt_path in BY_NAME or ":" in ckpt_path:  # a remote file, or one of a registry
        return ckpt_path
    path = Path(ckpt_path)
    if path.is_dir() and why_unreadable(path):
        inside = newest_readable(path) or newest_readable(path / "checkpoints")
        such = f", such as '{inside}'" if inside else ", one that a run saved"
        raise ValueError(f"ckpt_path='{ckpt_path}' is a folder; give a file in it{such}.")
    if not path.exists():
        beside = newest_readable(path.parent)
        such = f"; the newest beside it is '{beside}'." if beside else "; give one that a run saved."
        raise FileNotFoundError(f"ckpt_path='{ckpt_path}' is not a file{such}")
    if (reason := why_unreadable(path)) is not None:
        before = newest_readable(path.parent, leave_out=[path])
        broken = f"ckpt_path='{ckpt_path}' cannot be read as a checkpoint ({reason})"
        if not (resume and before):
            such = f"the newest beside it that can is '{before}'" if before else "give one that a run saved"
            raise ValueError(f"{broken}; {such}.")
        rank_zero_warn(f"{broken}; the run resumes from '{before}', the newest readable one beside it.")
        return usable(str(before), resume)
    if path.is_file():
        _check_content(ckpt_path, resume)
    return ckpt_path


def _check_content(ckpt_path: str, resume: bool) -> None:
    try:
        content = _read(ckpt_path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt_path='{ckpt_path}' holds objects beside weights and plain values, which the command line does not load; "
            "load it from Python with weights_only=False, if you trust it."
        ) from error
    if not isinstance(content, Mapping) or "state_dict" not in content:
        tensors = isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values())
        holds = "a bare state dict" if tensors else f"a {type(content).__name__} without a state_dict"
        raise ValueError(f"ckpt_path='{ckpt_path}' holds {holds}, not a Lightning checkpoint; give one that a run saved.")
    if resume and not {"loops", "optimizer_states"} <= set(content):
        raise ValueError(
            f"ckpt_path='{ckpt_path}' holds only weights, so training cannot resume from it; give one that was saved "
            f"without "
            "save_weights_only."
        )


def _read(ckpt_path: str) -> Any:
    return torch.load(ckpt_path, map_location="cpu", weights_only=True)


def check_fit(model: pl.LightningModule, ckpt_path: str) -> None:
    """Refuse a checkpoint of another network.

    Raises:
        ValueError: naming a weight that does not fit.
    """
    if not Path(ckpt_path).is_file() or is_overridden("configure_model", model) or not model.strict_loading:
        return
    if is_overridden("on_load_checkpoint", model):  # the model may fix a misfit itself
        return
    _compare(model, _read(ckpt_path)["state_dict"], ckpt_path)


def _compare(model: pl.LightningModule, weights: Mapping[str, Any], ckpt_path: str) -> None:
    ours = model.state_dict()
    said = [f"'{name}' is missing in the file" for name in ours if name not in weights]
    said += [f"the model has no '{name}'" for name in weights if name not in ours]
    said += [
        f"'{name}' is {list(weights[name].shape)} in the file and {list(tensor.shape)} in the model"
        for name, tensor in ours.items()
        if name in weights and isinstance(tensor, Tensor) and weights[name].shape != tensor.shape
    ]
    if said:
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        raise ValueError(
            f"ckpt_path='{ckpt_path}' does not fit the configured model: {said[0]}{more}; configure the model as it "
            "was in that run."
        )


def load_weights(model: pl.LightningModule, ckpt_path: str) -> None:
    """Load the weights of a checkpoint into a model: from a file, or from the folder that a sharded run wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a checkpoint, or holds another model.
    """
    weights = whole_weights(usable(ckpt_path))
    _compare(model, weights, ckpt_path)
    model.load_state_dict(weights)
