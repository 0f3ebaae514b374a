"""What training on unit Lp spheres promises: norms, the optimizer left alone, connections that fade, fall and return."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import LpSphere, MagnitudePruning
from lightning_sparse.functional import from_dual, hoyer_sparsity, lp_norm
from lightning_sparse.optim import LpSGD, sphere_groups
from lightning_sparse.testing import BATCHES, Toy, Watcher, differences, fit, loader, network, toy
from tests.helpers.spheres import SPHERES, digits
from tests.helpers.steps import SkippedSteps


def distance(method: LpSphere, module: nn.Module, p: float) -> float:
    weights = dict(module.named_parameters())
    return max(float((lp_norm(weights[name].detach(), p) - 1).abs().max()) for name in SPHERES)


# ---- the sphere -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.07, 1.2, 1.4, 2.0, 3.0, 6.0])
def test_every_observer_sees_unit_norms(p: float) -> None:
    method, seen = LpSphere(p=p, mixing=0.1, mixing_schedule="constant"), []
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

    one, other = WithOptimizer(net=network(dropout=0)).double(), WithCallback(net=network(dropout=0)).double()
    other.load_state_dict(one.state_dict())
    fit(one)
    fit(other, LpSphere(p=p, mixing=0.1, mixing_schedule="constant", momentum=momentum, nesterov=nesterov))
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

    method, module = LpSphere(p=1.3), Decaying()
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

    fit(module, Watcher(look), LpSphere(p=1.3))
    assert {name for name, hidden in seen if hidden} == set(SPHERES)
    assert {name for name, hidden in seen if not hidden} == {n for n, _ in module.named_parameters()} - set(SPHERES)


def test_a_skipped_step_leaves_no_trace() -> None:
    """The run with steps 1 and 3 skipped holds after each of them exactly what it held before."""
    states: list[dict[str, Any]] = []
    method = LpSphere(p=1.2, sparsity=0.5, start=0.0, every="1 step", mixing=0.1)
    module = toy()

    def look(moment: str, observed: L.LightningModule) -> None:
        if moment == "batch end":
            memory = {key: value for key, value in method.memorize().items() if key not in ("steps", "window")}
            states.append(copy.deepcopy({"weights": dict(observed.state_dict()), **memory}))
            assert not method._hidden
            assert not method._dense
            assert all(p.grad is not None for p in observed.parameters()), "a hidden gradient has not come back"

    fit(module, method, Watcher(look), plugins=[SkippedSteps({1, 3})], max_epochs=1)
    assert differences(states[0], states[1]) == []
    assert differences(states[1], states[2]) != []
    assert differences(states[2], states[3]) == []


def test_where_the_optimizer_itself_looks_for_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused optimizer in 16-bit precision: gradients are unscaled and searched before some of them are hidden."""
    from lightning_sparse.loop import Run

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

    plain, scaled = Scaled(net=network(dropout=0)), Scaled(net=network(dropout=0))
    scaled.load_state_dict(plain.state_dict())
    scaled.factor = 8.0
    fit(plain, LpSphere(p=1.2))
    monkeypatch.setattr(Run, "_scaler", property(lambda self: Scaler()))
    fit(scaled, LpSphere(p=1.2))
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

    plain, closed = Toy(net=network(dropout=0)), Closed(net=network(dropout=0))
    closed.load_state_dict(plain.state_dict())
    fit(plain, LpSphere(p=1.3, mixing=0.1))
    fit(closed, LpSphere(p=1.3, mixing=0.1))
    for a, b in zip(plain.state_dict().values(), closed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_low_precision_weights_keep_wide_duals() -> None:
    method, module = LpSphere(p=1.2, mixing=0.1), toy()
    fit(module, method, precision="bf16-true")
    for name in SPHERES:
        assert method.duals[name].dtype == torch.float32
        assert (lp_norm(method.duals[name], 6.0) - 1).abs().max() < 1e-5
        weight = dict(module.named_parameters())[name]
        assert weight.equal(from_dual(method.duals[name], 1.2).to(weight.dtype))


def test_p_by_layer_and_what_is_free() -> None:
    method, module = LpSphere(p={"net.0": 2.0, "*": 1.2}, free=["net.6"], targets=["!net.2"]), toy()
    fit(module, method)
    weights = dict(module.named_parameters())
    assert set(method.duals) == {"net.0.weight", "net.8.weight"}
    assert float((lp_norm(weights["net.0.weight"].detach(), 2.0) - 1).abs().max()) < 1e-5
    assert float((lp_norm(weights["net.8.weight"].detach(), 1.2) - 1).abs().max()) < 1e-5


def test_eta_follows_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_sparse.methods.lp_sphere.lp_sphere as file

    rates: list[float] = []

    def note(weight: Tensor, dual: Tensor, buffer: Tensor, gradient: Tensor, rate: float, *rest: Any, **named: Any) -> None:
        rates.append(rate)

    monkeypatch.setattr(file, "lp_sgd_", note)
    fit(toy(), LpSphere(p=1.2, mixing=0.5, targets=["net.0"], free=[]))
    published = [0.02 + 0.98 * t * 6 / 12 if t <= 2 else 1 - 0.75 * (t / 12 - 1 / 6) * 6 for t in (1, 2, 3, 4)]
    assert rates[:4] == pytest.approx([0.5 * factor for factor in published])
    assert rates[-1] == pytest.approx(0.5 * 0.0001)
    rates.clear()
    fit(toy(), LpSphere(p=1.2, mixing=0.5, mixing_schedule=[[0.5, 1.0], [1.0, 0.0]], targets=["net.0"], free=[]))
    assert rates == pytest.approx([0.5] * 6 + [0.5 * (1 - t / 6) for t in range(1, 7)])
    rates.clear()
    ramp = LpSphere(p=1.2, mixing=0.5, mixing_schedule=[[0.0, 0.0], [1.0, 1.0]], targets=["net.0"], free=[])
    fit(toy(), ramp, max_epochs=-1, max_steps=10)
    assert rates == pytest.approx([0.5 * t / 10 for t in range(1, 11)]), "counted in steps"


@pytest.mark.filterwarnings("ignore:.*starts in the middle")
def test_weights_that_were_exchanged_are_begun_with() -> None:
    method, module = LpSphere(p=1.3, sparsity=0.5, mixing=0.1), toy()
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


# ---- beside other methods -------------------------------------------------------------------------------------------


def test_another_method_on_the_same_weights_is_refused_and_on_others_it_is_not() -> None:
    for pair in ([LpSphere(p=1.2), MagnitudePruning(0.5)], [MagnitudePruning(0.5), LpSphere(p=1.2)]):
        with pytest.raises(ValueError, match=r"LpSphere moves 'net.0.weight' itself, so MagnitudePruning cannot act on it"):
            fit(toy(), *pair)
    method = MagnitudePruning(0.5, targets=["net.8"])
    fit(toy(), LpSphere(p=1.2), method)
    assert method.masks.sparsity == 0.5


# ---- in training ----------------------------------------------------------------------------------------------------


def test_the_sparsity_of_a_trained_network_falls_strictly_along_p() -> None:
    rows = []
    for p in (1.1, 1.4, 2.0, 3.0, 6.0):
        module = digits(6, LpSphere(p=p, mixing=2 / 50))
        rows.append([float(hoyer_sparsity(module.network[i].weight).mean()) for i in (1, 4)])
    for sparser, flatter in itertools.pairwise(rows):
        assert all(a > b + 0.01 for a, b in zip(sparser, flatter, strict=True)), rows
