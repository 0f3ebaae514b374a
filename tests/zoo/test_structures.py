"""What a structure takes is what it says, by the gradients of the layers themselves: nothing here asks how weights lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import MagnitudePruning
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import trainer
from tests.helpers.zoo import ZOO, Batches, Guest

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
NAMES = sorted({*ZOO} - {"wav2vec2", "nfnet", "schedulefree", "detector"})  # of whose layers others have the like


class Probe(NamedTuple):
    """One matrix of a layer, and the layer as a function of a vector, from which it makes one number or more per output.

    Args:
        weight: the name of the matrix in the layer.
        index: which matrix of a stack it is.
        layer: that holds it.
        call: the layer as a function.
        inputs: how long the vector is.
        inner: whether the matrix is applied to something inside, and not to the vector.
    """

    weight: str
    index: tuple[int, ...]
    layer: nn.Module
    call: Callable[[nn.Module, Tensor], Tensor]
    inputs: int
    inner: bool = False

    def stranger(self) -> nn.Module:
        """A copy of the layer with random weights, so that no gradient is zero, or equals another, by accident."""
        layer = copy.deepcopy(self.layer).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) / 4 + 0.05)
        return layer

    def slopes(self, layer: nn.Module, x: Tensor, mix: bool = True) -> Tensor:
        """Of a mix of the outputs, by the entries of the matrix."""
        out = self.call(layer, x)
        factors = torch.linspace(1, 2, len(out)) if mix else torch.ones(len(out))
        total = (out.flatten(1).sum(1) * factors).sum() if out.ndim > 1 else (out * factors).sum()
        found: Tensor = torch.autograd.grad(total, layer.get_parameter(self.weight))[0]
        return found[self.index]

    def behind_inputs(self) -> list[Tensor]:
        """For every input the entries that multiply it: no others have a gradient where it is the only one."""
        layer = self.stranger()
        if self.inner:  # what multiplies the same number has the same gradient
            return by_value(self.slopes(layer, torch.ones(self.inputs), mix=False))
        return [self.slopes(layer, unit) != 0 for unit in torch.eye(self.inputs)]

    def behind_outputs(self) -> list[Tensor]:
        """For every output the entries that lead to it: where all inputs are one, these have the same gradient."""
        layer, ones = self.stranger(), torch.ones(self.inputs)
        if not self.inner:
            return by_value(self.slopes(layer, ones))
        weight = layer.get_parameter(self.weight)
        return [torch.autograd.grad(out, weight, retain_graph=True)[0][self.index] != 0 for out in self.call(layer, ones)]

    @property
    def kept(self) -> Tensor:
        """Which entries are not zero."""
        return self.layer.get_parameter(self.weight)[self.index] != 0

    def places(self, mask: Tensor) -> list[Tensor]:
        """The same of every place of a kernel."""
        return list(mask.flatten(2).unbind(2)) if isinstance(self.layer, CONVOLUTIONS) else [mask]


def by_value(slopes: Tensor) -> list[Tensor]:
    """The entries that share a value, for every value but zero, in the order of their first entries."""
    values = dict.fromkeys(slopes[slopes != 0].tolist())
    return [slopes == value for value in values]


def fit(name: str, method: Sparsifier) -> Guest:
    """One epoch."""
    guest = Guest(ZOO[name])
    trainer(method, max_epochs=1).fit(guest, Batches(ZOO[name], 2))
    return guest


def probes(guest: Guest) -> dict[str, Probe]:
    """Of every kind of layer that the model is made of one."""
    shapes, seen = widths(guest), set()
    embedded = {id(layer.weight) for layer in guest.modules() if isinstance(layer, nn.Embedding)}
    found: dict[str, Probe] = {}
    for name, layer in guest.model.named_modules():
        kind = (type(layer), getattr(layer, "groups", 1) > 1)
        weights = list(layer.parameters(recurse=False))
        if kind in seen or not any(p.requires_grad for p in weights) or any(id(p) in embedded for p in weights):
            continue
        mine = list(probes_of(layer, shapes.get(name, ())))
        seen |= {kind} if mine else set()
        found |= {f"{name}.{probe.weight}{[*probe.index]}": probe for probe in mine}
    return found


def probes_of(layer: nn.Module, shape: tuple[int, ...]) -> Iterator[Probe]:
    if isinstance(layer, CONVOLUTIONS):
        yield Probe("weight", (), layer, convolved, shape[1])
    elif isinstance(layer, nn.LSTM | nn.GRU):
        zero, one = torch.zeros(layer.hidden_size), torch.ones(1, layer.input_size)
        yield Probe("weight_ih_l0", (), layer, lambda m, x: m(x[None], memory(m, zero))[0][0], layer.input_size)
        yield Probe("weight_hh_l0", (), layer, lambda m, h: m(one, memory(m, h))[0][0], layer.hidden_size)
    elif type(layer).__name__.endswith("Experts"):
        for expert in (0, 2):
            route = torch.tensor([[expert]]), torch.ones(1, 1)
            for weight, inner in (("gate_up_proj", False), ("down_proj", True)):
                yield Probe(weight, (expert,), layer, lambda m, x, r=route: m(x[None], *r)[0], shape[-1], inner)
    elif shape and is_matrix(layer):
        yield Probe("weight", (), layer, lambda m, x: m(x[None])[0], shape[-1])


def is_matrix(layer: nn.Module) -> bool:
    """Whether it multiplies a vector by a matrix."""
    other = type(layer).__name__.endswith(("Router", "Embedding", "Norm"))
    weight = getattr(layer, "weight", None)
    return not other and isinstance(weight, nn.Parameter) and weight.ndim == 2


def convolved(layer: nn.Module, x: Tensor) -> Tensor:
    """A place in the middle of a plane of the same vector everywhere; or all places that one vector spreads to."""
    assert isinstance(layer, CONVOLUTIONS)
    spread = isinstance(layer, nn.ConvTranspose2d)
    sizes = [1 if spread else 2 * size + 1 for size in layer.kernel_size]
    out: Tensor = layer(x.view(1, -1, *(1 for _ in sizes)).expand(1, -1, *sizes))[0]
    return out if spread else out[(slice(None), *(size // 2 for size in out.shape[1:]))]


def memory(layer: nn.Module, hidden: Tensor) -> Any:
    """The state of a recurrent layer; all but what its first layer remembers is always the same."""
    assert isinstance(layer, nn.RNNBase)
    rest = torch.linspace(0.1, 0.9, layer.num_layers * len(hidden)).view(layer.num_layers, -1)
    states = torch.cat([hidden[None], rest[1:]])
    return (states, rest) if isinstance(layer, nn.LSTM) else states


def widths(guest: Guest) -> dict[str, tuple[int, ...]]:
    """The shape of what every layer is given, by its name, seen in a forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, layer in guest.model.named_modules():

        def see(_: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
            if given and isinstance(given[0], Tensor):
                shapes[name] = tuple(given[0].shape)

        handles.append(layer.register_forward_pre_hook(see))
    guest.foreign.loss(guest.model, next(iter(Batches(guest.foreign, 1))))
    for handle in handles:
        handle.remove()
    return shapes


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_outputs(name: str) -> None:
    found = probes(fit(name, MagnitudePruning(0.5, structure="channel", allocation="uniform", start=0, end=0)))
    assert found
    for place, probe in found.items():
        kept, outputs = probe.kept, probe.behind_outputs()
        assert torch.stack(outputs).sum(0).unique().tolist() == [1], place
        alive = [bool(kept[entries].any()) for entries in outputs]
        assert all(kept[entries].all() for entries, lives in zip(outputs, alive, strict=True) if lives), place
        assert abs(2 * sum(alive) - len(alive)) <= 1, place


@pytest.mark.parametrize("name", NAMES)
def test_two_of_four_inputs_are_kept(name: str) -> None:
    found = probes(fit(name, MagnitudePruning(structure="2:4", start=0, end=0)))
    checked = 0
    for place, probe in found.items():
        kept, inputs, outputs = probe.places(probe.kept), probe.behind_inputs(), probe.behind_outputs()
        for entries in outputs[:: -(-len(outputs) // 8)]:
            mine = [both for multiplied in inputs if bool((both := multiplied & entries).any())]
            if len(mine) % 4:
                assert probe.kept.all(), place
                break
            for start in range(0, len(mine), 4):
                four = probe.places(torch.stack(mine[start : start + 4]).any(0))
                assert [int((k & f).count_nonzero()) for k, f in zip(kept, four, strict=True)] == [2] * len(four), place
                checked += 1
    assert checked


def test_what_does_not_fit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    guest = fit("convnext", MagnitudePruning(structure="2:4", start=0, end=0))
    assert "keeps 'model.stem.0.weight' dense: it has 3 inputs" in caplog.text
    first, depthwise = (
        guest.get_parameter("model.stem.0.weight"),
        guest.get_parameter("model.stages.0.blocks.0.conv_dw.weight"),
    )
    assert bool((first != 0).all())
    assert bool((depthwise != 0).all())
