"""A snapshot of training that can be restored."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_sparse.core import Piece, like, put_back_, to_cpu, whole

__all__ = ["Snapshot", "restart_average"]


class _Scheduler(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class Snapshot:
    """Weights, buffers, optimizers and learning rate schedulers at one point in training, on the CPU.

    Costs one copy of the model and, after the first step, of the optimizer's moments; in checkpoints too.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> snapshot = Snapshot()
        >>> snapshot.take(layer, [], [])
        >>> before = layer.weight.item()
        >>> nn.init.constant_(layer.weight, 7.0).item()
        7.0
        >>> snapshot.restore_weights(layer)
        >>> layer.weight.item() == before
        True
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def __bool__(self) -> bool:
        return self._state is not None

    def take(self, module: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[_Scheduler]) -> None:
        """Take the snapshot."""
        self._state = _on_cpu(
            {
                "tensors": dict(_tensors(module)),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "schedulers": [[type(scheduler).__name__, scheduler.state_dict()] for scheduler in schedulers],
            }
        )

    @torch.no_grad()
    def restore_weights(self, module: nn.Module) -> None:
        """Restore all parameters and buffers in place."""
        put_back_(self._taken["tensors"], dict(_tensors(module)))

    def restore_optimizers(
        self, optimizers: Sequence[Optimizer], schedulers: Sequence[_Scheduler], moments: bool = True
    ) -> None:
        """Restore learning rates and all other settings, with or without the optimizer state of each weight.

        A scheduler that was replaced in the meantime is left alone, and settings that were added stay.

        Raises:
            ValueError: if the parameter groups have changed.
        """
        for optimizer, saved in zip(optimizers, self._taken["optimizers"], strict=True):
            current = optimizer.state_dict()
            groups = zip(current["param_groups"], saved["param_groups"], strict=False)
            if [g["params"] for g in current["param_groups"]] != [g["params"] for g in saved["param_groups"]]:
                raise ValueError(
                    f"{type(optimizer).__name__} has other parameter groups than when the snapshot was taken; add all of "
                    "them in configure_optimizers."
                )
            # A copy, because an optimizer adopts tensors that are on its device and then changes them in place.
            state = _moments(optimizer, saved["state"]) if moments else current["state"]
            settings = [{**now, **copy.deepcopy(then)} for now, then in groups]
            optimizer.load_state_dict({"state": state, "param_groups": settings})
        for scheduler, (kind, state) in zip(schedulers, self._taken["schedulers"], strict=False):
            if type(scheduler).__name__ == kind:
                scheduler.load_state_dict(copy.deepcopy(state))

    @property
    def _taken(self) -> dict[str, Any]:
        if self._state is None:
            raise ValueError("There is no snapshot to rewind to: its point was never reached.")
        return self._state

    def state_dict(self) -> dict[str, Any]:
        """Everything, without a copy, because none of it is ever changed. With sharded weights, all ranks must call it."""
        return {} if self._state is None else dict(whole(self._state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._state = dict(state) if state else None

    def to(self, weights: Mapping[str, Tensor]) -> None:
        """Do nothing: the snapshot stays on the CPU."""


@torch.no_grad()
def restart_average(average: nn.Module, module: nn.Module) -> None:
    """Restart a moving average of a module from the module's current values."""
    if isinstance(average, AveragedModel):
        average.n_averaged.zero_()
        average = average.module
    originals = dict(_tensors(module))
    for name, tensor in _tensors(average):
        tensor.copy_(originals[name])


def _tensors(module: nn.Module) -> itertools.chain[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _moments(optimizer: Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The optimizer state, sharded like its weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        index: {
            name: like(value, weights[index]) if isinstance(value, Tensor | Piece) else value
            for name, value in memory.items()
        }
        for index, memory in copy.deepcopy(saved).items()
    }


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return to_cpu(value)
    if type(value) is dict:
        return {key: _on_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(item) for item in value)
    return copy.deepcopy(value)
