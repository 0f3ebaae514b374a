"""The weights of a checkpoint as one state dict, from one file or several."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

__all__ = ["whole_weights"]


def whole_weights(checkpoint: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint on the CPU, ready for `load_state_dict` of the plain model.

    Reads files that Lightning wrote, and the folders of distributed checkpoints (`ModelParallelStrategy` writes them by
    default), in one process. Everything must fit into memory, including the optimizer state.

    Args:
        checkpoint: a file, or the folder of a distributed checkpoint.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> model.load_state_dict(whole_weights("checkpoints/last.ckpt"))  # doctest: +SKIP
    """
    path = Path(checkpoint)
    if path.is_file():
        return _state_dict(path, path)
    if not (path / ".metadata").is_file():
        raise ValueError(
            f"checkpoint='{path}' is neither a file nor the folder of a distributed checkpoint; give one of them."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, file)
        return _state_dict(file, path)


def _state_dict(file: Path, asked: Path) -> dict[str, Tensor]:
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise ValueError(f"checkpoint='{asked}' has no state_dict; give a checkpoint that Lightning has saved.")
    weights: dict[str, Tensor] = saved["state_dict"]
    return weights
