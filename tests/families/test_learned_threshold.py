"""Learned thresholds: the same training as with the threshold written into the network and left to autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_sparse import STR, TrainableThreshold
from lightning_sparse.core import Target
from lightning_sparse.families.learned_threshold import LearnedThreshold
from lightning_sparse.loop import Run
from lightning_sparse.loop.agreement import Agreement
from lightning_sparse.testing import BATCHES, Toy, Watcher, fit, loader, network, toy
from tests.helpers.oracles import BinaryStep
from tests.helpers.steps import PlainSGD, Scaled, SelfUnscaling, SkippedSteps

METHODS: dict[str, Callable[..., LearnedThreshold]] = {
    "steps": lambda **options: TrainableThreshold(strength=0.01, **options),
    "soft": lambda **options: STR(strength=0.02, initial_threshold=0.02, **options),
}


class Written(Toy):
    """The thresholds in the graph, as parameters of the model's optimizer."""

    def __init__(self, method: str) -> None:
        super().__init__(net=network(dropout=0))
        matrices = [p for p in self.net.parameters() if p.ndim > 1]
        if method == "steps":
            sources = [torch.zeros(len(p), *[1] * (p.ndim - 1)) for p in matrices]
        else:
            sources = [torch.tensor(0.02, dtype=torch.float64).logit() for _ in matrices]
        self.sources = nn.ParameterList([nn.Parameter(source.double()) for source in sources])
        self.method = method

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        sources, shown = iter(self.sources), {}
        penalty = torch.zeros((), dtype=torch.float64)
        for name, p in self.net.named_parameters():
            if p.ndim > 1:
                source = next(sources)
                if self.method == "steps":
                    shown[name] = p * BinaryStep.apply(p.abs() - source)
                    penalty = penalty + 0.01 * (-source).exp().sum()
                else:
                    shown[name] = p.sign() * torch.relu(p.abs() - source.sigmoid())
                    penalty = penalty + 0.01 * source.square().sum()
        return F.cross_entropy(functional_call(self.net, shown, x.double()), y) + penalty * self.training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.net.parameters(), "weight_decay": 1e-3}, {"params": self.sources}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_threshold_in_the_graph(method: str, accumulate: int) -> None:
    written, module = Written(method), Toy(net=network(dropout=0)).double()
    module.net.load_state_dict(written.net.state_dict())
    written.net.double()
    callback = METHODS[method]()
    fit(written, accumulate_grad_batches=accumulate)
    fit(module, callback, accumulate_grad_batches=accumulate)
    for source, found in zip(written.sources, callback.sources.values(), strict=True):
        torch.testing.assert_close(found.view_as(source), source.data, rtol=1e-9, atol=1e-12)
    for name, dense in written.net.named_parameters():
        weight = dict(module.net.named_parameters())[name].detach()
        if dense.ndim > 1:
            full = f"net.{name}"
            torch.testing.assert_close(weight + callback.hidden[full], dense.data, rtol=1e-9, atol=1e-12)
            assert (weight != 0).equal(callback.mask_set[full])
            assert 0 < float((weight == 0).double().mean()) < 1
        else:
            torch.testing.assert_close(weight, dense.data, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_model_shows_is_the_dense_weight_cut_off(method: str) -> None:
    """After every step, for every observer; and the dense weight is not lost by rounding."""
    callback = METHODS[method]()
    dense: dict[str, Tensor] = {}

    def look(moment: str, observed: L.LightningModule) -> None:
        for name, weight in callback.weights.items():
            full = weight.detach() + callback.hidden[name]
            threshold = callback.threshold(name)
            expected = torch.where(full.abs() > threshold, full, 0.0)
            if method == "soft":
                expected = expected - expected.sign() * threshold
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-8)
            assert (weight != 0).equal(full.abs() > threshold)
            assert not weight[~callback.mask_set[name]].any()
            if moment != "batch end":
                assert full.equal(dense[name])
            dense[name] = full

    module = toy("adamw")
    fit(module, Watcher(look), callback)
    assert callback.mask_set.sparsity > 0


@pytest.mark.parametrize("method", METHODS)
def test_dense_weights_are_those_that_the_optimizer_left(method: str) -> None:
    """Bit for bit: hiding and revealing a weight changes nothing."""
    callback = METHODS[method]()
    left: dict[str, Tensor] = {}

    class Spied(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(self.leave)  # before the callback's
            return optimizer

        def leave(self, *args: Any) -> None:
            left.update({name: weight.detach().clone() for name, weight in callback.weights.items()})

        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            for name, weight in callback.weights.items():
                assert name not in left or weight.equal(left[name])

    for optimizer in ("sgd", "adamw"):
        for precision in ("32-true", "bf16-true"):
            left.clear()
            fit(Spied(optimizer), callback, precision=precision)
            assert len(left) == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_was_changed_between_two_fits_counts(method: str) -> None:
    module, callback = toy(), METHODS[method]()
    runner = fit(module, callback)
    other = toy(seed=5)
    with torch.no_grad():
        for weight in other.parameters():
            weight[weight.abs() < 0.05] = 0
    module.load_state_dict(other.state_dict())
    seen: list[bool] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            if not seen:
                for name, weight in callback.weights.items():
                    loaded = other.get_parameter(name)
                    kept = (loaded != 0) & (loaded.abs() > callback.threshold(name))
                    assert kept.any()
                    seen.append(torch.allclose(weight[kept], loaded[kept], atol=1e-6) and not weight[loaded == 0].any())

    runner.callbacks.append(Note())  # type: ignore[attr-defined]
    runner.fit_loop.max_epochs = 4
    runner.fit(module, loader(), loader(1))
    assert seen == [True] * 4


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_leaves_no_trace(method: str) -> None:
    callback = METHODS[method]()
    states: list[list[Tensor]] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            parts = (callback.weights, callback.hidden, callback.sources, callback.velocity, callback.alive)
            states.append([value.detach().clone() for part in parts for value in part.values()])

    fit(toy(), callback, Note(), plugins=[SkippedSteps({2})], max_epochs=1)
    assert [all(a.equal(b) for a, b in zip(states[i], states[i + 1], strict=True)) for i in range(3)] == [False, True, False]


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_that_unscales_by_itself(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come scaled, as fused optimizers take them in 16-bit mixed precision; thresholds have no such optimizer."""
    monkeypatch.setattr(Run, "_scaler", property(lambda self: Scaled.Scaler()))
    plain, fused = METHODS[method](), METHODS[method]()
    reference, module = PlainSGD(net=network(dropout=0)), SelfUnscaling(net=network(dropout=0))
    module.load_state_dict(reference.state_dict())
    with monkeypatch.context() as without:
        without.setattr(Run, "_scaler", None)
        fit(reference, plain, precision="bf16-mixed", max_steps=3)
    fit(module, fused, plugins=[Scaled()], max_steps=3)
    for name, source in plain.sources.items():
        torch.testing.assert_close(fused.sources[name], source, rtol=1e-2, atol=1e-4)
        assert not source.equal(METHODS[method]().initial(Target(name, reference.get_parameter(name))).to(source))


def test_a_layer_that_is_nearly_empty_opens_again() -> None:
    """A hundredth of the weights is left: all thresholds of the layer return to zero; the others' stay."""
    method = TrainableThreshold(strength=0.0, learning_rate=0.0)

    class Close(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1:
                dense = (method.weights["net.6.weight"].detach() + method.hidden["net.6.weight"]).abs().flatten()
                method.sources["net.6.weight"].fill_(float(dense.sort().values[-10]))
                method.sources["net.2.weight"].fill_(0.05)

    fit(toy(), Close(), method, max_steps=1)
    assert method.mask_set.sparsity == 0
    fit(toy(), Close(), method, max_steps=2)
    assert not method.sources["net.6.weight"].any()
    assert method.mask_set.counts["net.6.weight"] == 2048
    assert method.sources["net.2.weight"].flatten().tolist() == pytest.approx([0.05] * 8)
    assert 0 < method.mask_set.counts["net.2.weight"] < 576


def test_a_layer_that_keeps_more_than_a_hundredth_stays_as_it_is() -> None:
    method = TrainableThreshold(strength=0.0, learning_rate=0.0)

    class Close(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            dense = (method.weights["net.6.weight"].detach() + method.hidden["net.6.weight"]).abs().flatten()
            method.sources["net.6.weight"].fill_(float(dense.sort().values[-60]))

    fit(toy(), Close(), method, max_steps=2)
    assert method.sources["net.6.weight"].all()
    assert 20 < method.mask_set.counts["net.6.weight"] < 100  # of 2,048


def test_ranks_compare_masks_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    changed = Agreement.changed

    def note(agreement: Agreement, methods: Any, live: bool) -> Any:
        for method, masks in changed(agreement, methods, live):
            compared.append(agreement.run.trainer.global_step)
            yield method, masks

    monkeypatch.setattr(Agreement, "changed", note)
    fit(toy(), STR())
    assert compared == [BATCHES, 2 * BATCHES, 3 * BATCHES]


def test_a_layer_that_is_emptied_is_named() -> None:
    with pytest.warns(UserWarning, match=r"STR has removed all of 'net.6.weight'; no signal passes"):
        fit(toy(), STR(strength=5.0, targets=["net.6"]))


@pytest.mark.filterwarnings("ignore:STR has removed all of")
def test_more_strength_is_sparser() -> None:
    for weak, strong in (
        (TrainableThreshold(strength=0.0), TrainableThreshold(strength=0.1)),
        (STR(strength=0.0), STR(strength=0.5)),
    ):
        sparsities = []
        for method in (weak, strong):
            fit(toy(), method)
            sparsities.append(method.mask_set.sparsity)
        assert sparsities[0] < sparsities[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_of_the_thresholds(method: str) -> None:
    still, own = METHODS[method](learning_rate=0.0), METHODS[method](learning_rate=0.05)
    shared = METHODS[method]()
    for callback in (still, own, shared):
        torch.manual_seed(0)
        fit(toy(), callback)
    first = next(iter(still.sources.values()))
    assert first.unique().numel() == 1
    assert all(own.sources[name].equal(shared.sources[name]) for name in own.sources)
    assert not any(own.sources[name].equal(still.sources[name]) for name in own.sources)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [True, False])
def test_a_moving_average_ends_sparse(method: str, first: bool) -> None:
    if not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    average, callback = L.pytorch.callbacks.EMAWeightAveraging(decay=0.9), METHODS[method]()
    module = toy()
    fit(module, *([average, callback] if first else [callback, average]))
    for name, weight in module.named_parameters():
        if name in callback.alive:
            assert not weight[~callback.alive[name]].any()


def test_thresholds_of_transposed_convolutions_belong_to_outputs() -> None:
    class Up(Toy):
        def __init__(self) -> None:
            super().__init__(
                net=nn.Sequential(nn.ConvTranspose2d(1, 3, 2), nn.Flatten(), nn.Linear(3 * 81, 4)),
            )

    method = TrainableThreshold(strength=0.01)
    fit(Up(), method, max_epochs=1)
    assert method.sources["net.0.weight"].shape == (1, 3, 1, 1)
    assert method.sources["net.2.weight"].shape == (4, 1)
    assert method.steps == BATCHES
