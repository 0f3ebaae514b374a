"""Shared by the int8 rungs: calibration, allowed losses, and metrics of a network that runs in another runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import Call, callee, copy_model, exchange, is_layer, tensors_in

__all__ = ["Elsewhere", "Quantization", "check_reached", "relative_error"]


@dataclass(frozen=True)
class Quantization:
    """How int8 rungs are calibrated, and how much they may lose.

    Args:
        calibration: batches of training inputs, as the network takes them; they determine the ranges of activations.
        tolerance: maximum change of a metric of `evaluate`: absolute (0.01 is one percentage point of accuracy), or relative
            for a metric above 1. A metric with `loss` in its name is shown but not judged.
        error: maximum relative error of the outputs, as root mean squares; used if there is no metric.

    Raises:
        ValueError: if there is no batch, or a bound is not positive.

    Example:
        >>> Quantization([torch.ones(2, 3)]).tolerance
        0.01
    """

    calibration: Iterable[Any]
    tolerance: float = 0.01
    error: float = 0.1
    calls: list[Call] = field(init=False, repr=False, compare=False)
    """The batches as calls; read once, because they may come from a generator."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", [Call.of(batch) for batch in self.calibration])
        if not self.calls:
            raise ValueError("calibration contains no batch; give some from the training set.")
        for name in ("tolerance", "error"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0: int8 rounds.")

    def verdict(self, dense: dict[str, float], rung: dict[str, float], error: float) -> str:
        """Why a rung has lost too much; empty if it has not."""
        judged = [name for name in dense if name in rung and "loss" not in name.lower()]
        for name in judged:
            if not abs(rung[name] - dense[name]) <= self.tolerance * max(1.0, abs(dense[name])):
                return (
                    f"it changes {name} from {dense[name]:.4f} to {rung[name]:.4f} where {self.tolerance:g} is allowed; "
                    "train it quantization-aware, or allow more"
                )
        if not judged and not error <= self.error:
            return f"its outputs are off by {error:.1%} (root mean square) where {self.error:.1%} is allowed"
        return ""


def relative_error(expected: Any, found: Any) -> float:
    """The root mean square of an error, relative to that of the expected values.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        0.1
    """
    both = zip(tensors_in(expected), tensors_in(found), strict=True)
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in both]
    wrong = sum(float((a - b).masked_fill(a == b, 0).square().sum()) for a, b in pairs)
    whole = sum(float(a.masked_fill(a.isinf(), 0).square().sum()) for a, _ in pairs)
    return (wrong / whole) ** 0.5 if whole else float(wrong > 0)


class Elsewhere:
    """A model whose network runs in another runtime, so that it can be evaluated as a module.

    Args:
        model: the model that it replaces.
        inputs: a batch for its network.
        run: the other runtime.
    """

    def __init__(self, model: nn.Module, inputs: Call, run: Callable[[Call], Any]) -> None:
        self.module = copy_model(model).eval()
        self.run, self.calls = run, 0
        """How often the network was called; a metric that never calls it says nothing about it."""
        called = callee(self.module, inputs.network)[1]
        with torch.no_grad():
            self._like = inputs(self.module)
        called.forward = self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        call = Call(args, kwargs)
        outputs = iter(tensors_in(self.run(call)))
        device = call.tensors[0].device
        return exchange(self._like, lambda tensor: next(outputs).to(device))


def check_reached(model: nn.Module, inputs: Call, calibration: Sequence[Call]) -> None:
    """Check that calibration reaches every layer that real inputs reach; otherwise its range would be a guess.

    Raises:
        ValueError: naming a layer that gets only zeros, or is not called.
    """
    called, silent = _reached(model, [inputs]), _reached(model, calibration)
    for name, heard in called.items():
        if heard and not silent.get(name, False):
            what = "is not called with" if name not in silent else "is given nothing but zeros by"
            raise ValueError(
                f"layer '{name}' {what} the {len(calibration)} batches of calibration data, so its range is unknown; give "
                "batches that reach it."
            )


@torch.no_grad()
def _reached(model: nn.Module, calls: Sequence[Call]) -> dict[str, bool]:
    """Layers that are called, and whether any of their inputs is not zero."""
    found: dict[str, bool] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, named: Any) -> None:
            x: Tensor = args[0] if args else named["input"]
            found[name] = found.get(name, False) or bool(x.any())

        return hook

    handles = [
        layer.register_forward_pre_hook(look(name), with_kwargs=True)
        for name, layer in model.named_modules()
        if is_layer(layer)
    ]
    try:
        for call in calls:
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
