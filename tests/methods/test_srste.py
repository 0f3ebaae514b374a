"""SR-STE and S-STE: the same training as with the pruning function written into the network."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_sparse import SRSTE, GraNet, MagnitudePruning, RandomSparsity, RigL
from lightning_sparse.functional import group_soft_threshold, least_squares_scale
from lightning_sparse.testing import Toy, Watcher, fit, loader, network, toy
from tests.helpers.steps import SkippedSteps

MOST = ["!:first"]
"""The first layer of the toy has one input."""


def groups(weight: Tensor) -> list[list[tuple[int, ...]]]:
    """Index tuples of every four consecutive inputs of one output, at one place of the kernel."""
    places = [tuple(index) for index in torch.ones(weight.shape).nonzero().tolist() if index[1] % 4 == 0]
    return [[(place[0], place[1] + i, *place[2:]) for i in range(4)] for place in places]


def two_of_four(weight: Tensor) -> Tensor:
    """By Python's own sorting, group by group."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for members in groups(weight):
        for index in sorted(members, key=lambda index: -abs(float(weight[index])))[:2]:
            mask[index] = True
    return mask


def softened(weight: Tensor) -> Tensor:
    """Of every four the second smallest size is taken off, and what is below it is zero."""
    result = torch.zeros_like(weight)
    for members in groups(weight):
        threshold = sorted(abs(float(weight[index])) for index in members)[1]
        for index in members:
            value = float(weight[index])
            result[index] = (abs(value) - threshold) * (1 if value > 0 else -1) if abs(value) > threshold else 0.0
    return result


class Pruned(torch.autograd.Function):
    """The sparse-refined straight-through estimator, as the paper defines it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, strength: float) -> Tensor:
        mask = two_of_four(weight)
        ctx.save_for_backward(weight, mask)
        ctx.strength = strength
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradient + ctx.strength * weight.masked_fill(mask, 0), None


class Softened(torch.autograd.Function):
    """The continuous function of S-STE; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        return softened(weight) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Written(Toy):
    """The estimator in the graph, with dense weights as the model's own."""

    def __init__(self, optimizer: str, soft: bool) -> None:
        super().__init__(optimizer, network(dropout=0))
        self.soft = soft
        self.scales: dict[str, Tensor] = {}

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        shown = {}
        for name, p in self.net.named_parameters():
            if p.ndim > 1 and name != "0.weight":
                if self.soft and name not in self.scales:
                    first = softened(p.detach())
                    self.scales[name] = (p.detach() * first).sum() / first.square().sum()
                shown[name] = Softened.apply(p, self.scales[name]) if self.soft else Pruned.apply(p, 0.05)
        return F.cross_entropy(functional_call(self.net, shown, x.to(p.dtype)), y)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("soft", [False, True])
def test_equals_the_estimator_in_the_graph(optimizer: str, soft: bool) -> None:
    written, module = Written(optimizer, soft).double(), Toy(optimizer, network(dropout=0)).double()
    module.load_state_dict(written.state_dict())
    method = SRSTE(targets=MOST, soft=soft) if soft else SRSTE(targets=MOST, strength=0.05)
    # In the graph, the decay would count once per micro-batch; in the paper and here it counts once per step.
    options = {"limit_val_batches": 0, "max_epochs": 2, "accumulate_grad_batches": 2 if soft else 1}
    fit(written, **options)
    torch.manual_seed(0)
    fit(module, method, **options)
    for name, dense in written.net.named_parameters():
        weight = module.net.get_parameter(name).detach()
        if f"net.{name}" in method.hidden:
            hidden = method.hidden[f"net.{name}"]
            torch.testing.assert_close(hidden if soft else weight + hidden, dense.data, rtol=1e-9, atol=1e-12)
            expected = softened(dense.data) * written.scales[name] if soft else dense.data * two_of_four(dense.data)
            torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-11)
        else:
            torch.testing.assert_close(weight, dense.data, rtol=1e-9, atol=1e-12)


def test_literal_numbers() -> None:
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0, 0.5, 0.0, -0.5, 1.0]])
    kept = torch.tensor([[True, False, False, True, True, False, False, True]])
    shown = group_soft_threshold(weight, kept, 4)
    assert shown.tolist() == [[2.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.5]]
    assert not torch.signbit(shown[weight.sign() <= 0][shown[weight.sign() <= 0] == 0]).any()
    assert float(least_squares_scale(weight, shown)) == pytest.approx((8 + 3 + 0.5) / (4 + 1 + 0.25))
    assert group_soft_threshold(weight.t(), kept.t(), 4, 0).equal(shown.t())
    assert float(least_squares_scale(weight, 0 * weight)) == 1


def test_what_is_soft_does_not_jump_when_the_mask_does() -> None:
    """On both sides of a tie within the group, what is shown is nearly the same; a hard mask moves a whole weight."""
    before, after = (torch.tensor([[3.0, 1.0 + 1e-6 * sign, 1.0, 0.2]]) for sign in (1, -1))
    masks = [two_of_four(weight) for weight in (before, after)]
    assert not masks[0].equal(masks[1])
    soft = [group_soft_threshold(weight, mask, 4) for weight, mask in zip((before, after), masks, strict=True)]
    assert float((soft[0] - soft[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_dense_weights_are_those_that_the_optimizer_left(soft: bool, precision: Any) -> None:
    """Bit for bit: hiding and revealing a weight changes nothing."""
    method = SRSTE(targets=MOST, soft=soft)
    left: dict[str, Tensor] = {}

    class Spied(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(self.leave)  # before the callback's
            return optimizer

        def leave(self, *args: Any) -> None:
            left.update({name: weight.detach().clone() for name, weight in method.weights.items()})

        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            for name, weight in method.weights.items():
                assert name not in left or weight.equal(left[name])

    fit(Spied("adamw"), method, precision=precision)
    assert len(left) == 3


@pytest.mark.parametrize("soft", [False, True])
def test_what_others_change_between_steps_reaches_the_dense_weights(soft: bool) -> None:
    method, changes = SRSTE(targets=MOST, soft=soft, strength=0.0), []

    class Push(Toy):
        dense: ClassVar[dict[str, Tensor]] = {}

        def on_train_batch_start(self, *args: Any) -> None:
            for name, weight in method.weights.items():
                self.dense[name] = (method.hidden[name] if soft else weight + method.hidden[name]).detach().clone()
                weight.data[:, 0] += 0.5

        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:  # when dense weights are in the model
            changes.extend(weight.detach() - self.dense[name] for name, weight in method.weights.items())

    fit(Push(), method, max_epochs=1)
    assert len(changes) == 3 * 4
    for change in changes:
        torch.testing.assert_close(change[:, 0], torch.full_like(change[:, 0], 0.5))
        assert not change[:, 1:].any()


@pytest.mark.parametrize("soft", [False, True])
def test_a_skipped_step_leaves_no_trace(soft: bool) -> None:
    method = SRSTE(targets=MOST, soft=soft)
    states: list[list[Tensor]] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            parts = (method.weights, method.hidden, method.alive)
            states.append([value.detach().clone() for part in parts for value in part.values()])

    fit(toy(), method, Note(), plugins=[SkippedSteps({2})], max_epochs=1)
    assert [all(a.equal(b) for a, b in zip(states[i], states[i + 1], strict=True)) for i in range(3)] == [False, True, False]


@pytest.mark.parametrize("soft", [False, True])
def test_weights_that_were_loaded_between_two_fits_count(soft: bool) -> None:
    module, method = toy(), SRSTE(targets=MOST, soft=soft)
    runner = fit(module, method)
    other = toy(seed=5)
    module.load_state_dict(other.state_dict())
    dense: dict[str, Tensor] = {}

    class Note(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if not dense:
                for name, weight in method.weights.items():
                    dense[name] = method.hidden[name] if soft else weight + method.hidden[name]
                    dense[name] = dense[name].detach().clone()

    runner.callbacks.append(Note())  # type: ignore[attr-defined]
    runner.fit_loop.max_epochs = 4
    runner.fit(module, loader(), loader(1))
    assert len(dense) == 3
    for name, found in dense.items():
        torch.testing.assert_close(found, other.get_parameter(name).detach())


def test_masks_are_chosen_as_often_as_asked() -> None:
    method, changes, masks = SRSTE(targets=MOST, every="3 steps", end="9 steps"), [], {}

    class Note(L.Callback):
        def on_train_batch_end(self, fitted: L.Trainer, *args: Any) -> None:
            if masks and any(not method.alive[name].equal(mask) for name, mask in masks.items()):
                changes.append(fitted.global_step)
            masks.update({name: mask.clone() for name, mask in method.alive.items()})

    fit(toy("adam"), method, Note(), max_epochs=3)
    assert changes == [3, 6, 9]


@pytest.mark.parametrize("soft", [False, True])
def test_an_epoch_starts_with_the_largest_of_what_was_trained(soft: bool) -> None:
    method, changes = SRSTE(targets=MOST, soft=soft, every="2 epochs", end="4 epochs"), []
    masks: dict[str, Tensor] = {}

    def dense(name: str) -> Tensor:
        return method.hidden[name] if soft else method.weights[name].detach() + method.hidden[name]

    class Note(L.Callback):
        def on_train_batch_start(self, fitted: L.Trainer, *args: Any) -> None:
            if any(not method.alive[name].equal(mask) for name, mask in masks.items()):
                changes.append(fitted.global_step)
                assert all(method.alive[name].equal(two_of_four(dense(name))) for name in method.alive)
            for name, mask in method.alive.items():
                masks[name] = mask.clone()
                assert not method.weights[name][~mask].any()

    fit(toy("adam"), method, Note(), max_epochs=6)
    assert changes == [8, 16]
    assert method.window.is_over


def test_dropped_weights_come_back_and_the_decay_holds_them_down() -> None:
    sizes, returned = {}, torch.zeros(())
    for strength in (0.0, 0.5):
        method, before = SRSTE(targets=MOST, strength=strength), {}

        class Note(L.Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                for name, mask in method.alive.items():  # noqa: B023
                    if name in before:  # noqa: B023
                        returned.add_((mask & ~before[name]).sum())  # noqa: B023
                before.update({name: mask.clone() for name, mask in method.alive.items()})  # noqa: B023

        runner = fit(toy(), method, Note(), max_epochs=5)
        sizes[strength] = float(runner.callback_metrics["SRSTE/dropped_size"])
        assert method.mask_set.sparsity == 0.5
    assert returned > 0
    assert sizes[0.5] < 0.8 * sizes[0.0]


def test_the_published_strengths() -> None:
    """None is 2e-4, and 0 for S-STE: a run is the one that is given that number."""
    for soft, strength in ((False, 2e-4), (True, 0.0)):
        modules = []
        for given in (None, strength):
            torch.manual_seed(0)
            modules.append(toy())
            fit(modules[-1], SRSTE(targets=MOST, soft=soft, strength=given), max_epochs=1)
        assert all(a.equal(b) for a, b in zip(*(m.parameters() for m in modules), strict=True))


def is_two_of_four(mask: Tensor, dim: int) -> bool:
    return bool((mask.movedim(dim, -1).reshape(-1, 4).sum(1) == 2).all())


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: SRSTE(every="2 steps", **options),
        lambda **options: MagnitudePruning(start=0.1, end=0.7, every="1 step", **options),
        lambda **options: MagnitudePruning(start=0.5, end=0.5, **options),
        lambda **options: RandomSparsity(**options),
        lambda **options: RigL(every="2 steps", **options),
        lambda **options: GraNet(every="2 steps", initial_sparsity=0.0, **options),
    ],
)
def test_both_directions_for_every_kind_of_method(make: Any) -> None:
    method, sights = make(structure="transposable 2:4", targets=MOST), []

    def look(moment: str, module: L.LightningModule) -> None:
        masks = [method.mask_set[name] for name in method.weights]
        assert not any(weight[~mask].any() for weight, mask in zip(method.weights.values(), masks, strict=True))
        sights.append([(is_two_of_four(mask, 0), is_two_of_four(mask, 1)) for mask in masks])

    module = toy()
    fit(module, Watcher(look), method)
    assert sights[-1] == [(True, True)] * 3
    if not isinstance(method, MagnitudePruning | GraNet):
        assert all(sight == [(True, True)] * 3 for sight in sights)
    counts = method.mask_set.counts
    assert {name: 2 * count for name, count in counts.items()} == {
        name: w.numel() for name, w in module.named_parameters() if w.ndim > 1 and name != "net.0.weight"
    }
    assert method.at_target


def test_a_layer_whose_outputs_do_not_divide_stays_dense() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    method = SRSTE(structure="transposable 2:4")
    fit(Toy(net=net), method, max_epochs=1)
    assert list(method.alive) == ["net.1.weight", "net.3.weight"]
