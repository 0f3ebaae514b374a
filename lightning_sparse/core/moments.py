"""Optimizer state of entries whose connection has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.core.layout import local, owner_of

__all__ = ["averages", "check_moments", "clear_moments", "initial_state", "restart"]

MAPS = {"state1": "qmap1", "state2": "qmap2"}
"""State names of bitsandbytes, and where it stores the value of each of their codes."""


def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Set an optimizer's state of some entries to zero, as if they had just been created.

    Works for every optimizer that keeps per-entry state in tensors of the parameter's shape: momentum, first and second
    moments, averages. In the 8-bit optimizers of bitsandbytes and torchao, the code for zero is written.

    Step counters and factored moments stay, because a whole tensor shares them. An optimizer that puts more than the
    gradient into its state continues to do so in every step: where Adafactor does not factor, that of timm and transformers
    lets the second moment of a pruned entry rise from zero to its eps (1e-30); bitsandbytes on a CPU rounds zero to an
    adjacent code. Entries that return are cleared once more.

    Args:
        optimizer: the optimizer that owns the parameter.
        parameter: the parameter whose state is cleared, or this rank's shard of it.
        where: a boolean tensor of its shape; True entries are cleared.

    Raises:
        ValueError: for state in which zero is unknown; nothing has been cleared.
    """
    for memory, zero in list(_memories(optimizer, owner_of(parameter))):
        local(memory).masked_fill_(where.to(memory.device), zero)


def averages(optimizer: Optimizer) -> bool:
    """Whether an optimizer switches the model between the weights it moves and an average, as those of schedulefree do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def initial_state(optimizers: Iterable[Optimizer]) -> dict[nn.Parameter, dict[str, Any]]:
    """What new optimizers hold before their first step: mostly nothing, but sums in torch's Adagrad.

    Args:
        optimizers: that have not made a step.
    """
    return {
        parameter: copy.deepcopy(state)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, nn.Parameter)
    }


def restart(optimizer: Optimizer, initial: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
    """Let an optimizer forget everything, as if it were new; its next step makes its state from the current weights.

    Zeros would not be the same: some optimizers hold copies of the weights or step sizes.

    Args:
        optimizer: the optimizer.
        initial: what `initial_state` found.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in initial:
                optimizer.state[parameter] = copy.deepcopy(dict(initial[parameter]))
        if "step" in optimizer.defaults:  # where all parameters of a group share a counter
            group["step"] = optimizer.defaults["step"]
        else:
            group.pop("step", None)


def check_moments(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer whose state `clear_moments` could not clear; one without state passes.

    Args:
        optimizer: in its current state.
        parameters: parameters whose entries will be cleared at some point.

    Raises:
        ValueError: naming the optimizer, the state and its type.
    """
    for parameter in parameters:
        for _ in _memories(optimizer, owner_of(parameter)):
            pass


def _memories(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[tuple[Tensor, int]]:
    """State tensors with an element per entry of the parameter, and the value of zero in each."""
    state, owner = optimizer.state.get(parameter, {}), type(optimizer).__name__
    for name, value in state.items():
        if not isinstance(value, Tensor) or (name not in MAPS and value.shape != parameter.shape):
            continue
        codes, values = getattr(value, "codes", None), getattr(value, "qmap", None)  # as torchao keeps them
        if name in MAPS:
            codes, values = value, state.get(MAPS[name])
            stacked = value.shape[1:] == parameter.shape  # two averages in one, as AdEMAMix keeps them
            if not stacked and value.shape != parameter.shape:
                continue
            if _order(value[0] if stacked else value) != _order(parameter):
                # The kernels count entries as they lie in memory, and move the parameter but not its state.
                raise ValueError(
                    f"{owner} keeps '{name}' in a memory layout other than its weight's, so the moments of pruned "
                    "entries cannot be found; give it contiguous weights, or use torch.optim.AdamW."
                )
        if _is_plain(value, parameter):
            yield value, 0
        elif (coded := _coded(codes, values, value.shape)) is not None:
            yield coded
        else:
            kind = "" if type(value) is Tensor else f"{type(value).__name__} of "
            raise ValueError(
                f"{owner} keeps '{name}' as {kind}{value.dtype}, in which zero is not known, so the moments of pruned "
                "entries cannot be cleared; use a 32-bit optimizer such as torch.optim.AdamW."
            )


def _is_plain(value: Tensor, parameter: nn.Parameter) -> bool:
    """Whether the zero of a tensor is 0: a float of two bytes or more, and not a class that may store something else."""
    wide = value.is_complex() or (value.is_floating_point() and value.element_size() > 1)
    return wide and type(value) in (Tensor, nn.Parameter, type(parameter))


def _coded(codes: Any, values: Any, shape: torch.Size) -> tuple[Tensor, int] | None:
    """A code per entry, and the one that stands for exactly zero, if there is one."""
    if not (isinstance(codes, Tensor) and isinstance(values, Tensor)):
        return None
    if codes.dtype != torch.uint8 or codes.shape != shape or values.shape != (256,):
        return None
    found: list[int] = (values == 0).nonzero().flatten().tolist()
    return (codes, found[0]) if found else None


def _order(tensor: Tensor) -> list[int]:
    """The order of a tensor's entries in memory."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
