"""What training on unit Lp spheres promises: norms, the optimizer left alone, connections that fade, fall and return."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import LpSphere, MagnitudePruning
from lightning_sparse.data import Digits
from lightning_sparse.functional import exact_count, from_dual, hoyer_sparsity, lp_norm
from lightning_sparse.models import MLP, Classifier
from lightning_sparse.optim import LpSGD, sphere_groups
from tests.callbacks.test_stations import SkippedSteps, without_dropout
from tests.toys import BATCHES, Toy, Watcher, fit, loader, toy, trainer

SPHERES = ["net.0.weight", "net.2.weight", "net.6.weight"]  # the last layer of the toy is free


def distance(method: LpSphere, module: nn.Module, p: float) -> float:
    weights = dict(module.named_parameters())
    return max(float((lp_norm(weights[name].detach(), p) - 1).abs().max()) for name in SPHERES)


# ---- the sphere -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.07, 1.2, 1.4, 2.0, 3.0, 6.0])
def test_every_observer_sees_unit_norms(p: float) -> None:
    method, seen = LpSphere(p, mixing=0.1, mixing_schedule="constant"), []
    fit(toy("adamw"), Watcher(lambda moment, module: seen.append(distance(method, module, p))), method)
    assert len(seen) > 3 * BATCHES
    assert max(seen) < 1e-5
    assert method.mask_set is None


@pytest.mark.parametrize("p", [1.1, 1.3, 3.0])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.8, False), (0.0, False)])
def test_it_is_the_same_training_as_with_the_optimizer(p: float, momentum: float, nesterov: bool) -> None:
    class WithOptimizer(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = sphere_groups(self, p, lr=0.05, mixing=0.1)
            return LpSGD(groups, lr=0.05, momentum=momentum, nesterov=nesterov, weight_decay=1e-3)

    class WithCallback(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            options = {"lr": 0.05, "momentum": momentum, "nesterov": nesterov, "weight_decay": 1e-3}
            return torch.optim.SGD(self.parameters(), **options)  # type: ignore[arg-type]

    one, other = WithOptimizer(net=without_dropout()).double(), WithCallback(net=without_dropout()).double()
    other.load_state_dict(one.state_dict())
    fit(one)
    fit(other, LpSphere(p, mixing=0.1, mixing_schedule="constant", momentum=momentum, nesterov=nesterov))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-8, atol=1e-12, msg=name)


MAKERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=10.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=1.0, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=1.0, momentum=0.9),
    "per tensor": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1.0, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=10.0, fused=True),
}


@pytest.mark.parametrize("make", MAKERS)
def test_the_optimizer_leaves_the_spheres_alone(make: str) -> None:
    class Decaying(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return MAKERS[make](self.parameters())  # type: ignore[no-any-return]

    method, module = LpSphere(1.3), Decaying()
    runner = fit(module, method)
    for name, weight in module.named_parameters():
        constrained = name in SPHERES
        assert bool(runner.optimizers[0].state.get(weight)) != constrained
        assert not constrained or weight.equal(from_dual(method.duals[name], 1.3))


def test_gradients_are_hidden_from_the_optimizer_and_from_nobody_else() -> None:
    seen: list[tuple[str, bool]] = []

    class Curious(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            result = closure()
            names = {id(p): name for name, p in module.named_parameters()}
            parameters = self.param_groups[0]["params"]
            seen.extend((names[id(p)], p.grad is None) for p in parameters)
            super().step()
            return result

    class Watched(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Curious(self.parameters(), lr=0.05)

    module = Watched()

    def look(moment: str, observed: L.LightningModule) -> None:
        if moment == "batch end":
            assert all(p.grad is not None for p in observed.parameters())

    fit(module, Watcher(look), LpSphere(1.3))
    assert {name for name, hidden in seen if hidden} == set(SPHERES)
    assert {name for name, hidden in seen if not hidden} == {n for n, _ in module.named_parameters()} - set(SPHERES)


def test_a_skipped_step_leaves_no_trace() -> None:
    """The run with steps 1 and 3 skipped holds after each of them exactly what it held before."""
    states: list[dict[str, Any]] = []
    method = LpSphere(1.2, sparsity=0.5, start=0.0, every="1 step", mixing=0.1)
    module = toy()

    def look(moment: str, observed: L.LightningModule) -> None:
        if moment == "batch end":
            memory = {key: value for key, value in method.memorise().items() if key not in ("steps", "_tick")}
            states.append(copy.deepcopy({"weights": dict(observed.state_dict()), **memory}))
            assert not method._hidden
            assert not method._dense

    from tests.contract.test_contract import differences

    fit(module, method, Watcher(look), plugins=[SkippedSteps({1, 3})], max_epochs=1)
    assert differences(states[0], states[1]) == []
    assert differences(states[1], states[2]) != []
    assert differences(states[2], states[3]) == []


def test_where_the_optimizer_itself_looks_for_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused optimizer in 16-bit precision: gradients are unscaled and searched before some of them are hidden."""
    from lightning_sparse.callbacks.stations import Stations

    class Scaler:
        calls = 0

        def scale(self, value: Tensor) -> Tensor:
            return 8 * value

        def unscale_(self, optimizer: Any) -> None:
            type(self).calls += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    assert parameter.grad is not None, "hidden before it was searched"
                    parameter.grad.div_(8)

    class Scaled(Toy):
        factor = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.factor * self.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            optimizer._step_supports_amp_scaling = self.factor > 1  # type: ignore[attr-defined]
            return optimizer

    plain, scaled = Scaled(net=without_dropout()), Scaled(net=without_dropout())
    scaled.load_state_dict(plain.state_dict())
    scaled.factor = 8.0
    fit(plain, LpSphere(1.2))
    monkeypatch.setattr(Stations, "_scaler", property(lambda self: Scaler()))
    fit(scaled, LpSphere(1.2))
    assert Scaler.calls == 3 * BATCHES
    for a, b in zip(plain.state_dict().values(), scaled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_steps_past_lightning_with_a_closure() -> None:
    """The optimizer has moved everything before anybody could hide a gradient; the spheres do not take it over."""

    class Closed(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

    plain, closed = Toy(net=without_dropout()), Closed(net=without_dropout())
    closed.load_state_dict(plain.state_dict())
    fit(plain, LpSphere(1.3, mixing=0.1))
    fit(closed, LpSphere(1.3, mixing=0.1))
    for a, b in zip(plain.state_dict().values(), closed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_low_precision_weights_keep_wide_duals() -> None:
    method, module = LpSphere(1.2, mixing=0.1), toy()
    fit(module, method, precision="bf16-true")
    for name in SPHERES:
        assert method.duals[name].dtype == torch.float32
        assert (lp_norm(method.duals[name], 6.0) - 1).abs().max() < 1e-5
        weight = dict(module.named_parameters())[name]
        assert weight.equal(from_dual(method.duals[name], 1.2).to(weight.dtype))


def test_p_by_layer_and_what_is_free() -> None:
    method, module = LpSphere({"net.0": 2.0, "*": 1.2}, free=["net.6"], targets=["!net.2"]), toy()
    fit(module, method)
    weights = dict(module.named_parameters())
    assert set(method.duals) == {"net.0.weight", "net.8.weight"}
    assert float((lp_norm(weights["net.0.weight"].detach(), 2.0) - 1).abs().max()) < 1e-5
    assert float((lp_norm(weights["net.8.weight"].detach(), 1.2) - 1).abs().max()) < 1e-5


def test_eta_follows_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_sparse.callbacks.lp_sphere as file

    rates: list[float] = []

    def note(weight: Tensor, dual: Tensor, buffer: Tensor, gradient: Tensor, rate: float, *rest: Any, **named: Any) -> None:
        rates.append(rate)

    monkeypatch.setattr(file, "lp_sgd_", note)
    fit(toy(), LpSphere(1.2, mixing=0.5, targets=["net.0"], free=[]))
    published = [0.02 + 0.98 * t * 6 / 12 if t <= 2 else 1 - 0.75 * (t / 12 - 1 / 6) * 6 for t in (1, 2, 3, 4)]
    assert rates[:4] == pytest.approx([0.5 * factor for factor in published])
    assert rates[-1] == pytest.approx(0.5 * 0.0001)
    rates.clear()
    fit(toy(), LpSphere(1.2, mixing=0.5, mixing_schedule=[[0.5, 1.0], [1.0, 0.0]], targets=["net.0"], free=[]))
    assert rates == pytest.approx([0.5] * 6 + [0.5 * (1 - t / 6) for t in range(1, 7)])


@pytest.mark.filterwarnings("ignore:.*begins in the middle")
def test_weights_that_were_exchanged_are_begun_with() -> None:
    method, module = LpSphere(1.3, sparsity=0.5, mixing=0.1), toy()
    runner = fit(module, method)
    exchanged = toy(seed=5).state_dict()
    module.load_state_dict(exchanged)
    held: list[Tensor] = []

    class First(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            held.append(pl_module.net[2].weight.detach().clone())

    runner.callbacks.append(First())  # type: ignore[attr-defined]
    runner.fit_loop.max_epochs = 4
    runner.fit(module, loader(), loader(1))
    fresh = exchanged["net.2.weight"]
    expected = (fresh / lp_norm(fresh, 1.3)).masked_fill(method.masks.dropped("net.2.weight"), 0)
    torch.testing.assert_close(held[0], expected)


# ---- connections that fade, fall and return -------------------------------------------------------------------------


def test_what_is_removed_fades_and_returns_from_there() -> None:
    """Without gradients v fades to (1 - eta) v / |u|_q, that is not at all; with them the rest outgrows it."""
    method = LpSphere(1.2, sparsity=0.5, initial_sparsity=0.5, start=1.0, end=1.0, mixing=0.1, mixing_schedule="constant")
    module, q = toy(), 1.2 / 0.2
    duals: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not duals:
                duals.append(method.duals["net.6.weight"].clone())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            duals.append(method.duals["net.6.weight"].clone())
            dropped = method.masks.dropped("net.6.weight")
            assert not pl_module.net[6].weight[dropped].any()
            assert not pl_module.net[6].weight.grad[dropped].any()
            assert not method.momenta["net.6.weight"][dropped].any()
            norm = lp_norm(pl_module.net[6].weight.detach(), 1.2)
            assert float(norm.max()) <= 1 + 1e-5

    fit(module, method, Note())
    dropped = method.masks.dropped("net.6.weight")
    for before, after in itertools.pairwise(duals):
        # Every faded entry of a row has shrunk by one and the same factor.
        ratio = (after / before).masked_fill(~dropped, torch.nan)
        low, high = ratio.nan_to_num(9).amin(1), ratio.nan_to_num(-9).amax(1)
        torch.testing.assert_close(low, high, rtol=1e-4, atol=0)
        assert (high >= 0.9 - 1e-4).all(), "(1 - eta) / |u|, and the norm of u is at most 1"
        assert (lp_norm(after, q) - 1).abs().max() < 1e-5
    assert duals[-1][dropped].all(), "they live on"
    assert duals[-1][dropped].abs().mean() < 0.9 * duals[0][dropped].abs().mean(), "and fade"


class Update:
    """What one update was given and what it made."""

    def __init__(self, method: LpSphere, progress: float) -> None:
        self.progress, self.step = progress, method.steps
        self.before = {name: method.masks[name] for name in method.masks}
        self.weights = {name: weight.detach().clone() for name, weight in method.weights.items()}
        self.gradients = {name: gradient.clone() for name, gradient in method._dense.items()}
        self.growth = method.growth

    def close(self, method: LpSphere) -> None:
        self.after = {name: method.masks[name] for name in method.masks}
        self.next_growth, self.sparsity = method.growth, method.masks.sparsity
        self.momenta = {name: value.clone() for name, value in method.momenta.items()}
        self.now = {name: weight.detach().clone() for name, weight in method.weights.items()}
        self.duals = {name: value.clone() for name, value in method.duals.items()}


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """All updates of the runs in a test."""
    seen: list[Update] = []
    for name in ("_steer", "_follow"):
        original = getattr(LpSphere, name)

        def watched(self: LpSphere, progress: float, original: Any = original) -> None:
            seen.append(Update(self, progress))
            original(self, progress)
            seen[-1].close(self)

        monkeypatch.setattr(LpSphere, name, watched)
    return seen


def falls(update: Update, name: str, threshold: float) -> Tensor:
    """The drop rule, unit by unit, with plain numbers."""
    mask, weight = update.before[name].flatten(1), update.weights[name].flatten(1).abs().double()
    out = torch.zeros_like(mask)
    for unit in range(len(mask)):
        active = weight[unit][mask[unit]].tolist()
        mean = sum(active) / len(active) if active else 0.0
        for entry in range(mask.shape[1]):
            out[unit, entry] = bool(mask[unit, entry]) and float(weight[unit, entry]) < threshold * mean
    return out.view_as(update.before[name])


def test_the_published_update(updates: list[Update]) -> None:
    method = LpSphere(1.15, sparsity=0.8, start=0.0, end=1.0, every="2 steps", mixing=0.1, drop_threshold=0.6)
    fit(toy(), method)
    assert len(updates) == 7
    assert updates[0].growth == 0.95
    for update in updates:
        threshold = 0.6 * (1 + math.cos(math.pi * update.progress)) / 2
        for name, before in update.before.items():
            fallen = falls(update, name, threshold)
            kept, after = before & ~fallen, update.after[name]
            assert (after | ~kept).all(), "only what is small falls"
            returned = after & ~kept
            count = min(int(int(fallen.sum()) * update.growth), int((~kept).sum()))
            assert int(returned.sum()) == count
            gradient = update.gradients[name].flatten(1).double()
            score = (gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300)).abs().view_as(kept)
            stayed = ~kept & ~returned
            if count and stayed.any():
                assert float(score[returned].min()) >= float(score[stayed].max()) - 1e-6
        s, line = update.sparsity, 0.8 * (1 - threshold / 2)
        assert update.next_growth == pytest.approx((0.9 if s < line else 1.1) * s / 0.8)
    assert any(not update.before[name].equal(update.after[name]) for update in updates for name in update.before)


def test_momentum_and_weights_right_after_an_update(updates: list[Update]) -> None:
    method = LpSphere(1.15, sparsity=0.8, start=0.0, end=1.0, every="2 steps", mixing=0.1, drop_threshold=0.6)
    fit(toy(), method)
    returned = 0
    for update, name in itertools.product(updates, SPHERES):
        grown = update.after[name] & ~update.before[name]
        returned += int(grown.sum())
        assert not update.momenta[name][grown | ~update.after[name]].any()
        expected = from_dual(update.duals[name], 1.15)
        assert update.now[name][grown].equal(expected[grown])
        assert not update.now[name][~update.after[name]].any()
        assert (lp_norm(expected, 1.15) - 1).abs().max() < 1e-5
    assert returned > 20
    assert any(update.now[name][update.after[name] & ~update.before[name]].any() for update in updates for name in SPHERES)


def test_nothing_falls_below_a_threshold_of_zero(updates: list[Update]) -> None:
    method = LpSphere(1.07, sparsity=0.9, start=0.0, every="1 step", mixing=0.1, drop_threshold=0.0)
    fit(toy(), method)
    assert len(updates) > 5
    assert all(update.before[name].equal(update.after[name]) for update in updates for name in update.before)


def test_an_output_that_has_lost_everything_stays_so(updates: list[Update]) -> None:
    """Where nothing is active the threshold is 0, and 0 >= 0 must not bring the whole output back."""

    class Emptied(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            masks = {name: method.masks[name] for name in method.masks}
            masks["net.6.weight"][3] = False
            method.set_masks(masks)

    method = LpSphere(1.2, sparsity=0.5, start=0.1, every="1 step", mixing=0.1)
    method.growth = 0.0
    runner = trainer(method, Emptied(), max_epochs=1)
    module = toy()
    with torch.no_grad():
        module.net[6].bias[3] = -100  # no gradient ever reaches this output, so nothing grows there
    runner.fit(module, loader(), loader(1))
    assert updates
    assert not method.masks["net.6.weight"][3].any()
    assert method.masks["net.6.weight"][2].any()


def test_masks_change_on_the_grid_inside_the_window_only() -> None:
    method = LpSphere(1.1, sparsity=0.8, start="4 steps", end="9 steps", every="2 steps", mixing=0.3, drop_threshold=0.8)
    seen: list[Tensor] = []
    fit(toy(), Watcher(lambda m, module: seen.append(method.masks.fingerprint()) if m == "batch end" else None), method)
    changes = [step for step, (a, b) in enumerate(itertools.pairwise(seen), start=2) if not a.equal(b)]
    assert changes == [4, 6, 8]


def test_the_first_masks_have_exact_counts_and_depend_on_the_seed() -> None:
    prints = []
    for seed in (1, 1, 2):
        method = LpSphere(1.2, sparsity=0.9, start=1.0, end=1.0, seed=seed)
        fit(toy(), method, max_epochs=1)
        assert all(
            method.masks.numel(n) - kept == math.ceil(0.2 * method.masks.numel(n)) for n, kept in method.masks.counts.items()
        )
        prints.append(method.masks.fingerprint())
    assert prints[0].equal(prints[1])
    assert not prints[0].equal(prints[2])
    less = LpSphere(1.2, sparsity=0.05, seed=1)
    fit(toy(), less)
    assert less.masks.sparsity <= 0.06


def test_the_feedback_mode_meets_its_schedule_at_every_update(updates: list[Update]) -> None:
    method = LpSphere(1.3, sparsity=0.9, mode="feedback", start=0.0, end=0.9, every="2 steps", mixing=0.1)
    fit(toy(), method)
    total = method.masks.total
    for update in updates:
        planned = 0.9 + (0.2 - 0.9) * (1 - update.progress) ** 3
        assert sum(int(mask.sum()) for mask in update.after.values()) == total - exact_count(planned, total)
    assert updates[-1].progress == 1
    assert method.masks.kept == method.goal["total"] == total - exact_count(0.9, total)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.21, 0.5, 0.99])
@pytest.mark.parametrize("p", [1.07, 2.0, 6.0])
def test_the_feedback_mode_arrives_at_any_target(sparsity: float, p: float) -> None:
    method = LpSphere(p, sparsity=sparsity, mode="feedback")
    fit(toy(), method, max_epochs=1)
    assert method.masks.kept == method.masks.total - exact_count(sparsity, method.masks.total)


def test_a_sparsity_of_all_parameters() -> None:
    module = toy()
    everything = sum(p.numel() for p in module.parameters())
    method = LpSphere(1.3, sparsity=0.5, mode="feedback", of_all_parameters=True)
    fit(module, method)
    assert method.masks.total - method.masks.kept == exact_count(0.5, everything)
    assert method.masks.total < everything


def test_two_optimizers_that_never_step_in_the_same_batch() -> None:
    class Alternating(Toy):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            layers = list(self.net.children())
            halves = [[p for layer in part for p in layer.parameters()] for part in (layers[:4], layers[4:])]
            return tuple(torch.optim.SGD(half, lr=0.01) for half in halves)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    method = LpSphere(1.3, sparsity=0.8, mode="feedback", every="1 step", start=0.0)
    fit(Alternating(), method)
    assert method.masks.kept == method.goal["total"]


def test_it_is_told_in_the_log() -> None:
    runner = fit(toy(), LpSphere(1.2, sparsity=0.5))
    assert 0 < float(runner.logged_metrics["LpSphere/mixing"]) < 1
    assert float(runner.logged_metrics["LpSphere/growth"]) > 0
    assert float(runner.progress_bar_metrics["sparsity"]) > 0


# ---- beside other methods -------------------------------------------------------------------------------------------


def test_another_method_on_the_same_weights_is_refused_and_on_others_it_is_not() -> None:
    for pair in ([LpSphere(1.2), MagnitudePruning(0.5)], [MagnitudePruning(0.5), LpSphere(1.2)]):
        with pytest.raises(
            ValueError, match=r"LpSphere moves 'net.0.weight' by itself, so MagnitudePruning cannot act on it"
        ):
            fit(toy(), *pair)
    method = MagnitudePruning(0.5, targets=["net.8"])
    fit(toy(), LpSphere(1.2), method)
    assert method.masks.sparsity == 0.5


# ---- in training ----------------------------------------------------------------------------------------------------


def digits(epochs: int, *callbacks: L.Callback) -> Classifier:
    torch.manual_seed(0)
    data = Digits(batch_size=50)
    module = Classifier(
        lambda *shape: MLP(*shape, hidden=(64, 64), batch_norm=True),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        in_channels=1,
        image_size=8,
    )
    trainer(*callbacks, max_epochs=epochs, limit_val_batches=0).fit(module, data)
    return module


def test_the_sparsity_of_a_trained_network_falls_strictly_along_p() -> None:
    rows = []
    for p in (1.1, 1.4, 2.0, 3.0, 6.0):
        module = digits(6, LpSphere(p, mixing=2 / 50))
        rows.append([float(hoyer_sparsity(module.network[i].weight).mean()) for i in (1, 4)])
    for sparser, flatter in itertools.pairwise(rows):
        assert all(a > b + 0.01 for a, b in zip(sparser, flatter, strict=True)), rows


@pytest.mark.parametrize(("p", "sparsity"), [(1.07, 0.9), (1.15, 0.8)])
def test_the_published_controller_arrives_where_p_fits_the_sparsity(p: float, sparsity: float) -> None:
    method = LpSphere(p, sparsity=sparsity, mixing=2 / 50)
    digits(12, method)
    assert abs(method.masks.sparsity - sparsity) <= 0.03


def test_and_falls_short_where_p_does_not() -> None:
    official, feedback = (LpSphere(2.0, sparsity=0.8, mixing=2 / 50, mode=mode) for mode in ("official", "feedback"))
    digits(6, official)
    digits(6, feedback)
    assert official.masks.sparsity < 0.7
    assert feedback.masks.kept == feedback.masks.total - exact_count(0.8, feedback.masks.total)
