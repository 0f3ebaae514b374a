"""Neurons, filters and channels that do nothing leave the network: a plain, smaller module with the same outputs.

A channel may go if every layer that reads it either multiplies it by zeros, or is given the same number for every input
because all that feeds it is zero. What is coupled with a channel through additions, concatenations, depthwise layers and
normalization is what an engine answers, see `core/coupling_engine.py`.

A dead filter still emits a constant c, from its bias or its normalization. It is folded into the bias of the next layer
where that is exact:

    b <- b + sum_j c_j sum_k W[:, j, k]      for linear layers, and convolutions whose border shows no zeros

Where zeros are padded, or there is no bias, one dead channel s with c_s != 0 stays and carries the others, which is exact
everywhere, since a layer is linear in its input channels:

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
)
from lightning_sparse.export.blueprint import Blueprint
from lightning_sparse.export.compare_models import difference, runner
from lightning_sparse.export.dead import DeadGroup, Round, bias_is_exact, fed_outputs

__all__ = ["Removal", "remove_dead"]


@dataclass
class Removal:
    """What was taken out, and what could not be.

    Args:
        blueprint: outputs and inputs left of each layer; loads the smaller model, and cuts an optimizer's moments.
        removed: layer -> outputs that are gone.
        carriers: layer -> dead outputs that stay, because they carry a constant that no bias can hold exactly.
        refused: layer -> why dead outputs of it stay.
        heads: attention -> heads that are gone.
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
    """A copy without the channels that do nothing, in evaluation mode; its outputs are equal up to rounding.

    Rounds are made until nothing more is found: what fed only a dead neuron dies with it. Each group of coupled channels is
    tried before it goes: on the inputs, on them shuffled, and with the signs turned of what living neurons put out, so that
    those are heard that are silent on these inputs. If outputs change it stays, and the report says so.

    Args:
        model: with exact zeros where a mask was; trained with `structure="channel"`, or so sparse that neurons are dead.
        inputs: a batch of real inputs; a tuple holds positional arguments, a dictionary named ones.
        tolerance: the largest change of an output, as a share of the largest output (or of 1 if that is smaller).
        network: the part of the model that takes the inputs, by name; None finds it.
        engine: that finds out which channels are coupled; Torch-Pruning's graph unless you give another.

    Returns:
        The smaller model, and what was removed.

    Raises:
        ValueError: if the engine is missing or cannot trace the model, or there is nothing to remove.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = net[0].weight.data[1:3].zero_()
        >>> smaller, removal = remove_dead(net, torch.randn(5, 3))
        >>> smaller[0], removal.removed
        (Linear(in_features=3, out_features=2, bias=True), {'0': 2})
    """
    now, removal = copy_model(model).eval(), Removal()
    call = Call.of(inputs, network)
    probes = [call, call.map(_shuffled)] if _can_be_shuffled(now, call) else [call]
    now = _without_dead_heads(now, call, probes, tolerance, removal)
    staying = dict(removal.refused)
    expected = [runner(now, probe)() for probe in probes]
    while True:
        removal.refused.clear()
        try:
            groups = list(Round(now, probes, removal.refused, engine).groups())
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
    """The model without heads of attention that put out zeros, or whose output is multiplied by zeros; those of each
    attention are tried before they go.
    """
    for attention in find_attentions(model, [call]).attentions:
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
            removal.refused[attention.name] = reason
            continue
        model = smaller
        removal.blueprint = removal.blueprint.then(kept, sizes)
        removal.heads[attention.name] = len(dead)
    return model


def _dead_heads(model: nn.Module, attention: Attention) -> list[int]:
    """Heads without a weight and a bias, or whose output nobody reads; but one stays."""
    read = model.get_submodule(attention.out)
    kind, weight = kind_of(read), read.get_parameter("weight")
    columns_read = weight.any(1 - (1 if kind is None else kind.input_dim))
    dead = []
    for head, (places, columns) in enumerate(zip(places_of(model, attention), attention.columns, strict=True)):
        if not columns_read[list(columns)].any() or not any(row_of(model, name, row).any() for name, row in places):
            dead.append(head)
    return dead[:-1] if len(dead) == attention.heads else dead


def _difference(before: nn.Module, after: nn.Module, probes: list[Call], tolerance: float) -> str:
    """How the outputs of two models differ, if they do; those of another size, such as caches of keys, have no say."""
    compared = 0
    for probe in probes:
        for one, other in zip(*(tensors_in(runner(model, probe)()) for model in (before, after)), strict=True):
            if one.shape != other.shape or not one.numel():
                continue
            compared += 1
            change, largest = difference(one, other)
            if not change <= tolerance * max(1.0, largest):
                return f"without its dead heads outputs change by {change:.2g} (the largest is {largest:.3g})"
    return "" if compared else "without its dead heads all outputs have another size"


# ---- taking it out ------------------------------------------------------------------------------------------------------


Cut = tuple[list[DeadGroup], nn.Module, dict[str, Kept]]


def _without_most(
    model: nn.Module,
    groups: list[DeadGroup],
    inputs: list[Call],
    expected: list[Any],
    tolerance: float,
    refused: dict[str, str],
) -> Cut:
    """A copy without all groups, or, if that changes its outputs, without those that do not; notes why the others stay."""
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
    """Floating-point numbers in another order; integers say what they say in their places."""
    if not tensor.is_floating_point():
        return tensor
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0)).to(tensor.device)
    return tensor.flatten()[order].view_as(tensor)


def _can_be_shuffled(model: nn.Module, call: Call) -> bool:
    """Whether a model runs on shuffled inputs: of several, one may be a mask or a length that must stay what it is."""
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
    """A copy without groups, what is left of each layer, and how its outputs differ, if they do."""
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
    """Signs of outputs turned at random, alike in the whole model and in a smaller one; not of outputs without weights."""

    def turn(fed: Tensor, outputs: list[int] | None, dice: torch.Generator, layer: Any, args: Any, out: Tensor) -> Tensor:
        along = 1 - layer.weight.ndim
        shape = [*out.movedim(along, -1).shape[:-1], len(fed)]
        signs = torch.randint(0, 2, shape, generator=dice) * 2 - 1
        signs[..., ~fed.cpu()] = 1
        return out * (signs if outputs is None else signs[..., outputs]).movedim(-1, along).to(out)

    handles = []
    for name, layer in whole.named_modules():
        if is_layer(layer) and not is_depthwise(layer):  # depthwise layers pass on what they are given
            hook = partial(turn, fed_outputs(layer), kept.get(name, Kept()).outputs, torch.Generator().manual_seed(0))
            handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _without(model: nn.Module, groups: list[DeadGroup]) -> tuple[nn.Module, dict[str, Kept]]:
    """A copy without the channels of groups, whose constants are folded forward, and what is left of each layer."""
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
    """Keep what a layer gets from channels that are about to go: in its bias, or in the weights of a carrier."""
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
