"""The stations of the loop, each exercised by a small method: penalties are exact, pairs are pairs, nothing stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sparse import MagnitudePruning, RandomSparsity, RigL, SparseConnectivityLearning, SparsityMixin
from lightning_sparse.core import Position
from lightning_sparse.families import Masked, Pruning
from lightning_sparse.functional import random_generator, random_score
from lightning_sparse.loop import Sparsifier, Step
from lightning_sparse.testing import BATCHES, OPTIMIZERS, Toy, Watcher, fit, loader, network, toy, trainer
from tests.helpers.methods import FeaturePenalty, L2Penalty, Swap, UnitNorm
from tests.helpers.modules import AutomaticMixin, double
from tests.helpers.steps import PlainSGD, Scaled, SelfUnscaling, SkippedSteps, Unscaling


class WrittenL2(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + 0.25 * sum(p.square().sum() for p in self.parameters() if p.ndim > 1)


class WrittenFeature(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        feature = self.net[0](batch[0].double())
        return self.loss(batch) + 0.5 * feature.float().square().mean()


class Dictionary(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.loss(batch), "extra": 1}


PENALTIES: dict[str, tuple[type[Toy], Callable[[], Sparsifier]]] = {
    "weights": (WrittenL2, lambda: L2Penalty(0.5)),
    "features": (WrittenFeature, lambda: FeaturePenalty(0.5)),
}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=["plain", "acc", "clip"]
)
@pytest.mark.parametrize("returns", [Toy, Dictionary])
def test_a_penalty_equals_the_penalty_written_into_the_loss(kind: str, options: dict[str, Any], returns: type[Toy]) -> None:
    written, make = PENALTIES[kind]
    reference, module = double(written), double(returns)
    fit(reference, **options)
    fit(module, make(), **options)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-6, atol=1e-9, msg=name)
    plain = double(Toy)
    fit(plain, **options)
    assert not torch.allclose(plain.net[0].weight, reference.net[0].weight, rtol=1e-3), "the penalty does nothing here"


def test_two_feature_penalties_add_up() -> None:
    one, two = double(Toy), double(Toy)
    fit(one, FeaturePenalty(0.6))
    fit(two, FeaturePenalty(0.2, name="a"), FeaturePenalty(0.4, name="b"))
    torch.testing.assert_close(two.net[0].weight, one.net[0].weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mask_first", [True, False])
def test_the_order_of_callbacks_does_not_matter(mask_first: bool) -> None:
    """A penalty after a mask must not wake pruned entries' momentum, and must give the same weights."""

    class Constant(Sparsifier):
        def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
            return [(name, torch.ones_like(weight)) for name, weight in step.weights.items()]

    mask = MagnitudePruning(0.5, start=0, end=0)
    module = double(Toy, optimizer="adam")
    runner = fit(module, *([mask, Constant()] if mask_first else [Constant(), mask]))
    for target in mask.goal["layers"] or mask.masks:
        weight = dict(module.named_parameters())[target]
        assert not runner.optimizers[0].state[weight]["exp_avg"][mask.masks.dropped(target)].any()
    other = MagnitudePruning(0.5, start=0, end=0)
    twin = double(Toy, optimizer="adam")
    fit(twin, *([Constant(), other] if mask_first else [other, Constant()]))
    assert all(a.equal(b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def test_projection() -> None:
    module = toy()
    norms: list[float] = []

    def look(moment: str, observed: L.LightningModule) -> None:
        norms.extend(float(p.detach().norm()) for p in observed.parameters() if p.ndim > 1)

    fit(module, Watcher(look), UnitNorm())
    assert norms == pytest.approx([1.0] * len(norms), abs=1e-6)


def test_a_skipped_step_is_undone() -> None:
    method = Swap()
    fit(toy(), method, plugins=[SkippedSteps({1, 3})], max_epochs=1)
    assert method.events == ["before", "after", "before", "undo", "before", "after", "before", "undo"]
    assert method.steps == BATCHES


def test_an_update_that_falls_on_a_skipped_step_is_made_at_the_next() -> None:
    method = MagnitudePruning(0.5, start=0.25, end=0.25)
    module = toy()
    seen: list[int] = []

    def look(moment: str, observed: L.LightningModule) -> None:
        seen.append(method.masks.kept)

    fit(module, Watcher(look), method, plugins=[SkippedSteps({2, 3})])
    total = method.masks.total
    # Due at the third step, which is skipped, as is the fourth; then come validation and the end of the epoch.
    assert seen[:7] == [total] * 6 + [total // 2]


def test_penalties_where_the_optimizer_unscales_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sparse.loop import Run

    monkeypatch.setattr(Run, "_scaler", property(lambda self: Scaled.Scaler()))
    reference, module = PlainSGD(net=network(dropout=0)), SelfUnscaling(net=network(dropout=0))
    module.load_state_dict(reference.state_dict())
    with monkeypatch.context() as plain:
        plain.setattr(Run, "_scaler", None)
        fit(reference, L2Penalty(0.5))
    fit(module, L2Penalty(0.5), plugins=[Scaled()])
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=2e-2, atol=2e-3, msg=name)


def test_a_step_that_a_fused_optimizer_skips_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unscaling, "finds_infinity", True)
    method, mask = Swap(), MagnitudePruning(0.5, start=0.5, end=0.5)
    with pytest.warns(UserWarning, match="training stopped before the schedule did"):
        fit(SelfUnscaling(), method, mask, max_epochs=1)
    assert method.events == ["before", "undo"] * BATCHES
    assert mask.masks.sparsity == 0


class Restless(torch.optim.SGD):
    """Moves every weight at every step, whatever its gradient, as Langevin dynamics does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)
        return result


def test_projection_holds_zeros_against_any_optimizer() -> None:
    class Noisy(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Restless(self.parameters(), lr=0.01)

    method = MagnitudePruning(0.5, start=0, end=0)

    def look(moment: str, observed: L.LightningModule) -> None:
        weights = dict(observed.named_parameters())
        assert not any(weights[name][method.masks.dropped(name)].any() for name in method.masks), moment

    fit(Noisy(), Watcher(look), method)
    assert method.masks.kept == method.masks.total // 2


class Carousel(Masked):
    """Keeps another half of every weight after each step."""

    def evolve(self, position: Position) -> None:
        before = {name: self.masks[name] for name in self.masks}
        masks = {name: (torch.arange(m.numel()) + position.step).view(m.shape) % 2 == 0 for name, m in before.items()}
        self.set_masks(masks)
        for optimizer in self.run.optimizers:
            for name, weight in self.weights.items():
                regrown = masks[name] & ~before[name]
                assert position.epoch_start or position.step < 2 or regrown.any()
                assert not weight[regrown].any()
                for value in optimizer.state[weight].values():
                    assert value.shape != weight.shape or not value[regrown].any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_comes_back_starts_at_zero_without_momentum(optimizer: str) -> None:
    module = toy(optimizer)
    # Momentum of an entry that was pruned is gone already; this one plants some, as a foreign optimizer might keep.
    plant = Watcher(
        lambda moment, observed: [
            value.masked_fill_(value == 0, 0.5)
            for state in runner.optimizers[0].state.values()
            for value in state.values()
            if value.ndim > 1
        ]  # type: ignore[arg-type,return-value]
    )
    runner = trainer(Carousel(), plant)
    runner.fit(module, loader(), loader(1))
    assert runner.global_step == 3 * BATCHES  # every one of them looked at by the carousel itself


def test_scores_that_change_bring_nothing_back() -> None:
    class Whimsical(Pruning):
        def score(self, name: str, weight: Tensor) -> Tensor:
            return random_score(weight, random_generator(0, self.steps, name)) - 1  # negative, as scores may be

    method = Whimsical(0.9, start=0, end=1)
    seen: list[dict[str, Tensor]] = []
    fit(toy(), method, Watcher(lambda moment, module: seen.append({name: method.masks[name] for name in method.masks})))
    assert seen[-1].keys() == method.weights.keys() or seen
    for before, after in itertools.pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in before)


@pytest.mark.parametrize("breaks", [False, True])
def test_feature_penalties_leave_nothing_behind(breaks: bool) -> None:
    class Fragile(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if breaks and batch_idx == 2:
                raise RuntimeError("broken")
            return self.loss(batch)

    module, method = Fragile(), FeaturePenalty(0.5)
    own = module.training_step
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            fit(module, method)
    else:
        fit(module, method)
    assert "training_step" not in vars(module)
    assert module.training_step == own
    assert not module.net[0]._forward_hooks
    assert method.feature is None


def test_a_training_step_that_was_set_on_the_instance_comes_back() -> None:
    module = toy()
    module.training_step = own = module.training_step  # type: ignore[method-assign]
    fit(module, FeaturePenalty(0.5))
    assert vars(module)["training_step"] is own


def test_a_step_without_gradients_still_penalizes() -> None:
    class Frozen(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net[8].bias.sum()

    module = Frozen()
    before = module.net[0].weight.detach().clone()
    fit(module, L2Penalty(0.5), max_epochs=1, max_steps=1)
    torch.testing.assert_close(module.net[0].weight, before * (1 - 0.05 * (0.5 + 1e-3)))  # rate * (penalty + decay)


def test_the_learning_rate_of_a_weight() -> None:
    weights = {"a": nn.Parameter(torch.ones(1)), "b": nn.Parameter(torch.ones(1))}
    optimizer = torch.optim.SGD([{"params": [weights["a"]], "lr": 0.1}, {"params": [weights["b"]], "lr": 0.2}])
    step = Step(optimizer, weights)
    assert (step.learning_rate("a"), step.learning_rate("b")) == (0.1, 0.2)


# ---- the mixin ------------------------------------------------------------------------------------------------------


class ManualMixin(SparsityMixin, Toy):
    def __init__(self, ask: bool) -> None:
        super().__init__(net=network(dropout=0))
        self.automatic_optimization, self.ask = False, ask

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) + (self.sparsity_penalty() if self.ask else 0))
        optimizer.step()


@pytest.mark.parametrize("make", [lambda: ManualMixin(ask=True), lambda: AutomaticMixin(net=network(dropout=0))])
def test_the_mixin_adds_the_penalty_once(make: Callable[[], Toy]) -> None:
    reference, module = double(WrittenFeature), make().double()
    module.load_state_dict(double(Toy).state_dict())
    fit(reference)
    fit(module, FeaturePenalty(0.5))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_the_mixin_without_methods_is_zero() -> None:
    module = AutomaticMixin(net=network(dropout=0))
    fit(module)
    assert float(module.sparsity_penalty()) == 0
    assert module.sparsity_summary().startswith("layer")


def test_manual_optimization_without_the_mixin_is_warned_of() -> None:
    class Manual(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step()

    with pytest.warns(UserWarning, match=r"no callback can change its loss; add self.sparsity_penalty\(\)"):
        fit(Manual(), FeaturePenalty(0.5), max_epochs=1)


def test_the_summary_counts_masks() -> None:
    module = AutomaticMixin(net=network(dropout=0))
    fit(module, MagnitudePruning(0.75, allocation="uniform"))
    table = module.sparsity_summary().splitlines()
    assert table[0].split() == ["layer", "kept", "target", "density"]
    assert table[1].split() == ["net.0.weight", "18", "of", "72", "18", "25.00%"]
    assert table[-2].split()[0] == "total"
    assert table[-2].endswith("25.00%")
    assert table[-1].split() == ["whole", "model", "726", "of", "2,796", "726", "25.97%"]


# ---- what is logged -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("stops", [[BATCHES, BATCHES + 2], [2, BATCHES, BATCHES + 1, 2 * BATCHES, 2 * BATCHES + 1]])
def test_a_run_that_is_stopped_again_and_again(stops: list[int], tmp_path: Path) -> None:
    """From the last batch of an epoch, and then inside the next."""

    def run(seed: int, start: Path | None = None) -> L.LightningModule:
        files = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
        module = toy(seed=seed)
        torch.manual_seed(seed)
        assert fit(module, MagnitudePruning(0.5, every="1 steps"), files, ckpt_path=start).global_step == 3 * BATCHES
        return module

    expected = run(0)
    for stop in stops:
        for lost in range(stop + 1, 3 * BATCHES + 1):
            (tmp_path / f"step={lost}.ckpt").unlink()
        module = run(stop, tmp_path / f"step={stop}.ckpt")
        assert all(value.equal(module.state_dict()[name]) for name, value in expected.state_dict().items()), stop


def test_ending_early_is_said() -> None:
    class Early(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"ends at sparsity .*, not 0.9: training stopped before the schedule did"):
        fit(toy(), MagnitudePruning(0.9), Early())


@pytest.mark.filterwarnings("ignore:.*training stopped before")
def test_an_emptied_layer_is_said() -> None:
    net = network(dropout=0)
    with torch.no_grad():
        net[8].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"has removed all of 'net.8.weight'"):
        fit(Toy(net=net), MagnitudePruning(0.9, start=0, end=0))


def test_beginning_in_the_middle_is_said(tmp_path: Any) -> None:
    files = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "last")
    fit(toy(), files, max_epochs=1)
    with pytest.warns(UserWarning, match="starts in the middle of a run"):
        fit(toy(), MagnitudePruning(0.5), ckpt_path=tmp_path / "last.ckpt")


def test_a_run_counted_in_steps() -> None:
    method = MagnitudePruning(0.9)
    fit(toy(), method, max_epochs=-1, max_steps=10)
    assert method.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_a_run_without_an_end() -> None:
    class Enough(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    method = RandomSparsity(0.9)
    fit(toy(), method, Enough(), max_epochs=-1)
    assert method.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_two_optimizers_and_a_number_of_steps() -> None:
    """Lightning counts the steps of all optimizers, so the run is half as long as its number of steps."""

    class Both(Toy):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            layers = list(self.net.children())
            halves = [[p for layer in part for p in layer.parameters()] for part in (layers[:4], layers[4:])]
            return tuple(torch.optim.SGD(half, lr=0.01) for half in halves)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    method = MagnitudePruning(0.9)
    runner = fit(Both(), method, max_epochs=-1, max_steps=20)
    assert runner.global_step == 20
    assert method.steps == 10
    assert method.masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_data_without_a_length() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from loader()

    method = MagnitudePruning(0.9)
    runner = trainer(method, max_epochs=-1, max_steps=20)
    data = torch.utils.data.DataLoader(Endless(), batch_size=None)
    runner.fit(toy(), data, loader(1))
    assert method.masks.sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("algorithm", ["value", "norm"])
def test_a_replaced_step_has_nothing_to_clip(algorithm: str) -> None:
    method = RigL(0.8, every="2 steps")
    runner = fit(toy(), method, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    assert method.updates > 1
    assert "clip_gradients" not in vars(runner.precision_plugin)


class NewOptimizers(Toy):
    """Makes its optimizers anew when the second epoch starts."""

    removed = False

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch == 1:
            self.old = self.trainer.optimizers[0]
            self.trainer.strategy.setup_optimizers(self.trainer)

    def configure_optimizers(self) -> Any:
        half = self.removed and self.trainer.current_epoch == 1
        return torch.optim.Adam((self.net[0] if half else self).parameters(), lr=0.01)


@pytest.mark.parametrize(
    "make",
    [lambda: MagnitudePruning(0.9, every="1 steps"), lambda: SparseConnectivityLearning(0.8)],
    ids=["masks", "shadow"],
)
def test_new_optimizers_are_followed(make: Callable[[], Any]) -> None:
    method, module = make(), NewOptimizers()
    runner = fit(module, method)
    assert method.steps == runner.global_step == 3 * BATCHES
    assert method.at_target
    assert all((module.get_parameter(target)[~method.mask_set[target]] == 0).all() for target in method.mask_set)
    steps = float(module.old.state[module.net[0].weight]["step"])
    module.net[0].weight.grad = torch.zeros_like(module.net[0].weight)
    module.old.step()
    assert steps == BATCHES
    assert method.steps == 3 * BATCHES, "the old optimizer still has hooks"


def test_new_optimizers_are_checked_like_the_first() -> None:
    module = NewOptimizers()
    module.removed = True
    with pytest.raises(ValueError, match=r"MagnitudePruning: no optimizer updates 'net.2.weight'; return it from"):
        fit(module, MagnitudePruning(0.5))
