"""Try whether channels can leave a network: remove some from a copy, and compare the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse.core.calls import Call
from lightning_sparse.core.costs import tensors_in
from lightning_sparse.core.coupling import Coupling, Place
from lightning_sparse.core.cutting import Kept, cut
from lightning_sparse.core.libraries import first_line
from lightning_sparse.core.linear import in_count, is_layer, out_count
from lightning_sparse.core.networks import copy_model, without_nested_tensors

__all__ = ["Appearance", "why_channels_stay"]


class Appearance(NamedTuple):
    """Where a channel appears in a layer.

    Args:
        place: a parameter and an index that name the channel.
        layer: name of the layer, norm or activation.
        produces: whether it is an output of the layer, or an input.
        indices: its positions.
    """

    place: Place
    layer: str
    produces: bool
    indices: Sequence[int]


Sides = tuple[Mapping[str, set[int]], Mapping[str, set[int]]]
"""Outputs and inputs of layers."""


@torch.no_grad()
def why_channels_stay(
    model: nn.Module, calls: Sequence[Call], coupling: Coupling, positions: Sequence[Appearance]
) -> dict[str, str]:
    """Return weights whose channels cannot be removed, and why, by trying the first and the last unit of every pool.

    The units of all pools are removed at once; only if this fails, of fewer pools. So it usually takes four forward passes.

    Args:
        model: the model that holds the weights.
        calls: calls of its networks.
        coupling: its units.
        positions: everything that is cut for them.
    """
    whole = without_nested_tensors(copy_model(model).eval())
    few = [_few(whole, call) for call in calls]
    by_unit: dict[int, list[Appearance]] = {}
    for position in positions:
        name, index = position.place
        by_unit.setdefault(int(coupling.units[name][index]), []).append(position)
    found: dict[str, str] = {}
    for end in (0, -1):
        pools = [(names, by_unit[int(units[end])]) for names, units in coupling.pools if len(units) > 1]
        found |= _failing(whole, few, [(names, cuts) for names, cuts in pools if found.keys().isdisjoint(names)])
    return found


def _few(model: nn.Module, call: Call) -> Call:
    """Two samples; all of them if the model does not run on two."""
    try:
        _outputs(model, [call.first(2)])
    except Exception:
        return call
    return call.first(2)


def _failing(
    model: nn.Module, calls: Sequence[Call], pools: Sequence[tuple[Sequence[str], list[Appearance]]]
) -> dict[str, str]:
    """Return the weights of the pools that cannot lose a unit, found by halving, and why."""
    sides: tuple[dict[str, set[int]], dict[str, set[int]]] = ({}, {})
    for _, positions in pools:
        for position in positions:
            sides[0 if position.produces else 1].setdefault(position.layer, set()).update(position.indices)
    reason = _without(model, calls, sides) if pools else ""
    if not reason:
        return {}
    if len(pools) == 1:
        return dict.fromkeys(pools[0][0], reason)
    middle = len(pools) // 2
    return _failing(model, calls, pools[:middle]) | _failing(model, calls, pools[middle:])


def _without(model: nn.Module, calls: Sequence[Call], gone: Sides) -> str:
    """Return how a model without these outputs and inputs differs from one in which they are zero; empty if it does not."""
    smaller = copy_model(model)
    outputs, inputs = gone
    try:
        for name in {**outputs, **inputs}:
            layer = smaller.get_submodule(name)
            written = sorted({*range(out_count(layer))} - outputs[name]) if name in outputs else None
            read = sorted({*range(in_count(layer))} - inputs[name]) if name in inputs else None
            cut(layer, Kept(written, read))
        after = _outputs(smaller, calls)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"with fewer channels the model does not run ({first_line(error)})"
    with _zeroed(model, gone):
        before = _outputs(model, calls)
    if [a.shape for a in before] != [b.shape for b in after]:
        return "with fewer channels an output of the model has another size"
    for a, b in zip(before, after, strict=True):
        size = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(())
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(size), equal_nan=True):
            return "with fewer channels the model returns something else"
    return ""


@contextmanager
def _zeroed(model: nn.Module, gone: Sides) -> Iterator[None]:
    """While active, these outputs and inputs are zero."""

    def erase(layer: nn.Module, indices: set[int], x: Tensor) -> Tensor:
        along = 1 - layer.get_parameter("weight").ndim if is_layer(layer) else 1
        return x.index_fill(along, torch.tensor(sorted(indices), device=x.device), 0)

    def write(indices: set[int], layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return erase(layer, indices, output)

    def read(indices: set[int], layer: nn.Module, args: Any, named: Any) -> Any:
        if args:
            return (erase(layer, indices, args[0]), *args[1:]), named
        return args, {**named, "input": erase(layer, indices, named["input"])}

    outputs, inputs = gone
    parts = dict(model.named_modules())
    handles = [parts[name].register_forward_hook(partial(write, indices)) for name, indices in outputs.items()]
    for name, indices in inputs.items():
        handles.append(parts[name].register_forward_pre_hook(partial(read, indices), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The floating-point outputs, with equal random numbers at every call."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        return [tensor for call in calls for tensor in tensors_in(call(model)) if tensor.is_floating_point()]
