"""The optimizer by itself: spheres beside plain SGD, saved and loaded, with everything that torch puts around it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.functional import from_dual, lp_norm, lp_sgd_step, to_dual
from lightning_sparse.optim import LpSGD, sphere_groups

POWERS = [1.07, 1.2, 1.4, 2.0, 3.0, 6.0]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 2, 6, 6, generator=generator).to(next(net.parameters()).dtype)
    return F.cross_entropy(net(images), torch.randint(3, (8,), generator=generator))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def distance(net: nn.Sequential, p: float) -> float:
    return max(float((lp_norm(net[i].weight.detach(), p) - 1).abs().max()) for i in (0, 3))


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_are_on_the_sphere_from_the_start_and_after_every_step(p: float, momentum: float) -> None:
    net = network()
    optimizer = LpSGD(sphere_groups(net, p, lr=0.1, mixing=0.05), lr=0.1, momentum=momentum)
    assert distance(net, p) < 1e-5
    for step in range(10):
        train(net, optimizer, range(step, step + 1))
        assert distance(net, p) < 1e-5
    assert float((lp_norm(net[6].weight.detach(), p) - 1).abs().max()) > 1e-2, "the last layer is free"


def test_it_makes_the_step_of_the_formula() -> None:
    net = network()
    optimizer = LpSGD(sphere_groups(net, {"0": 1.3, "3": 2.5}, lr=0.1, mixing=0.2), lr=0.1, momentum=0.0)
    duals = {0: to_dual(net[0].weight.detach(), 1.3), 3: to_dual(net[3].weight.detach(), 2.5)}
    loss_of(net, 0).backward()
    optimizer.step()
    for layer, p in ((0, 1.3), (3, 2.5)):
        assert net[layer].weight.grad is not None
        expected = from_dual(lp_sgd_step(duals[layer], net[layer].weight.grad, 0.2, p), p)
        torch.testing.assert_close(net[layer].weight.detach(), expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_free_groups_take_the_steps_of_sgd(nesterov: bool) -> None:
    mine, peer = network(), network()
    options = {"lr": 0.05, "momentum": 0.8, "nesterov": nesterov, "weight_decay": 1e-2}
    train(mine, LpSGD(mine.parameters(), **options), range(6))  # type: ignore[arg-type]
    train(peer, torch.optim.SGD(peer.parameters(), **options), range(6))  # type: ignore[arg-type]
    for a, b in zip(mine.state_dict().values(), peer.state_dict().values(), strict=True):
        assert a.equal(b)


def test_weight_decay_leaves_the_sphere_alone() -> None:
    runs = []
    for decay in (0.0, 0.5):
        net = network()
        net[6].requires_grad_(False)
        constrained = [net[0].weight, net[3].weight]
        train(net, LpSGD([{"params": constrained, "p": 1.4, "lr": 0.1}], lr=0.1, weight_decay=decay), range(4))
        runs.append(net.state_dict())
    assert all(a.equal(b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_one_schedule_moves_both_rates() -> None:
    net = network()
    optimizer = LpSGD(sphere_groups(net, 1.2, lr=2.0, mixing=2 / 256), lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1 / 256, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4])
def test_going_on_from_a_checkpoint_is_exact(dtype: torch.dtype, stop: int) -> None:
    whole = network().to(dtype)
    optimizer = LpSGD(sphere_groups(whole, 1.15, lr=0.1, mixing=0.1), lr=0.1)
    train(whole, optimizer, range(stop))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, range(stop, 7))
    torch.manual_seed(99)
    other = network().to(dtype)
    for parameter in other.parameters():
        parameter.data.mul_(3)
    other.load_state_dict(saved[0])
    again = LpSGD(sphere_groups(other, 1.15, lr=0.1, mixing=0.1), lr=0.1)
    again.load_state_dict(saved[1])
    assert all(a.equal(b) for a, b in zip(saved[0].values(), other.state_dict().values(), strict=True))
    train(other, again, range(stop, 7))
    assert all(a.equal(b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))
    state = again.state[other[0].weight]
    assert state["dual"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_what_others_do_to_a_weight_lasts_until_the_next_step() -> None:
    plain, edited = network(), network()
    optimizers = [LpSGD(sphere_groups(net, 1.3, lr=0.0), lr=0.0) for net in (plain, edited)]
    for net, optimizer in zip((plain, edited), optimizers, strict=True):
        train(net, optimizer, range(1))
    gradients = [torch.randn_like(p) for p in plain.parameters()]
    edited[0].weight.data.zero_()
    for net, optimizer in zip((plain, edited), optimizers, strict=True):
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    assert plain[0].weight.equal(edited[0].weight)


def test_weights_without_a_gradient_stay() -> None:
    net = network()
    optimizer = LpSGD(sphere_groups(net, 1.3, lr=0.1, mixing=0.1), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    assert all(a.equal(b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_vectors_of_zeros_wait_for_their_gradient() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = LpSGD([weight], lr=0.01, p=1.5, momentum=0.0)
    weight.grad = torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    optimizer.step()
    assert weight.tolist() == [[0, 0, 0], [0, -1, 0]]


def test_transposed_convolutions() -> None:
    net = nn.Sequential(nn.ConvTranspose1d(4, 3, 2), nn.Linear(5, 2))
    optimizer = LpSGD(sphere_groups(net, 1.4, lr=0.1, mixing=0.1), lr=0.1)
    net(torch.randn(2, 4, 4)).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(lp_norm(net[0].weight.detach(), 1.4, dim=1).flatten(), torch.ones(3))


def test_a_closure_a_tensor_rate_and_a_copy() -> None:
    net = network()
    optimizer = LpSGD(sphere_groups(net, 1.3, lr=0.1, mixing=0.1), lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).detach() > 0  # type: ignore[arg-type]
    assert distance(net, 1.3) < 1e-5
    assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, 4))


BAD: list[tuple[Any, str]] = [
    (lambda: LpSGD([weight()], lr=0.1, p=1.0), "p=1.0 must be a finite number above 1"),
    (lambda: LpSGD([weight()], lr=0.0, p=1.5), "lr=0.0 of a group with p=1.5 is a mixing weight and must be in (0, 1]"),
    (lambda: LpSGD([weight()], lr=2.0, p=1.5), "lr=2.0 of a group with p=1.5 is a mixing weight"),
    (lambda: LpSGD([weight()], lr=-0.1), "lr=-0.1 must be >= 0"),
    (lambda: LpSGD([weight()], lr=0.1, momentum=1.0), "momentum=1.0 must be in [0, 1)"),
    (lambda: LpSGD([weight()], lr=0.1, weight_decay=-1), "weight_decay=-1 must be >= 0"),
    (lambda: LpSGD([nn.Parameter(torch.ones(3))], lr=0.1, p=1.5), "Parameter 0 of a group with p has shape (3,) and no"),
    (lambda: LpSGD([nn.Parameter(torch.ones(3, 1))], lr=0.1, p=1.5), "has outputs of a single entry"),
    (lambda: sphere_groups(network(), [1.2] * 3, lr=0.1), "p lists 3 values for 2 constrained weights"),
    (lambda: sphere_groups(network(), 1.0, lr=0.1), "p=1.0 must be a finite number above 1"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        make()
    assert sentence in str(error.value)


def test_a_scheduler_that_leaves_the_range() -> None:
    net = network()
    optimizer = LpSGD(sphere_groups(net, 1.3, lr=0.1), lr=0.1)
    loss_of(net, 0).backward()
    optimizer.param_groups[0]["lr"] = 1.5
    with pytest.raises(ValueError, match=r"A scheduler set lr=1.5 for a group with p=1.3"):
        optimizer.step()


def test_a_refused_group_is_not_kept() -> None:
    optimizer = LpSGD([weight()], lr=0.1, p=1.5)
    with pytest.raises(ValueError, match="single entry"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 1))]})
    assert len(optimizer.param_groups) == 1
