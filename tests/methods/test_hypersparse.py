"""HyperSparse: the penalty where it belongs, the phases, the transition, learning rates, length of the run, any task."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_sparse import HyperSparse
from lightning_sparse.functional import hypersparse_gradient, quantile_rank
from lightning_sparse.testing import BATCHES, Manual, Toy, differences, fit, loader, state_of, toy, trainer


def batch_net() -> nn.Sequential:
    """With batch normalization, biases and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


class Net(Toy):
    """Its quality follows a trace: one value per epoch for the dense model, one for the pruned copy after it."""

    dense: Sequence[float] = ()
    pruned: Sequence[float] = ()

    def __init__(self, **options: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(net=batch_net(), **options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if not self.dense:
            return loss
        value = self.dense[self.current_epoch] if self.training else self.pruned[self.current_epoch - 1]
        return {"loss": loss, "accuracy": torch.tensor(value), "error": torch.tensor(-value)}


class Spy(L.Callback):
    """What every step and every epoch looked like."""

    def __init__(self, method: HyperSparse) -> None:
        self.method = method
        self.rates: list[float] = []
        self.phases: list[str] = []
        self.before: dict[str, Tensor] = {}
        self.added: list[dict[str, Tensor | None]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []
        self.bars: list[str] = []
        self.empty: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.phases.append(self.method.phase)
            self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
            self.empty.append(not trainer.optimizers[0].state)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.before:
            self.rates.append(optimizer.param_groups[0]["lr"])
            grads = {name: p.grad for name, p in pl_module.named_parameters()}
            self.added.append({n: None if g is None else g - self.before[n] for n, g in grads.items()})
            self.before = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.bars.append(str(self.method.headline()["phase"]))


class AfterStep(Net):
    """Gradients stay until the next step, so that they can be looked at."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Spy):
                callback.on_before_zero_grad(self.trainer, self, optimizer)


def never(**options: Any) -> HyperSparse:
    """A minus infinity of quality: the pruned copy never catches up."""
    return HyperSparse(0.9, score=lambda output, batch: -1.0, **options)


# ---- the penalty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["hypersparse", "l1", "l2"])
def test_the_penalty_is_added_to_the_weights_in_its_phase_and_nowhere_else(penalty: str) -> None:
    strength, growth = 1e-3, 1.5
    method = HyperSparse(
        0.9, strength=strength, growth=growth, penalty=penalty, pretrain="1 epoch", regularize="3 epochs", radius=3
    )
    spy, module = Spy(method), AfterStep()
    module.dense, module.pruned = [1.0] * 6, [0.0] * 6
    fit(module, method, spy, max_epochs=6)
    assert spy.phases == ["pretrain"] + ["regularize"] * 3 + ["finetune"] * 2
    names = list(method.masks)
    assert names == ["net.0.weight", "net.5.weight", "net.8.weight"]
    for step, (weights, added) in enumerate(zip(spy.weights, spy.added, strict=True)):
        epoch = step // BATCHES
        for name, extra in added.items():
            assert extra is not None
            if not 1 <= epoch <= 3 or name not in names:
                seen = extra[method.masks[name]] if epoch > 3 and name in names else extra  # the rest is silenced
                assert not seen.any(), (step, name)
                continue
            weight = weights[name]
            if penalty == "hypersparse":
                gradients = hypersparse_gradient([weights[n] for n in names], 0.9)
                expected = gradients[names.index(name)]
            else:
                expected = weight.sign() if penalty == "l1" else 2 * weight
            expected = strength * growth ** (epoch - 1) * expected
            torch.testing.assert_close(extra, expected, rtol=1e-3, atol=1e-7)


def test_strength_follows_the_published_numbers() -> None:
    method = HyperSparse(0.99, strength=5e-6, growth=1.05)
    method.plan = {"regularize": 200, "steps": 782}
    assert [method.strength_in(epoch) for epoch in (0, 1)] == pytest.approx([5e-6, 5.25e-6])
    assert method.strength_in(63) == pytest.approx(1.0813e-4, rel=2e-4)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (12, 422), (64, 782), (200, 10)])
def test_the_strength_of_a_planned_phase_has_three_times_the_published_pull(epochs: int, steps: int) -> None:
    method = HyperSparse(0.99)
    method.plan = {"regularize": epochs, "steps": steps}
    pull = steps * sum(method.strength_in(epoch) for epoch in range(epochs))
    published = 782 * sum(5e-6 * 1.05**epoch for epoch in range(64))
    assert pull == pytest.approx(3 * published)
    if epochs == 64:
        assert method.strength_in(1) / method.strength_in(0) == pytest.approx(1.05)


# ---- phases and the stop rule ----------------------------------------------------------------------------------------


def test_the_golden_trace_that_stops_stale() -> None:
    module, method = Net(), HyperSparse(0.9, pretrain=0, regularize="9 epochs", strength=1e-4)
    module.dense, module.pruned = [92, 91, 90, 80, 70, 60, 50, 0, 0, 0], [50, 56, 53, 20, 20, 20, 20, 0, 0, 0]
    spy = Spy(method)
    with pytest.warns(
        UserWarning, match=r"pruned copy of epoch 1, score 56 \(mean 53\): the dense model has fallen below it"
    ):
        fit(module, method, spy, max_epochs=10)
    assert method.stop_reason == "stale"
    assert spy.phases == ["regularize"] * 7 + ["finetune"] * 3
    assert [entry["dense"] for entry in method.history] == module.dense[:7]
    assert [entry["pruned"] for entry in method.history] == module.pruned[:7]
    assert [entry["best"] for entry in method.history] == [0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("score", [None, "accuracy", "-error", lambda output, batch: output["accuracy"]])
def test_the_transition_restores_the_best_copy_bit_for_bit(score: Any) -> None:
    """Fresh stop after epoch 3 with the copy of epoch 2, whose weights the next epoch had already left."""
    module = Net()
    module.dense, module.pruned = [99, 99, 99, 92, 0, 0], [0, 89, 92, 97, 0, 0]
    method = HyperSparse(0.9, pretrain="1 epoch", regularize="4 epochs", strength=1e-4, score=score)
    spy = Spy(method)
    fit(module, method, spy, max_epochs=6)
    assert method.stop_reason == "fresh"
    assert spy.phases == ["pretrain"] + ["regularize"] * 3 + ["finetune"] * 2
    after_epoch_2, restored = spy.states[3], spy.states[4]
    total = sum(after_epoch_2[name].numel() for name in method.masks)
    kept = total - quantile_rank(0.9, total) - 1
    sizes = torch.cat([after_epoch_2[name].abs().flatten() for name in method.masks])
    threshold = sizes.sort().values[quantile_rank(0.9, total)]
    for name, value in after_epoch_2.items():
        expected = value.where(value.abs() > threshold, 0.0) if name in method.masks else value
        assert restored[name].equal(expected), name
    assert sum(int(restored[name].count_nonzero()) for name in method.masks) == kept == method.masks.kept
    assert spy.empty == [True, False, False, False, True, False]
    for name in method.masks:
        assert not module.state_dict()[name][method.masks.dropped(name)].any()
    assert sum(int(module.state_dict()[name].count_nonzero()) for name in method.masks) == kept
    assert [round(entry["mean"], 2) for entry in method.history] == [89, 90.5, 92.67]


def test_trying_out_pruned_copies_leaves_the_dense_model_as_it_is() -> None:
    """With a penalty too small to matter, the run is the run without the method, until it prunes."""

    class Plain(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Keep(L.Callback):
        def __init__(self) -> None:
            self.states: list[dict[str, Tensor]] = []

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    with_method, without = Keep(), Keep()
    torch.manual_seed(3)
    fit(Plain(), never(strength=1e-30, pretrain=0, regularize="4 epochs"), with_method, max_epochs=5)
    torch.manual_seed(3)
    fit(Plain(), without, max_epochs=5)
    assert not differences(with_method.states[:4], without.states[:4])


def test_the_phase_ends_at_its_limit_with_the_best_so_far() -> None:
    module, method = Net(), HyperSparse(0.9, pretrain="1 epoch", regularize="3 epochs", strength=1e-4)
    module.dense, module.pruned = [9.0] * 6, [0, 5, 3, 1, 0, 0]
    fit(module, method, max_epochs=6)
    assert method.stop_reason == "limit"
    assert method.history[-1]["best"] == 1


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_pruned_copy_that_cannot_be_scored_is_worse_than_any_other(bad: float) -> None:
    module, method = Net(), HyperSparse(0.9, pretrain="1 epoch", regularize="4 epochs", strength=1e-4)
    module.dense, module.pruned = [9.0] * 7, [0, bad, 5, bad, 1, 0, 0]
    fit(module, method, max_epochs=7)
    assert [entry["pruned"] for entry in method.history] == [-math.inf, 5, -math.inf, 1]
    assert method.phase == "finetune"


def test_a_dense_model_that_cannot_be_scored_has_diverged() -> None:
    module, method = Net(), HyperSparse(0.9, pretrain="1 epoch", regularize="4 epochs", strength=1e-4)
    module.dense, module.pruned = [9, 9, math.nan, 9, 9, 9], [0.0] * 6
    with pytest.raises(RuntimeError, match=r"the dense model scored nan in epoch 2; training has diverged. Lower the"):
        fit(module, method, max_epochs=6)


def test_the_bar_shows_the_phase_and_the_logger_the_numbers(tmp_path: Path) -> None:
    method = never(pretrain="2 epochs", regularize="2 epochs", strength=1e-4)
    spy, logger = Spy(method), CSVLogger(tmp_path)
    fit(Net(), method, spy, max_epochs=6, logger=logger, log_every_n_steps=1)
    phases = ["pretrain", "pretrain", "regularize", "regularize", "finetune", "finetune"]
    assert spy.bars[::BATCHES] == [f"{phase} {1 + i % 2}" for i, phase in enumerate(phases)]
    columns = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    for key in ("phase", "strength", "pull", "quantile", "pruned score", "dense score", "best mean"):
        assert f"HyperSparse/{key}" in columns
    assert all(entry["pull"] >= 1 and entry["quantile"] > 0 for entry in method.history)


def test_stopping_before_the_end_is_said() -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"HyperSparse ends dense: training stopped in phase 'pretrain', before pruning"):
        fit(toy(), HyperSparse(0.9), Stop(), max_epochs=5)


# ---- learning rates and the length of the run ------------------------------------------------------------------------


class Scheduled(Net):
    """Warms up and decays per step, which the method overrules."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stepwise(Scheduled, AfterStep):
    pass


RATES = {
    "step": [1, 1, 0.1, 0.01],
    "cosine": [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2],
    "constant": [1, 1, 1, 1],
}


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("art", [1, 3])
def test_rates_are_constant_until_pruning_and_start_again_there(kind: str, art: int, tmp_path: Path) -> None:
    module = Stepwise()
    module.dense = [9.0] * 8
    module.pruned = [0.0] * art + [10.0] * 8
    method = HyperSparse(
        0.9,
        pretrain="1 epoch",
        regularize="6 epochs",
        finetune="4 epochs",
        radius=0,
        strength=1e-4,
        learning_rate_schedule=kind,
    )
    spy, logger = Spy(method), CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    runner = trainer(method, spy, monitor, max_epochs=-1, logger=logger, log_every_n_steps=1)
    runner.fit(module, loader(), loader(1))
    assert method.stop_reason == "fresh"
    assert runner.current_epoch == 1 + art + 4  # the run is as long as the method
    expected = [0.1] * (1 + art) + [0.1 * factor for factor in RATES[kind]]
    assert spy.rates == pytest.approx([rate for rate in expected for _ in range(BATCHES)])
    logger.save()
    lines = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    column = lines[0].index("lr-SGD")
    shown = [float(line[column]) for line in lines[1:] if line[column]]
    assert shown[1:] == pytest.approx(spy.rates[1:])  # what observers see; the first is from before the run


def test_rates_may_be_left_to_the_module() -> None:
    module, method = Stepwise(), never(learning_rate_schedule=None, strength=1e-4)
    spy = Spy(method)
    fit(module, method, spy, max_epochs=4)
    assert spy.rates == pytest.approx([0.1 * 0.5 / (1 + step) for step in range(4 * BATCHES)])


def test_what_regularization_leaves_over_goes_to_fine_tuning() -> None:
    module, method = Stepwise(), HyperSparse(0.9, pretrain="1 epoch", regularize="5 epochs", radius=0, strength=1e-4)
    module.dense, module.pruned = [9.0] * 10, [0.0, 10.0] + [0.0] * 8
    spy = Spy(method)
    fit(module, method, spy, max_epochs=10)
    assert spy.phases == ["pretrain"] + ["regularize"] + ["finetune"] * 8
    assert spy.rates[2 * BATCHES :: BATCHES] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("length", ["planned", "published"])
def test_resume_in_every_phase(optimizer: str, length: str, tmp_path: Path) -> None:
    def make() -> tuple[Net, HyperSparse]:
        module = Net(optimizer=optimizer)
        module.dense, module.pruned = [99, 99, 99, 92, 0, 0, 0], [0, 89, 92, 97, 0, 0, 0]
        options: dict[str, Any] = {} if length == "planned" else {"finetune": "3 epochs"}
        return module, HyperSparse(0.9, pretrain="1 epoch", regularize="5 epochs", strength=1e-3, **options)

    epochs = 7 if length == "planned" else -1
    module, method = make()
    torch.manual_seed(0)
    files = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    runner = fit(module, method, files, max_epochs=epochs)
    assert runner.current_epoch == 7
    expected = state_of(module, runner, method)
    stops = {
        "sgd": (1, BATCHES + 1, 3 * BATCHES, 4 * BATCHES + 2),
        "adamw": (BATCHES, 3 * BATCHES - 1, 4 * BATCHES, 6 * BATCHES),
    }
    for step in stops[optimizer]:
        torch.manual_seed(step)
        other, again = make()
        resumed = fit(other, again, max_epochs=epochs, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.current_epoch == 7
        assert differences(expected, state_of(other, resumed, again)) == [], f"resumed at step {step}"


def test_copies_leave_memory_and_checkpoint_when_they_are_no_longer_needed(tmp_path: Path) -> None:
    module, method = Net(), never(pretrain="1 epoch", regularize="5 epochs", strength=1e-4)
    fit(module, method, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=8)
    attempts = [
        len(
            torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"]["HyperSparse"]["memory"][
                "stop_rule"
            ]["attempts"]
        )
        for epoch in range(8)
    ]
    assert attempts == [0, 0, 1, 2, 3, 4, 0, 0]
    assert method.stop_rule.window == []


# ---- any task --------------------------------------------------------------------------------------------------------


class Teacher(L.LightningModule):
    """Imitates a small network: classification of its decisions, or regression of its outputs."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task
        self.net = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x)
        if self.task == "regression":
            return nn.functional.mse_loss(out, y)
        labels = y.argmax(1)
        return {"loss": nn.functional.cross_entropy(out, labels), "accuracy": (out.argmax(1) == labels).float().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def teacher_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 16, generator=generator)
    hidden = (x[:, :6] @ torch.randn(6, 8, generator=generator)).relu()
    return x, hidden @ torch.randn(8, 4, generator=generator) / 4


def score_of(module: Teacher, x: Tensor, y: Tensor) -> float:
    module.eval()
    with torch.no_grad():
        out = module.net(x)
    if module.task == "regression":
        return -float(nn.functional.mse_loss(out, y))
    return float((out.argmax(1) == y.argmax(1)).float().mean())


def taught(task: str, *callbacks: L.Callback) -> tuple[Teacher, float]:
    """A module that has learned from a teacher, and its score on what it has not seen."""
    x, y = teacher_data()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:1536], y[:1536]), 64, shuffle=True)
    L.seed_everything(1, verbose=False)
    module = Teacher(task)
    trainer(*callbacks, max_epochs=40).fit(module, data)
    return module, score_of(module, x[1536:], y[1536:])


@functools.cache
def score_of_the_dense_classifier() -> float:
    return taught("classification")[1]


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("penalty", ["hypersparse", "l1"])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_it_learns_a_teacher_to_the_end(task: str, penalty: str) -> None:
    method = HyperSparse(0.9, penalty=penalty, pretrain="8 epochs", regularize="20 epochs", strength=3e-4, growth=1.15)
    module, score = taught(task, method)
    assert method.stop_reason == "fresh"
    weights = [module.net[i].weight for i in (0, 3, 5)]
    total = sum(weight.numel() for weight in weights)
    assert sum(int(weight.count_nonzero()) for weight in weights) == total - quantile_rank(0.9, total) - 1
    if penalty == "hypersparse":
        assert method.history[-1]["pull"] > method.history[0]["pull"]
    if task == "classification":
        assert score >= score_of_the_dense_classifier() - 0.02
    else:
        assert score > -0.1 * float(teacher_data()[1].var())


def test_manual_optimization_that_returns_no_loss_is_refused() -> None:
    class Silent(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"training_step returns no loss, so models cannot be compared by it; return the"):
        fit(Silent(), HyperSparse(0.9))


class Skipping(Toy):
    """Leaves out some batches, as Lightning allows."""

    skipped: tuple[int, ...] = (1,)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")
def test_batches_that_are_skipped_are_left_out_of_the_scores() -> None:
    method, losses = HyperSparse(0.9), []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            if outputs and trainer.current_epoch == 1:
                losses.append(float(outputs["loss"]))

    fit(Skipping(), method, Note())
    assert len(losses) == 3
    assert method.history[0]["dense"] == pytest.approx(-sum(losses) / 3)


@pytest.mark.filterwarnings("ignore:.*training_step.* returned `None`")
def test_a_run_that_skips_all_is_refused() -> None:
    module = Skipping()
    module.skipped = (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"training_step returns no loss, so models cannot be compared by it; return the"):
        fit(module, HyperSparse(0.9))


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        ("f1", "score='f1' needs an entry 'f1' in the output of training_step, which is not a dictionary"),
        (lambda output, batch: torch.zeros(2), "must be a single number, not a tensor of shape (2,)"),
    ],
)
def test_scores_that_are_not_there(score: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        fit(toy(), HyperSparse(0.9, score=score))
    assert sentence in str(error.value)


@pytest.mark.parametrize("build", [lambda: HyperSparse(0.9), lambda: HyperSparse(0.9, strength=1e-4, penalty="l2")])
def test_copies_of_the_callback(build: Callable[[], HyperSparse]) -> None:
    assert build().config() == build().config()
