"""A smaller model comes back from its file, and its optimizer goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sparse.export import carry_optimizer, load_model, remove_dead, save_compact, save_model
from lightning_sparse.models import ResNet
from tests.helpers.nets import NETS, kill, sample, unsettle

tp = pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("make", NETS)
def test_a_new_model_becomes_the_smaller_one_from_its_file(
    make: Callable[[], tuple[nn.Module, dict[str, int]]], tmp_path: object
) -> None:
    torch.manual_seed(0)
    net = unsettle(make()[0])
    x = sample(make, 4)
    smaller, removal = remove_dead(net, x)
    save_model(smaller, f"{tmp_path}/net.safetensors", removal.blueprint)
    again = load_model(make()[0].eval(), f"{tmp_path}/net.safetensors")
    assert torch.equal(again(x), smaller(x))
    for (name, a), (other, b) in zip(smaller.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"does not have; build the model as it was trained|does not fit"):
        load_model(nn.Sequential(nn.Linear(2, 2)), f"{tmp_path}/net.safetensors")


def test_a_file_of_another_model_says_so(tmp_path: object) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[0], [1])
    smaller, removal = remove_dead(net, torch.randn(3, 4))
    save_model(smaller, f"{tmp_path}/net", removal.blueprint)
    for other in (smaller, nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))):
        with pytest.raises(ValueError, match="does not fit Sequential as it was built"):
            load_model(other, f"{tmp_path}/net")
    for note in (None, ["a note"]):
        save_compact(net.state_dict(), f"{tmp_path}/tensors", note)
        with pytest.raises(ValueError, match="holds tensors without the structure of a model; read them with load_compact"):
            load_model(net, f"{tmp_path}/tensors")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_goes_on_with_its_moments(kind: type[torch.optim.Optimizer]) -> None:
    """Trained on with the smaller model, weights are what they would have been in the whole one under its mask."""
    torch.manual_seed(0)
    net = ResNet(4, 1, 8, depth=8).double()
    dead = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            dead[name] = list(range(0, layer.out_channels, 2))
            kill(layer, dead[name])
        if isinstance(layer, nn.BatchNorm2d):  # dead channels emit nothing, and learn nothing that is read
            layer.bias.data[::2] = -9.0
    for part in net.modules():  # in training mode the two would differ by what the normalization of dead channels learns
        if isinstance(part, nn.BatchNorm2d):
            part.requires_grad_(False)
    options = {"lr": 0.01} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    optimizer = kind(net.parameters(), **options)
    x, y = torch.randn(16, 1, 8, 8, dtype=torch.double), torch.randint(0, 4, (16,))

    def step(module: nn.Module) -> None:
        optimizer.zero_grad()
        F.cross_entropy(module.eval()(x), y).backward()
        optimizer.step()

    def mask() -> None:
        for name, outputs in dead.items():
            kill(net.get_submodule(name), outputs)

    for _ in range(3):
        step(net)
        mask()
    smaller, removal = remove_dead(net, x)
    twin_optimizer = kind(net.parameters(), **options)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    carry_optimizer(optimizer, net, smaller, removal.blueprint)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in smaller.parameters()}
    for _ in range(3):
        step(smaller)
    optimizer = twin_optimizer
    for _ in range(3):
        step(net)
        mask()
    expected, _ = remove_dead(net, x)
    for (name, a), (_, b) in zip(smaller.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_a_memory_that_cannot_be_cut_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[0], [0])
    optimizer = torch.optim.Adafactor(net.parameters())
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    kill(net[0], [0])
    smaller, removal = remove_dead(net, torch.randn(3, 4))
    before = {p: dict(optimizer.state[p]) for p in net.parameters()}
    with pytest.raises(ValueError, match="of Adafactor has the shape"):
        carry_optimizer(optimizer, net, smaller, removal.blueprint)
    assert optimizer.param_groups[0]["params"] == list(net.parameters())
    assert optimizer.state == before, "it stays as it was"
    with pytest.raises(ValueError, match="give the model it was made for"):
        carry_optimizer(optimizer, nn.Linear(1, 1), smaller, removal.blueprint)
