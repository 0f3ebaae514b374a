"""Random states and seeds of all ranks, so that ranks draw alike and a resumed run draws as an uninterrupted one."""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

__all__ = ["check_seed", "collect_rng", "draw_seed", "restore_rng"]


def check_seed(seed: Any) -> None:
    """Refuse what is neither an integer >= 0 nor None."""
    if seed is not None and (not isinstance(seed, Integral) or int(seed) < 0):
        raise ValueError(f"seed={seed!r} must be an integer >= 0.")


def draw_seed(trainer: pl.Trainer, seed: int | None) -> int:
    """The given seed, that of `seed_everything`, or a drawn one; the same on every rank."""
    if seed is not None:
        return int(seed)
    if "PL_GLOBAL_SEED" in os.environ:
        return int(os.environ["PL_GLOBAL_SEED"])
    drawn = int(torch.randint(1 << 31, ()).item())
    return trainer.strategy.broadcast(drawn)


def collect_rng(trainer: pl.Trainer) -> dict[str, Tensor]:
    """The states of torch's generators on every rank; all ranks must call it.

    Python's and NumPy's generators are left out: their states do not load with `weights_only=True`.
    """
    device = trainer.strategy.root_device
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if trainer.world_size > 1:
        states = {name: trainer.strategy.all_gather(state.to(device)).cpu() for name, state in states.items()}
    else:
        states = {name: state.unsqueeze(0) for name, state in states.items()}
    return states


def restore_rng(trainer: pl.Trainer, states: dict[str, Tensor]) -> None:
    """Set this rank's generators; with a different number of ranks there is nothing to restore."""
    if len(states["cpu"]) != trainer.world_size:
        return
    # Copies, because torch crashes on a state that is a view into a longer tensor.
    torch.set_rng_state(states["cpu"][trainer.global_rank].clone())
    device = trainer.strategy.root_device
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][trainer.global_rank].clone(), device)
