"""Compare models by their outputs and their latency."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import Call, callee, tensors_in

__all__ = [
    "Timing",
    "difference",
    "have_equal_weights",
    "interleaved",
    "measure",
    "runner",
    "shared_names",
    "steady",
]


def runner(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """A function that calls a model, or the network in it that takes the inputs."""
    call = Call.of(inputs).fit(model)
    called = callee(model, call.network)[1]

    def run() -> Any:
        with torch.no_grad():
            return called(*call.args, **call.kwargs)

    return run


def difference(expected: Any, found: Any) -> tuple[float, float]:
    """The largest difference of two outputs, and the largest finite expected output; NaN if either contains NaN.

    Equal entries, infinite ones among them, differ by zero.

    Raises:
        ValueError: if the outputs have different structures or shapes.

    Example:
        >>> difference(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0]))
        (0.5, 4.0)
    """
    both = zip(tensors_in(expected), tensors_in(found), strict=True)
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in both]
    if any(a.shape != b.shape for a, b in pairs) or not pairs:
        shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in pairs]
        raise ValueError(f"outputs cannot be compared: expected and found shapes are {shapes}.")
    none = torch.zeros(1, dtype=torch.double)
    gaps = torch.cat([none, *((a - b).abs().masked_fill(a == b, 0).flatten() for a, b in pairs)])
    sizes = torch.cat([none, *(a.abs().masked_fill(a.isinf(), 0).flatten() for a, _ in pairs)])
    return float(gaps.max()), float(sizes.max())


def steady(run: Callable[[], Any], name: str, tolerance: float) -> Any:
    """Return what a model returns, after calling it twice.

    Args:
        run: calls the model.
        name: of the model, for the error message.
        tolerance: maximum difference, relative to the largest output (or to 1 if that is smaller).

    Raises:
        ValueError: if the second call returns something else.
    """
    first, second = run(), run()
    if not list(tensors_in(first)):
        return first
    try:
        change, largest = difference(first, second)
    except ValueError:  # other shapes
        change, largest = float("inf"), 0.0
    if change > tolerance * max(1.0, largest):
        raise ValueError(
            f"{name} returns something else at each call in evaluation mode, so no export of it can be verified; "
            "pass its random numbers as an input, or turn them off in evaluation mode."
        )
    return first


def shared_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Additional names of shared tensors, with the first name of each."""
    first: dict[Any, str] = {}
    again = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            again[name] = first[key]
        else:
            first[key] = name
    return again


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call.

    Args:
        median: median of all rounds.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None
) -> dict[str, Timing]:
    """Times of functions that run interleaved, so that a disturbance affects all of them.

    Args:
        functions: by name.
        rounds: number of timed calls; two more warm up.
        device: device to synchronize with, if it is a GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    dice = random.Random(0)
    for number in range(rounds + 2):
        dice.shuffle(names)  # the previous function affects caches and threads, so the order is random
        for name in names:
            function = functions[name]
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            start = perf_counter()
            function()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 2:
                times[name].append(1e3 * (perf_counter() - start))
    found = {}
    for name, seen in times.items():
        seen.sort()
        found[name] = Timing(statistics.median(seen), seen[len(seen) // 4], seen[-1 - len(seen) // 4])
    return found


def measure(first: Callable[[], Any], second: Callable[[], Any], rounds: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of two functions that run interleaved."""
    found = interleaved({"first": first, "second": second}, rounds, device)
    return found["first"].median, found["second"].median


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models of the same code hold the same numbers, so that any measurement of one applies to the other.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> have_equal_weights(net, net), have_equal_weights(net, nn.Linear(2, 3))
        (True, False)
    """
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
