"""The result of choosing a kernel, and the inputs that kernels are measured on; shared by CPU and GPU kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_sparse.core import Call

__all__ = ["KernelChoice", "layer_inputs"]


@dataclass(frozen=True)
class KernelChoice:
    """The measurements of one linear layer.

    Args:
        layer: its name.
        sparsity: sparsity of its weight.
        milliseconds: time per call, by kernel, including `dense`.
        chosen: the fastest kernel.
        note: why the layer stays dense, if it was not measured.
    """

    layer: str
    sparsity: float
    milliseconds: dict[str, float]
    chosen: str
    note: str = ""

    def __str__(self) -> str:
        times = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in self.milliseconds.items())
        return f"{self.layer}, {self.sparsity:.1%} zeros: {self.chosen} ({self.note or times})"


def layer_inputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The first input of every linear layer in a forward pass."""
    seen: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, args: Any, named: Any) -> None:
        seen.setdefault(name, (args[0] if args else named["input"]).detach())

    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    handles = [layer.register_forward_pre_hook(partial(look, name), with_kwargs=True) for name, layer in layers]
    try:
        Call.of(inputs)(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen
