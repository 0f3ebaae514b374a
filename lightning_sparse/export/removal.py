"""Remove neurons, filters and channels that do nothing: the result is a plain, smaller module with the same outputs.

A channel can be removed if every layer that reads it multiplies it by zeros, or gets the same number from it for every input
because all weights that feed it are zero. An engine finds the channels that are coupled with it through additions,
concatenations, depthwise layers and normalization, see `core/coupling_engine.py`.

A dead filter still outputs a constant c, from its bias or its normalization. The constant is folded into the bias of the
next layer where that is exact:

    b <- b + sum_j c_j sum_k W[:, j, k]      for linear layers, and convolutions without zero padding

With zero padding, in transposed convolutions, or without a bias, one dead channel s with c_s != 0 stays and carries the
others. This is always exact, because a layer is linear in its input channels:

    W[:, s, k] <- sum_j (c_j / c_s) W[:, j, k]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Attention,
    Call,
    CouplingEngine,
    Kept,
    Positions,
    copy_model,
    cut,
    find_attentions,
    first_line,
    in_count,
    is_depthwise,
    is_layer,
    kind_of,
    out_count,
    places_of,
    row_of,
    tensors_in,
    torch_pruning,
    without_heads,
    without_nested_tensors,
)
from lightning_sparse.export.blueprint import Blueprint
from lightning_sparse.export.compare_models import difference, runner, steady
from lightning_sparse.export.dead import DeadGroup, Round, bias_is_exact, fed_outputs

__all__ = ["Removal", "remove_dead"]


@dataclass
class Removal:
    """What was removed, and what could not be removed.

    Args:
        blueprint: outputs and inputs left of each layer; used to load the smaller model and to cut an optimizer's moments.
        removed: layer -> number of removed outputs.
        carriers: layer -> number of dead outputs that stay because they carry a constant that no bias can hold exactly.
        refused: layer -> why its dead outputs stay.
        heads: attention -> number of removed heads.
    """

    blueprint: Blueprint = field(default_factory=Blueprint)
    removed: dict[str, int] = field(default_factory=dict)
    carriers: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)


def remove_dead(
    model: nn.Module,
    inputs: Any,
    *,
    tolerance: float = 1e-5,
    network: str | None = None,
    engine: CouplingEngine = torch_pruning,
) -> tuple[nn.Module, Removal]:
    """Return a copy without the channels that do nothing, in evaluation mode; its outputs are equal up to rounding.

    Removal is repeated until nothing more is found, because a neuron that fed only dead neurons is dead as well. Each group
    of coupled channels is tested before it is removed: on the inputs, on shuffled inputs, and with random signs on the
    outputs of living neurons, so that neurons that are inactive on these inputs also show an effect. If outputs change, the
    group stays, and the report says so.

    Args:
        model: a model with exact zeros at masked entries; trained with `structure="channel"`, or so sparse that neurons are
            dead.
        inputs: a batch of real inputs; a tuple holds positional arguments, a dictionary holds keyword arguments.
        tolerance: maximum change of an output, relative to the largest output (or to 1 if that is smaller).
        network: the part of the model that takes the inputs, by name; None finds it.
        engine: finds the coupled channels; default: Torch-Pruning's graph.

    Returns:
        The smaller model, and what was removed.

    Raises:
        ValueError: if the engine is missing or cannot trace the model, or if there is nothing to remove.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = net[0].weight.data[1:3].zero_()
        >>> smaller, removal = remove_dead(net, torch.randn(5, 3))
        >>> smaller[0], removal.removed
        (Linear(in_features=3, out_features=2, bias=True), {'0': 2})
    """
    now, removal = without_nested_tensors(copy_model(model).eval()), Removal()
    call = Call.of(inputs, network)
    steady(runner(now, call), type(model).__name__, tolerance)
    probes = [call, call.map(_shuffled)] if _can_be_shuffled(now, call) else [call]
    varied = [other for other in (call.map(_far), call.map(partial(_zeroed, call))) if _runs(now, other)]
    now = _without_dead_heads(now, call, probes, tolerance, removal)
    staying = dict(removal.refused)
    expected = [runner(now, probe)() for probe in probes]
    while True:
        removal.refused.clear()
        try:
            groups = list(Round(now, [*probes, *varied], removal.refused, engine).groups())
        except ValueError as error:
            if not removal.heads:
                raise
            removal.refused[type(model).__name__] = str(error)
            break
        groups, smaller, kept = _without_most(now, groups, probes, expected, tolerance, removal.refused)
        if not groups:
            break
        now, removal.blueprint = smaller, removal.blueprint.then(kept)
        for group in groups:
            for name, channels in group.outputs.items():
                if is_layer(now.get_submodule(name)):
                    gone = sum(len(channels.get(channel, ())) for channel in group.removed)
                    removal.removed[name] = removal.removed.get(name, 0) + gone
            removal.carriers[group.root] = len(group.carriers)
    removal.refused = {**staying, **removal.refused}
    removal.carriers = {name: count for name, count in removal.carriers.items() if count}
    if not (removal.removed or removal.heads):
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(removal.refused.items())[:2])
        raise ValueError(
            f"nothing in {type(model).__name__} can be removed: {reasons or 'no neuron, filter or channel in it is dead'}"
            '. Train with structure="coupled", or at a higher sparsity.'
        )
    return now, removal


# ---- heads --------------------------------------------------------------------------------------------------------------


def _without_dead_heads(model: nn.Module, call: Call, probes: list[Call], tolerance: float, removal: Removal) -> nn.Module:
    """Return the model without attention heads that output zeros or whose output is multiplied by zeros.

    The heads of each attention are tested before they are removed.
    """
    try:
        attentions = find_attentions(model, [call]).attentions
    except ValueError as error:
        removal.refused[type(model).__name__] = str(error)
        return model
    for attention in attentions:
        dead = _dead_heads(model, attention)
        if not dead:
            continue
        smaller = copy_model(model).eval()
        try:
            kept, sizes = without_heads(smaller, attention, dead)
            reason = _difference(model, smaller, probes, tolerance)
        except Exception as error:
            reason = f"with fewer heads the model does not run ({first_line(error)})"
        if reason:
            removal.refused[attention.name or type(model).__name__] = reason
            continue
        model = smaller
        removal.blueprint = removal.blueprint.then(kept, sizes)
        removal.heads[attention.name] = len(dead)
    return model


def _dead_heads(model: nn.Module, attention: Attention) -> list[int]:
    """Return heads whose weights and biases are all zero, or whose output no layer reads; at least one head stays."""
    read = model.get_submodule(attention.out)
    kind, weight = kind_of(read), read.get_parameter("weight")
    columns_read = weight.any(1 - (1 if kind is None else kind.input_dim))
    dead = []
    for head, (places, columns) in enumerate(zip(places_of(model, attention), attention.columns, strict=True)):
        if not columns_read[list(columns)].any() or not any(row_of(model, name, row).any() for name, row in places):
            dead.append(head)
    return dead[:-1] if len(dead) == attention.heads else dead


def _difference(before: nn.Module, after: nn.Module, probes: list[Call], tolerance: float) -> str:
    """Return how the outputs of two models differ, if they do; ignore those whose size differs, such as key caches."""
    compared = 0
    for probe in probes:
        for one, other in zip(*(tensors_in(runner(model, probe)()) for model in (before, after)), strict=True):
            if one.shape != other.shape or not one.numel():
                continue
            compared += 1
            change, largest = difference(one, other)
            if not change <= tolerance * max(1.0, largest):
                return f"without its dead heads outputs change by {change:.2g} (the largest is {largest:.3g})"
    return "" if compared else "without its dead heads every output has another size"


# ---- removing channels --------------------------------------------------------------------------------------------------


Cut = tuple[list[DeadGroup], nn.Module, dict[str, Kept]]


def _without_most(
    model: nn.Module,
    groups: list[DeadGroup],
    inputs: list[Call],
    expected: list[Any],
    tolerance: float,
    refused: dict[str, str],
) -> Cut:
    """Return a copy without all groups; if its outputs change, only without harmless ones. Records why the others stay."""
    smaller, kept, reason = _tried(model, groups, inputs, expected, tolerance)
    if not reason:
        return groups, smaller, kept
    taken: list[DeadGroup] = []
    for group in groups:
        reason = _tried(model, [*taken, group], inputs, expected, tolerance)[2]
        if reason:
            refused[group.root] = reason
        else:
            taken.append(group)
    return taken, *_without(model, taken)


def _shuffled(tensor: Tensor) -> Tensor:
    """Shuffle floating-point numbers; integers keep their places, because their meaning may depend on them."""
    if not tensor.is_floating_point():
        return tensor
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0)).to(tensor.device)
    return tensor.flatten()[order].view_as(tensor)


def _far(tensor: Tensor) -> Tensor:
    """Add large noise to floating-point numbers, so that no channel to which they are added looks constant."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    return tensor + 10 * tensor.abs().max().clamp(min=1) * noise


def _zeroed(call: Call, tensor: Tensor) -> Tensor:
    """Zeros instead of integers that are the same for all samples, such as one time step; zero is always a valid index."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return tensor
    same = bool((tensor == tensor[:1]).all()) if call.is_batch(tensor) else True
    return torch.zeros_like(tensor) if same else tensor


def _runs(model: nn.Module, call: Call) -> bool:
    """Whether a model runs on these inputs and returns finite numbers."""
    try:
        return all(bool(output.isfinite().all()) for output in tensors_in(runner(model, call)()))
    except Exception:
        return False


def _can_be_shuffled(model: nn.Module, call: Call) -> bool:
    """Whether a model runs on shuffled inputs: one of several inputs may be a mask or a length that must not change."""
    floating = [tensor for tensor in call.tensors if tensor.is_floating_point()]
    if len(call.tensors) == 1 or not floating:
        return bool(floating)
    try:
        return not any(bool(output.isnan().any()) for output in tensors_in(runner(model, call.map(_shuffled))()))
    except Exception:
        return False


def _tried(
    model: nn.Module, groups: list[DeadGroup], inputs: list[Call], expected: list[Any], tolerance: float
) -> tuple[nn.Module, dict[str, Kept], str]:
    """Return a copy without these groups, what is left of each layer, and how its outputs differ, if they do."""
    try:
        smaller, kept = _without(model, groups)
        with _signs_turned(model, model, {}):
            expected = [*expected, runner(model, inputs[0])()]
        found = [runner(smaller, x)() for x in inputs]
        with _signs_turned(smaller, model, kept):
            found.append(runner(smaller, inputs[0])())
        for before, after in zip(expected, found, strict=True):
            change, largest = difference(before, after)
            if not change <= tolerance * max(1.0, largest):
                return smaller, kept, f"without it outputs change by {change:.2g} (the largest is {largest:.3g})"
    except Exception as error:
        return model, {}, f"without it the model does not run ({first_line(error)})"
    return smaller, kept, ""


@contextmanager
def _signs_turned(model: nn.Module, whole: nn.Module, kept: Mapping[str, Kept]) -> Iterator[None]:
    """Flip signs of outputs at random, equally in the whole and the smaller model; outputs without weights keep theirs."""

    def turn(fed: Tensor, outputs: list[int] | None, dice: torch.Generator, layer: Any, args: Any, out: Tensor) -> Tensor:
        along = 1 - layer.weight.ndim
        shape = [*out.movedim(along, -1).shape[:-1], len(fed)]
        signs = torch.randint(0, 2, shape, generator=dice) * 2 - 1
        signs[..., ~fed.cpu()] = 1
        return out * (signs if outputs is None else signs[..., outputs]).movedim(-1, along).to(out)

    handles = []
    for name, layer in whole.named_modules():
        if is_layer(layer) and not is_depthwise(layer):  # depthwise layers pass flipped signs on
            hook = partial(turn, fed_outputs(layer), kept.get(name, Kept()).outputs, torch.Generator().manual_seed(0))
            handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _without(model: nn.Module, groups: list[DeadGroup]) -> tuple[nn.Module, dict[str, Kept]]:
    """Return a copy without the channels of these groups, with constants folded, and what is left of each layer."""
    model = copy_model(model)
    outputs: dict[str, set[int]] = {}
    inputs: dict[str, set[int]] = {}
    for group in groups:
        for name, constants in group.constants.items():
            _fold(model.get_submodule(name), constants, group.readers[name], group)
        for side, members in ((outputs, group.outputs), (inputs, group.readers)):
            for name, channels in members.items():
                gone = (index for channel in group.removed for index in channels.get(channel, ()))
                side.setdefault(name, set()).update(gone)
    kept: dict[str, Kept] = {}
    for name in {**outputs, **inputs}:
        layer = model.get_submodule(name)
        written = [o for o in range(out_count(layer)) if o not in outputs[name]] if outputs.get(name) else None
        read = [i for i in range(in_count(layer)) if i not in inputs[name]] if inputs.get(name) else None
        kept[name] = Kept(written, read)
        cut(layer, kept[name])
    return model, kept


def _fold(layer: Any, constants: dict[int, float], channels: Positions, group: DeadGroup) -> None:
    """Fold the constants of channels to be removed into a layer: into its bias, or into the weights of a carrier."""
    gone = sorted({index for channel in group.removed for index in channels.get(channel, []) if constants.get(index)})
    if not gone:
        return
    along = 0 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else 1
    weight = layer.weight.detach().double()
    values = torch.tensor([constants[index] for index in gone], dtype=torch.double, device=weight.device)
    grouped = isinstance(layer, CONVOLUTIONS) and layer.groups > 1
    if grouped and bias_is_exact(layer):
        size, rows = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        for index, value in zip(gone, values, strict=True):
            part = slice(index // size * rows, (index // size + 1) * rows)
            layer.bias[part] += (value * weight[part, index % size].flatten(1).sum(1)).to(layer.bias.dtype)
        return
    lost = (weight.index_select(along, torch.tensor(gone, device=weight.device)).movedim(along, -1) * values).sum(-1)
    if bias_is_exact(layer):
        layer.bias.copy_(layer.bias.double() + lost.flatten(1).sum(1) if lost.ndim > 1 else layer.bias.double() + lost)
        return
    staying = [index for channel in group.carriers for index in channels.get(channel, []) if constants.get(index)]
    carrier = max(staying, key=lambda index: abs(constants[index]))
    layer.weight.select(along, carrier).add_((lost / constants[carrier]).to(layer.weight.dtype))
