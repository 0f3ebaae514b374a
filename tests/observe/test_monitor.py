"""What the monitor logs is what the weights are; what it costs is nothing but at log steps; nobody notices it."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sparse import SET, MagnitudePruning, RandomSparsity, SparseConnectivityLearning, WeightPenalty
from lightning_sparse.observe import SparsityMonitor
from lightning_sparse.testing import BATCHES, Toy, attention_network, fit, loader, method_of, network, toy, trainer
from tests.helpers.overlays import NEEDS_ATTENTION, OVERLAYS, overlay


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What a CSVLogger wrote: metric -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    with next(folder.rglob("metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key != "step" and value:
                    found.setdefault(key, {})[int(row["step"])] = float(value)
    return found


class Zeros(L.Callback):
    """Counts zeros by itself, after every batch."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weights = {name: p.detach() for name, p in pl_module.named_parameters() if p.ndim > 1}
        self.seen.append({name: float((w == 0).double().mean()) for name, w in weights.items()})
        self.sizes = {name: w.numel() for name, w in weights.items()}

    def total(self, step: int, *names: str) -> float:
        chosen = [name for name in self.sizes if not names or name in names]
        return sum(self.seen[step][n] * self.sizes[n] for n in chosen) / sum(self.sizes[n] for n in chosen)


@pytest.mark.parametrize("first", [True, False])
def test_loggers_get_target_and_actual_sparsity_at_log_steps(first: bool, tmp_path: Path) -> None:
    zeros, monitor = Zeros(), SparsityMonitor(table=False)
    methods: list[L.Callback] = [
        MagnitudePruning(0.75, targets=["!net.8"], allocation="uniform"),
        RandomSparsity(0.5, targets=["net.8"], name="head"),
    ]
    callbacks = [monitor, *methods] if first else [*methods, monitor]
    fit(toy(), *callbacks, zeros, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    seen = logged(tmp_path)
    at = [2, 5, 8, 11]  # as Lightning counts
    actual = {step: value for step, value in seen["sparsity/actual"].items() if step in at}
    assert actual == pytest.approx({step: zeros.total(step) for step in at})
    assert set(seen["sparsity/actual"]) == {*at, 3, 7}, "and at the end of epochs"
    final = (0.75 * (72 + 576 + 2048) + 0.5 * 64) / 2760
    assert seen["sparsity/target"] == pytest.approx(dict.fromkeys(at, final))
    assert seen["sparsity/RandomSparsity(name='head')"] == dict.fromkeys(at, 0.5)
    assert seen["sparsity/at_target"] == {2: 0, 5: 0, 8: 0, 11: 1}
    ends = [BATCHES * epoch - 1 for epoch in (1, 2, 3)]
    assert sorted(seen["val_loss"]) == ends, "as Lightning counts"
    for name in zeros.sizes:
        assert seen[f"layers/{name}"] == pytest.approx({step: zeros.seen[step][name] for step in ends})
        assert set(seen[f"layer_targets/{name}"].values()) == {0.5 if name == "net.8.weight" else 0.75}
    assert seen["frontier/density"] == {11: pytest.approx(1 - zeros.total(11))}
    assert not [name for name in seen if name.startswith("final/") or name == "sparsity"], "no number twice"
    phases, losses = monitor.history.column("phase"), [seen["val_loss"][step] for step in (3, 7, 11)]
    best = min(loss for loss, phase in zip(losses, phases, strict=True) if phase == phases[-1])
    assert seen["best/val_loss"] == {11: pytest.approx(best)}
    assert losses.index(seen["val_loss"][4 * seen["best/epoch"][11] + 3]) == seen["best/epoch"][11]


def test_costs_and_dead_outputs_are_those_of_the_zeros(tmp_path: Path) -> None:
    module, monitor = toy(), SparsityMonitor(table=False)
    fit(
        module,
        MagnitudePruning(0.4, structure="channel", allocation="uniform", targets=["!:last"]),
        monitor,
        logger=CSVLogger(tmp_path),
    )
    positions = {"net.0.weight": 64, "net.2.weight": 16, "net.6.weight": 1, "net.8.weight": 1}
    weights = {name: p for name, p in module.named_parameters() if p.ndim > 1}
    macs = sum(positions[name] * int((w != 0).sum()) for name, w in weights.items())
    dense = sum(positions[name] * w.numel() for name, w in weights.items())
    seen = logged(tmp_path)
    assert sum(monitor.macs.values()) == dense
    assert seen["cost/macs"][11] == macs
    assert seen["cost/macs_fraction"][11] == pytest.approx(macs / dense)
    assert seen["cost/parameters"][11] == sum(int((p != 0).sum()) if p.ndim > 1 else p.numel() for p in module.parameters())
    dead = sum(int((w.flatten(1) == 0).all(1).sum()) for w in weights.values())
    assert seen["sparsity/dead_outputs"][11] == dead > 0


def test_churn_is_what_came_and_went_between_epochs() -> None:
    kept: list[set[int]] = []
    method = SET(0.5, every="1 steps", drop_fraction=0.3)

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not kept:
                self.on_train_epoch_end(trainer, pl_module)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            flat = torch.cat([method.masks[name].flatten() for name in method.masks])
            kept.append(set(flat.nonzero().flatten().tolist()))

    monitor = SparsityMonitor(table=False)
    fit(toy(), method, monitor, Keep())
    expected = [len(a ^ b) / len(a | b) for a, b in itertools.pairwise(kept)]
    assert expected[0] > 0.05
    assert monitor.history.column("churn") == pytest.approx(expected)


class Operations(TorchDispatchMode):
    """Notes whatever is asked of a device, and so whatever could wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "at_log_steps"),
    [(lambda: MagnitudePruning(0.5), False), (lambda: SparseConnectivityLearning(price=0.05), True)],
    ids=["masks", "masks that are live"],
)
def test_no_device_is_asked_between_log_steps(method: Any, at_log_steps: bool, tmp_path: Path) -> None:
    monitor, asked = SparsityMonitor(table=False), []
    original = monitor.on_train_batch_end

    def watched(*args: Any) -> None:
        with Operations() as operations:
            original(*args)
        asked.append(operations.seen)

    monitor.on_train_batch_end = watched  # type: ignore[method-assign]
    fit(toy(), method(), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    assert [bool(seen) for seen in asked] == [at_log_steps and step % 3 == 2 for step in range(3 * BATCHES)]


def test_the_run_is_the_same_without_it() -> None:
    weights = []
    for watched in (True, False):
        torch.manual_seed(1)
        module = toy()
        fit(module, SET(0.5, every="1 steps"), *([SparsityMonitor(table=False)] if watched else []))
        weights.append([p.detach().clone() for p in module.parameters()] + [torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_readings_go_on_after_a_resume(tmp_path: Path) -> None:
    def run(monitor: SparsityMonitor, folder: Path, *saved: L.Callback, **options: Any) -> dict[str, dict[int, float]]:
        torch.manual_seed(1)
        fit(toy(), SET(0.5, every="1 steps"), monitor, *saved, logger=CSVLogger(folder), log_every_n_steps=1, **options)
        return logged(folder)

    whole, resumed = SparsityMonitor(table=False), SparsityMonitor(table=False)
    saved = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_epochs=1)
    before = run(whole, tmp_path / "whole", saved)
    after = run(resumed, tmp_path / "resumed", ckpt_path=tmp_path / "saved" / f"step={2 * BATCHES}.ckpt")
    assert resumed.history.column("epoch") == [0, 1, 2]
    for key in ("step", "sparsity", "zeros", "layers", "macs", "phase"):
        assert resumed.history.column(key) == whole.history.column(key)
    assert resumed.history.rows[0] == whole.history.rows[0], "from the checkpoint"
    key = "sparsity/actual"
    assert after[key] == {step: value for step, value in before[key].items() if step >= 2 * BATCHES}


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_every_method_can_be_watched(path: Path) -> None:
    net = attention_network() if path.stem in NEEDS_ATTENTION else None
    callbacks, monitor, module = overlay(path), SparsityMonitor(table=False), toy(net=net)
    fit(module, monitor, *callbacks)
    [row] = monitor.history.rows[-1:]
    masks = method_of(callbacks).mask_set
    watched = [p for name, p in module.named_parameters() if (p.ndim > 1 if masks is None else name in masks)]
    assert row["zeros"] == pytest.approx(sum(int((p == 0).sum()) for p in watched) / sum(p.numel() for p in watched))
    if masks is not None:
        assert row["layers"] == list(masks.counts.values())
        assert row["sparsity"] == pytest.approx(masks.sparsity)
    assert row["macs"] <= sum(monitor.macs.values())


class Lookup(Toy):
    """Nothing in it that a method would choose."""

    def __init__(self) -> None:
        super().__init__(net=nn.Embedding(3, 4))

    def loss(self, batch: Any) -> torch.Tensor:
        return self.net(batch[1] % 3).square().mean()


def test_a_model_without_layers_and_a_run_that_is_over(tmp_path: Path) -> None:
    monitor = SparsityMonitor()
    with pytest.warns(UserWarning, match="Lookup has no convolution, .* no report is written; add a method") as said:
        fit(Lookup(), monitor, default_root_dir=tmp_path)
    assert len([warning for warning in said if "SparsityMonitor" in str(warning.message)]) == 1
    assert monitor.history.rows == []
    assert not list(tmp_path.rglob("*.html"))
    again = SparsityMonitor()
    fit(toy(), MagnitudePruning(0.5), SparsityMonitor(), ModelCheckpoint(tmp_path, "last"))
    fit(toy(), MagnitudePruning(0.5), again, ckpt_path=tmp_path / "last.ckpt")
    assert len(again.history.rows) == 3


def test_weights_that_only_a_method_without_masks_has_chosen(tmp_path: Path) -> None:
    monitor, module = SparsityMonitor(), Lookup()
    with pytest.warns(UserWarning, match="MACs are left out"):
        fit(module, WeightPenalty(targets=["type:Embedding"]), monitor, default_root_dir=tmp_path)
    weight = next(p for p in module.parameters() if p.ndim > 1)
    assert monitor.history.column("layers")[-1] == [int(weight.count_nonzero())]
    assert (tmp_path / "report.html").is_file()


def test_a_new_fit_begins_a_new_history() -> None:
    monitor = SparsityMonitor(table=False)
    fit(toy(), MagnitudePruning(0.5), monitor)
    fit(toy(), MagnitudePruning(0.5), monitor, max_epochs=2)
    assert monitor.history.column("epoch") == [0, 1]


def test_the_table_and_the_summary_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    fit(toy(), MagnitudePruning(0.75), SparsityMonitor())
    assert "690 of 2,760" in capsys.readouterr().out


def test_without_a_method_zeros_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    module, monitor = toy(), SparsityMonitor()
    module.net[8].weight.data[0] = 0
    module.net[8].weight.requires_grad_(False)
    with caplog.at_level("INFO"):
        fit(module, monitor)
    assert "no method of lightning_sparse in this Trainer; only exact zeros are counted" in caplog.text
    assert monitor.history.column("sparsity") == pytest.approx([16 / 2760] * 3)
    assert monitor.history.column("phase") == [None] * 3


class Unmeasurable(Toy):
    """Neither a forward pass nor a training step without a gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        torch.autograd.grad(loss, self.net[0].weight, retain_graph=True)
        return loss


def test_a_pass_that_cannot_be_counted_is_one_line() -> None:
    monitor = SparsityMonitor(table=False)
    with pytest.warns(UserWarning, match="MACs are left out, because no forward pass could be counted") as warned:
        fit(Unmeasurable(), MagnitudePruning(0.5), monitor)
    assert str(warned[0].message).count("\n") == 0
    assert "macs" not in monitor.history.rows[-1]
    assert monitor.history.rows[-1]["sparsity"] == 0.5


class Forward(Toy):
    """Counted by its forward pass, not by what training does besides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self(x) + self(x), y)


def test_macs_are_those_of_one_pass_per_sample() -> None:
    found = []
    for module in (toy(), Forward()):
        monitor = SparsityMonitor(table=False)
        fit(module, monitor)
        found.append(monitor.macs)
    example = Forward()
    example.example_input_array = torch.ones(2, 1, 8, 8)
    monitor = SparsityMonitor(table=False)
    fit(example, monitor)
    assert found[0] == found[1] == monitor.macs
    assert found[0]["net.8.weight"] == 64


def test_accumulated_batches_are_logged_once(tmp_path: Path) -> None:
    fit(
        toy(),
        MagnitudePruning(0.5),
        SparsityMonitor(table=False),
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        accumulate_grad_batches=2,
    )
    assert sorted(logged(tmp_path)["sparsity/target"]) == [0, 1, 2, 3, 4, 5]
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        assert sum(bool(row["sparsity/target"]) for row in csv.DictReader(file)) == 6


class Silent(L.LightningModule):
    """Logs and validates nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    training_step, loss = Toy.training_step, Toy.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_without_a_validation_and_without_epochs() -> None:
    monitor = SparsityMonitor(table=False)
    runner = trainer(monitor, MagnitudePruning(0.5, end=0.5), max_steps=5, max_epochs=-1)
    runner.fit(Silent(), loader(3))
    assert monitor.history.rows[-1]["sparsity"] == 0.5
