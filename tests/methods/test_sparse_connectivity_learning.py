"""Sparse connectivity learning, against a training loop written from the note, and what its options promise."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_sparse import LpSphere
from lightning_sparse import SparseConnectivityLearning as SCL
from lightning_sparse.core import LiveMasks, count_macs, effective_macs
from lightning_sparse.functional import unit_step
from lightning_sparse.loop.agreement import Agreement
from lightning_sparse.observe import SparsityTable
from lightning_sparse.testing import BATCHES, Toy, differences, fit, network, toy
from tests.helpers.oracles import by_loop
from tests.helpers.steps import SkippedSteps


def falling(step: int) -> float:
    return 0.9**step


class Recorded(Toy):
    """In double precision and without dropout; keeps its batches and their losses' inputs."""

    def __init__(self) -> None:
        super().__init__(net=network(dropout=0))
        self.double()
        self.load_state_dict({name: value.double() for name, value in toy().state_dict().items()})
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def by_the_note(
    batches: list[Any], cost: float, proxy: str, norm: str, feature: int | None, mask_lr: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Weights, mask variables and regrown connections, with everything in the graph and one optimizer for each."""
    net = Recorded().net
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    variables = {name: torch.full_like(p, 0.1).requires_grad_() for name, p in weights.items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    masks = torch.optim.SGD(variables.values(), lr=mask_lr, momentum=0.9, weight_decay=0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, falling) for o in (optimizer, masks)]
    regrown = 0
    for x, y in batches:
        effective = {name: weight * unit_step(variables[name], proxy) for name, weight in weights.items()}
        optimizer.zero_grad()
        masks.zero_grad()
        F.cross_entropy(functional_call(net, effective, x.double()), y).backward()
        kept = {name: variable > 0 for name, variable in variables.items()}
        for variable in variables.values():
            assert variable.grad is not None
            price = variable.detach().requires_grad_()
            (cost * unit_step(price, proxy).sum()).backward()
            assert price.grad is not None
            variable.grad = by_loop(variable.grad, norm, feature) + price.grad
        optimizer.step()
        masks.step()
        regrown += sum(int(((variable > 0) & ~kept[name]).sum()) for name, variable in variables.items())
        for schedule in schedules:
            schedule.step()
    return (
        {f"net.{n}": p.detach() for n, p in net.named_parameters()},
        {f"net.{n}": v for n, v in variables.items()},
        regrown,
    )


@pytest.mark.parametrize(
    ("proxy", "norm", "feature", "cost", "mask_lr"),
    [
        ("identity", "rms", "filter", 0.05, 0.02),
        ("leaky_relu", "rms", "filter", 0.002, 0.05),
        ("softplus", "l2", "filter", 0.01, 0.4),
        ("identity", "max", "layer", 0.005, 0.2),
        ("identity", "none", "filter", 1e-4, 50.0),
    ],
)
def test_equals_a_loop_with_variables_in_the_graph(proxy: str, norm: str, feature: str, cost: float, mask_lr: float) -> None:
    module = Recorded()
    method = SCL(price=cost, proxy=proxy, norm=norm, feature=feature, learning_rate=mask_lr, end=1.0)
    seen: list[int] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(sum(int(count) for count in method._regrown.values()))

    fit(module, method, Note(), max_epochs=6)
    axis = 0 if feature == "filter" else None
    weights, variables, regrown = by_the_note(module.batches, cost, proxy, norm, axis, mask_lr)
    assert len(module.batches) == 6 * BATCHES
    assert regrown > 2
    assert sum(seen[BATCHES - 1 :: BATCHES]) == regrown
    assert 0.05 < method.mask_set.sparsity < 0.95
    for name, dense in weights.items():
        weight = module.state_dict()[name]
        if name not in variables:
            torch.testing.assert_close(weight, dense, rtol=1e-9, atol=1e-12)
            continue
        mask = variables[name] > 0
        torch.testing.assert_close(method.variables[name], variables[name].detach(), rtol=1e-8, atol=1e-11)
        assert method.mask_set[name].equal(mask)
        torch.testing.assert_close(weight, dense * mask, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(method.hidden[name], dense * ~mask, rtol=1e-9, atol=1e-12)


def test_training_starts_dense_and_unchanged() -> None:
    module, plain, method = toy(), toy(), SCL(price=0.05, end=1.0)
    outputs: list[bool] = []

    class First(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            if not outputs:
                pl_module.eval()
                plain.eval()
                outputs.append(pl_module.net(batch[0]).equal(plain.net(batch[0])))
                pl_module.train()
                assert method.mask_set.sparsity == 0

    fit(module, method, First(), max_epochs=1)
    assert outputs == [True]


def test_without_a_mask_rate_training_is_dense_and_untouched() -> None:
    module, plain = toy("adamw"), toy("adamw")
    torch.manual_seed(0)
    fit(plain, gradient_clip_val=0.5)
    torch.manual_seed(0)
    fit(module, SCL(price=0.05, learning_rate=0.0, end=1.0), gradient_clip_val=0.5)
    assert differences(dict(plain.state_dict()), dict(module.state_dict())) == []


def first_push(cost: float, norm: str = "rms") -> dict[str, Tensor]:
    """What moves the variables at the first step: the normalized gradient plus the price."""
    method = SCL(price=cost, norm=norm, end=1.0)
    fit(Recorded(), method, max_epochs=1, limit_train_batches=1)
    return method.velocity


def test_the_price_is_added_after_normalizing() -> None:
    cheap, dear = first_push(0.25), first_push(0.75)
    for name, push in cheap.items():
        torch.testing.assert_close(dear[name] - push, torch.full_like(push, 0.5), rtol=1e-12, atol=0)
        rms = (push - 0.25).square().flatten(1).mean(1).sqrt()
        assert ((rms - 1).abs() < 1e-6).logical_or(rms == 0).all()
        assert (rms > 0).any()


class Silent(Toy):
    """Its loss has a gradient of exactly zero."""

    def loss(self, batch: Any) -> Tensor:
        return 0 * super().loss(batch)


def test_without_a_task_a_connection_goes_when_its_price_has_eaten_the_initial_value() -> None:
    """0.1 / (0.01 * 0.5) = 20 steps, with plain SGD; a gradient of zero stays zero when it is normalized."""
    method = SCL(price=0.5, initial=0.1, learning_rate=0.01, momentum=0.0, end=1.0)
    seen: list[float] = []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(method.mask_set.sparsity)

    with pytest.warns(UserWarning, match="has removed all of"):
        fit(Silent(), method, Note(), max_epochs=6)
    assert set(seen) == {0.0, 1.0}
    assert abs(seen.index(1.0) + 1 - 20) <= 1


def trajectory(initial: float, mask_lr: float) -> list[Tensor]:
    method, masks = SCL(price=0.02, initial=initial, learning_rate=mask_lr, end=1.0), []

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            masks.append(torch.cat([method.mask_set[name].flatten() for name in method.mask_set]))

    torch.manual_seed(0)
    fit(toy(), method, Note(), max_epochs=8)
    return masks


def test_only_the_ratio_of_initial_value_and_rate_counts() -> None:
    masks, twin = trajectory(0.125, 0.01), trajectory(1.0, 0.08)
    assert all(a.equal(b) for a, b in zip(masks, twin, strict=True))
    assert any((after & ~before).any() for before, after in itertools.pairwise(masks))
    assert not all(a.equal(b) for a, b in zip(masks, trajectory(0.125, 0.02), strict=True))


def test_density_falls_as_the_price_rises() -> None:
    kept = []
    for cost in (0.01, 0.1, 0.5):
        torch.manual_seed(0)
        method = SCL(price=cost, end=1.0)
        fit(toy(), method, max_epochs=8)
        kept.append(method.mask_set.kept)
    assert kept[0] > 1.5 * kept[1] > 2.5 * kept[2] > 0


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("scheduled", ["OneCycleLR", "LinearLR", "none"])
def test_mask_rates_follow_the_weights(scheduled: str) -> None:
    """At the highest rate of a cycle, or the rate that a warm-up leads to, the mask rate is as given."""

    class Module(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.04)
            if scheduled == "none":
                return optimizer
            schedulers = torch.optim.lr_scheduler
            schedule: Any = (
                schedulers.OneCycleLR(optimizer, 0.08, total_steps=12, cycle_momentum=False)
                if scheduled == "OneCycleLR"
                else schedulers.LinearLR(optimizer, 0.1, total_iters=6)
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    method = SCL(price=0.05, learning_rate=0.01, momentum=0.0, end=1.0)
    rates, moved = [], []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.before = method.variables["net.6.weight"].double()

        def on_train_batch_end(self, *args: Any) -> None:
            move = self.before - method.variables["net.6.weight"].double()
            moved.append(float((move / method.velocity["net.6.weight"]).median()))

    fit(Module(), method, Note())
    full = {"OneCycleLR": 0.08, "LinearLR": 0.04, "none": 0.04}[scheduled]
    assert moved == pytest.approx([0.01 * rate / full for rate in rates], abs=1e-6)
    assert max(rates) > 0.99 * full


# ---- steps that do not happen, or happen otherwise ------------------------------------------------------------------


def test_a_skipped_step_leaves_everything_as_it_was() -> None:
    class Infinite(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (torch.inf if self.trainer.global_step == 5 else 1.0)

    method = SCL(price=0.3, min_kept=1, end=1.0)
    states: list[Any] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            memory = {key: value for key, value in method.memorize().items() if key != "steps"}
            states.append(({n: p.detach().clone() for n, p in pl_module.named_parameters()}, memory))

    fit(Infinite(), method, Note(), plugins=[SkippedSteps({5})], max_epochs=2)
    assert differences(states[4], states[5]) == []
    assert differences(states[5], states[6]) != []
    assert 0 < method.mask_set.sparsity < 1
    assert all(value.isfinite().all() for value in method.variables.values())


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


class Fused(Toy):
    """An optimizer that unscales by itself, or not."""

    def __init__(self, fused: bool) -> None:
        super().__init__(net=network(dropout=0))
        self.fused = fused
        self.load_state_dict(toy().state_dict())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, fused=self.fused)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_16_bit_training_are_unscaled(fused: bool) -> None:
    """Without normalization, where the scale would count."""
    expected, method = (SCL(price=1e-3, norm="none", learning_rate=1.0, end=1.0) for _ in range(2))
    torch.manual_seed(0)
    fit(Fused(False), expected, max_epochs=1)
    torch.manual_seed(0)
    fit(Fused(fused), method, plugins=[half()], max_epochs=1)
    for name, velocity in expected.velocity.items():
        assert velocity.sub(0.003439).abs().max() > 1e-4  # the task has its share, too
        torch.testing.assert_close(method.velocity[name], velocity, rtol=5e-2, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_an_infinity_in_the_gradient_of_a_dropped_entry_is_found(fused: bool) -> None:
    """Its optimizer would not see it, but its variable, and by normalizing those of the whole filter."""
    method, module = SCL(price=0.3, min_kept=1, end=1.0), Fused(fused)
    weight = module.net[6].weight
    states: list[Any] = []

    def plant(gradient: Tensor) -> Tensor:
        if len(states) != 9:
            return gradient
        assert (weight == 0).any()
        return gradient.masked_fill(weight == 0, torch.inf)

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            memory = {key: value for key, value in method.memorize().items() if key != "steps"}
            states.append(({n: p.detach().clone() for n, p in pl_module.named_parameters()}, memory))

    weight.register_hook(plant)
    fit(module, method, Note(), plugins=[half()])
    assert [step for step in range(1, 12) if not differences(states[step - 1], states[step])] == [9]
    assert all(variable.isfinite().all() for variable in method.variables.values())


def test_two_methods_that_hide_gradients_from_a_scaler() -> None:
    """A scaler refuses to unscale twice."""
    method = SCL(price=0.3, targets=["net.6"], end=1.0)
    fit(Fused(True), LpSphere(p=1.5, targets=["net.2"]), method, plugins=[half()])
    assert 0 < method.mask_set.sparsity < 1


def test_weights_that_take_no_part_are_left_alone() -> None:
    class Partly(Toy):
        """The last layer is not used, so it has no gradient."""

        def loss(self, batch: Any) -> Tensor:
            return self.net[:7](batch[0]).square().mean()

    method = SCL(price=0.05, end=1.0)
    fit(Partly(), method)
    assert method.variables["net.8.weight"].equal(torch.full((4, 16), 0.1))
    assert not method.variables["net.6.weight"].equal(torch.full((16, 128), 0.1))


# ---- what it keeps and tells ----------------------------------------------------------------------------------------


def test_memory_is_three_copies_of_the_weights() -> None:
    method = SCL(price=0.2, end=1.0)
    seen: list[int] = []

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        return [t for item in (value.values() if isinstance(value, dict) else []) for t in tensors(item)]

    class Note(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            held = tensors({key: value for key, value in vars(method).items() if key != "brought"})
            seen.append(sum(t.untyped_storage().nbytes() for t in held if not isinstance(t, nn.Parameter)))

    fit(toy(), method, Note())
    weights = method.mask_set.total
    assert set(seen) == {12 * weights + 8 * len(method.variables)}  # and one counter per layer


def test_the_trained_model_is_plain(tmp_path: Any) -> None:
    module, method = toy(), SCL(price=0.2, end=1.0)
    fit(module, method, ModelCheckpoint(tmp_path, "last"))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = toy(seed=9)
    plain.load_state_dict(saved["state_dict"], strict=True)
    x = torch.rand(4, 1, 8, 8)
    assert plain.net.eval()(x).equal(module.net.eval()(x))
    memory = saved["callbacks"][method.state_key]["memory"]
    assert memory["variables"].keys() == method.variables.keys() == memory["hidden"].keys() == memory["velocity"].keys()
    for name, variable in memory["variables"].items():
        assert (variable > 0).equal(saved["state_dict"][name] != 0)


def test_connections_sparsity_and_macs_counted_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4))  # every kernel entry acts in 36 places
    method, checked = SCL(price=0.1, end=1.0), []

    class Cut(L.Callback):
        @torch.no_grad()
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            method.variables["net.0.weight"][0] = -1.0  # a filter of nine
            method.variables["net.0.weight"][1, 0, 0] = 0.0  # three more; a connection must be worth more than nothing
            method.variables["net.2.weight"][:, 2:] = -1.0  # four outputs keep two inputs
            method.take_in(method.weights)
            kept = method.mask_set
            assert kept.counts == {"net.0.weight": 6, "net.2.weight": 8}
            assert kept.sparsity == 1 - 14 / (18 + 288)
            macs = count_macs(pl_module, lambda: net(torch.ones(5, 1, 8, 8)), samples=5)
            assert macs == {"net.0.weight": 18 * 36, "net.2.weight": 288}
            assert (
                effective_macs(macs, kept)
                == effective_macs(macs, method.weights)
                == {"net.0.weight": 216, "net.2.weight": 8}
            )
            checked.append(True)

    fit(Toy(net=net), method, Cut(), max_epochs=1)
    assert checked


def test_logged_numbers() -> None:
    method = SCL(price=0.3, end=1.0)
    seen: list[tuple[int, int, dict[str, float]]] = []

    class Count(L.Callback):
        def on_train_epoch_start(self, *args: Any) -> None:
            self.regrown = self.pruned = 0

        def on_train_batch_start(self, *args: Any) -> None:
            self.before = {name: method.mask_set[name] for name in method.mask_set}

        def on_train_batch_end(self, *args: Any) -> None:
            for name, before in self.before.items():
                self.regrown += int((method.mask_set[name] & ~before).sum())
                self.pruned += int((before & ~method.mask_set[name]).sum())

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append((count.regrown, count.pruned, {k: float(v) for k, v in trainer.callback_metrics.items()}))

    count = Count()
    module = toy()
    fit(module, count, method, Look(), log_every_n_steps=1)
    label = "SparseConnectivityLearning"
    assert len(seen) == 3
    for regrown, pruned, logged in seen:
        assert (logged[f"{label}/regrown"], logged[f"{label}/pruned"]) == (regrown, pruned)
    assert sum(row[0] for row in seen) > 0
    weights = {name: p for name, p in module.named_parameters() if p.ndim > 1}
    last = seen[-1][2]
    assert last[f"{label}/kept"] == sum(int(p.count_nonzero()) for p in weights.values())
    assert all(last[f"{label}/kept/{name}"] == int(p.count_nonzero()) for name, p in weights.items())
    dead = sum(int((~p.flatten(1).any(1)).sum()) for p in weights.values())
    assert last[f"{label}/dead_filters"] == dead > 0
    assert last[f"{label}/smallest_variable"] == min(float(v.min()) for v in method.variables.values()) < 0
    assert last[f"{label}/cost"] == pytest.approx(0.3)
    assert last["sparsity"] == pytest.approx(method.mask_set.sparsity)


@pytest.mark.parametrize(("interval", "often"), [(100, 3 * 3), (1, 2 * 12 + 3)])
def test_connections_are_counted_as_often_as_lightning_logs(
    interval: int, often: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting waits for the device."""
    counted: list[int] = []
    count = LiveMasks.counts.fget
    assert count is not None
    monkeypatch.setattr(LiveMasks, "counts", property(lambda self: counted.append(1) or count(self)))
    fit(toy(), SCL(price=0.2, end=1.0), log_every_n_steps=interval)
    assert len(counted) == often


def test_ranks_compare_masks_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    changed = Agreement.changed

    def note(agreement: Agreement, methods: Any, live: bool) -> Any:
        for method, masks in changed(agreement, methods, live):
            compared.append(agreement.run.trainer.global_step)
            yield method, masks

    monkeypatch.setattr(Agreement, "changed", note)
    fit(toy(), SCL(price=0.2, end=1.0))
    assert compared == [BATCHES, 2 * BATCHES, 3 * BATCHES]


def test_the_table_and_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    method = SCL(price=0.2, end=1.0)
    fit(toy(), method, SparsityTable())
    rows = method.summary()
    assert [row.layer for row in rows] == [*method.mask_set, "total", "whole model"]
    assert f"{rows[-1].kept:,} of {rows[-1].total:,}" in capsys.readouterr().out


def test_a_moving_average_of_kept_weights_is_an_average() -> None:
    if not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    method, module = SCL(price=0.2, end=1.0), toy()
    held: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            held.append(pl_module.net[6].weight.detach().clone())

    fit(module, L.pytorch.callbacks.EMAWeightAveraging(decay=0.5), method, Note())
    mask = method.mask_set["net.6.weight"]
    average = module.net[6].weight.detach()
    assert (average != 0).equal(mask)
    always = torch.stack([weight != 0 for weight in held]).all(0)
    assert always.any()
    expected = held[0]
    for weight in held[1:]:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(average[always], expected[always], rtol=1e-4, atol=1e-6)
