"""SparseGPT on a whole model: each layer is pruned with the inputs that those before it give when they are pruned."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import MagnitudePruning, SparseGPT, Wanda
from lightning_sparse.core import Target, as_matrix, from_matrix
from lightning_sparse.functional import compensate, inverse_factor
from lightning_sparse.testing import Toy, fit, fit_on_ranks, loader, network, run_on_ranks, toy
from tests.helpers.data import DATA, Talkative, run
from tests.helpers.inputs import LAYERS, Note, batches, inputs, solved

HALF = {"net.0.weight": 36, "net.2.weight": 288, "net.6.weight": 1024, "net.8.weight": 32}


def walk(net: nn.Sequential, x: Tensor, kept: dict[str, int], n_m: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Layer after layer; the patches of convolutions have the kernel position first, as n:m counts inputs."""
    net = copy.deepcopy(net)
    for name, index in LAYERS.items():
        if name not in kept:
            continue
        layer: Any = net[index]
        rows = inputs(net, x)[name]
        if isinstance(layer, nn.Conv2d):
            rows = rows.unflatten(1, (layer.in_channels, -1)).transpose(1, 2).flatten(1)
        target = Target.of("weight", layer.weight, layer)
        products = (rows.T @ rows)[None]
        dead = products.diagonal(dim1=1, dim2=2) == 0
        matrix = as_matrix(target, layer.weight.detach()).clone()
        compensate(matrix, inverse_factor(products), kept[name], n_m=n_m, dead=dead)
        layer.weight.data.copy_(from_matrix(target, matrix))
    return {name: net[index].weight.detach() for name, index in LAYERS.items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        assert (found[name] == 0).equal(weight == 0), name
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_layers_are_pruned_one_after_the_other(count: int) -> None:
    module = toy()
    expected = walk(module.net, batches(count), HALF)
    method = SparseGPT(0.5, batches=count)
    close(solved(method, module), expected)
    assert method.masks.kept == 1380


def test_two_of_four() -> None:
    module = toy()
    expected = walk(module.net, batches(4), dict.fromkeys([*LAYERS][1:], 0), (2, 4))
    method = SparseGPT(structure="2:4", batches=4)
    close(solved(method, module), expected)
    for mask in (method.masks[name] for name in method.masks):
        assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


class Attention(Toy):
    """Query, key and value read the same tokens; a layer is called twice, with other inputs."""

    def __init__(self) -> None:
        super().__init__(net=nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "vkqot"}))
        self.sent: list[str] = []
        for name, layer in self.net.items():
            layer.register_forward_hook(lambda *_, name=name: self.sent.append(name))

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].squeeze(1)
        q, k, v = self.net["q"](x), self.net["k"](x), self.net["v"](x)
        x = self.net["o"](F.scaled_dot_product_attention(q, k, v))
        return F.cross_entropy(self.net["t"](self.net["t"](x).relu()).mean(1), batch[1])


def test_layers_that_read_the_same_input_share_a_pass() -> None:
    torch.manual_seed(0)
    module = Attention()
    before = {name: layer.weight.detach().clone() for name, layer in module.net.items()}
    x = batches(2)
    weights = solved(SparseGPT(0.5, batches=2), module)
    sent = "".join(module.sent)
    assert sent.startswith(2 * "qkvott" + 2 * "qkv" + 2 * "qkvott")  # a batch that has come to the layer goes no further
    rows = x.flatten(0, 2)

    def alone(name: str, rows: Tensor) -> Tensor:
        matrix = before[name][None].clone()
        compensate(matrix, inverse_factor((rows.T @ rows)[None]), 32)
        return matrix[0]

    pruned = {name: alone(name, rows) for name in "qkv"}
    tokens = x.squeeze(1)
    attended = F.scaled_dot_product_attention(*(tokens @ pruned[name].T for name in "qkv"))
    pruned["o"] = alone("o", attended.flatten(0, 1))
    y = (attended @ pruned["o"].T).flatten(0, 1)
    pruned["t"] = alone("t", torch.cat([y, (y @ before["t"].T).relu()]))
    close({name: weights[f"net.{name}.weight"] for name in before}, pruned)


def test_outputs_are_closer_to_the_dense_ones_than_those_of_others() -> None:
    class Still(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def distance(method: L.Callback) -> float:
        torch.manual_seed(0)
        module = Still(net=network(dropout=0))
        x = batches(4)
        dense = module.net(x)
        fit(module, method, max_epochs=1)
        return float((module.net(x) - dense).detach().square().mean())

    own = distance(SparseGPT(0.5))
    assert own < 0.9 * distance(Wanda(0.5))
    assert own < 0.7 * distance(MagnitudePruning(0.5, start=0, end=0, allocation="uniform"))


def test_nobody_notices() -> None:
    plain, watched = Talkative(), Talkative()
    watched.load_state_dict(plain.state_dict())
    data = next(iter(DATA.values()))
    expected, got = run(plain, data), run(watched, data, SparseGPT(0.0))
    assert {got["logged"].pop(name) for name in ("sparsity", "sparsity/actual", "sparsity/model")} == {0.0}
    assert expected["logged"] == got["logged"]
    assert expected["random"] == got["random"]
    assert all(expected["weights"][name].equal(value) for name, value in got["weights"].items())


def scored(rank: int) -> dict[str, Tensor]:
    module = toy(net=network(dropout=0))
    module.load_state_dict(toy().state_dict())
    note = Note()
    fit_on_ranks(rank, module.double(), SparseGPT(0.5, batches=1), note, max_steps=1)
    return note.weights


def test_products_are_those_of_all_ranks() -> None:
    first, second = run_on_ranks(scored)
    both = torch.cat([next(iter(loader(rank=rank, world_size=2)))[0] for rank in (0, 1)]).double()
    expected = walk(toy().double().net, both, HALF)
    close(first, expected)
    assert all(first[name].equal(second[name]) for name in first)


class Repeated(Toy):
    """Inputs of which half are copies of the others, and fewer rows than columns."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 4)))

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].flatten(1)
        return F.cross_entropy(self.net(torch.cat([x, x, 1e4 * x, 0 * x], 1)), batch[1])


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_inputs_that_repeat_are_damped(structure: str) -> None:
    torch.manual_seed(0)
    module = Repeated()
    method = SparseGPT(0.5, batches=1, damping=1e-9, structure=structure)
    weights = solved(method, module)
    for name in ("net.0.weight", "net.2.weight"):
        assert weights[name].isfinite().all()
        assert (weights[name] == 0).equal(~method.masks[name])
    assert method.masks.sparsity == 0.5


class Unreached(Toy):
    """An expert without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


class Blank(Toy):
    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] * 0, batch[1]))


class Deaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class BlankBehind(Toy):
    """Only the second layer cannot be pruned, when the first one has been."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Deaf(), nn.Linear(8, 4)))


REFUSED = [
    (
        BlankBehind,
        "'net.3.weight' cannot be pruned on batches=8. The inputs are zero throughout or not finite",
    ),
    (
        Unreached,
        "no input has reached 'spare.weight' in batches=8; take more batches, or keep it",
    ),
    (
        Blank,
        "'net.0.weight' cannot be pruned on batches=8. The inputs are zero throughout or not finite",
    ),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence[:20] for _, sentence in REFUSED])
def test_refusals(make: type[Toy], sentence: str) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=".") as error:
        fit(module, SparseGPT(0.5))
    assert sentence in str(error.value)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items()), "nothing has been touched"
