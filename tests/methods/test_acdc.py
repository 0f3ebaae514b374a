"""Compressed and dense phases in turns, as algorithm 1 of the paper has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import ACDC, SparsityCheckpoint
from lightning_sparse.core import RunLength, initial_state, restart
from lightning_sparse.methods.acdc.turns import Turns
from lightning_sparse.testing import OPTIMIZERS, Toy, fit, loader, network, toy, trainer
from tests.helpers.rewiring import Diary

SHORT: dict[str, Any] = {"start": "2 steps", "every": "2 steps", "last_dense": "2 steps", "end": "10 steps"}
COMPRESSED = [*(2, 3), *(6, 7), *(10, 11)]
"""The steps of compressed phases, in a run of 12."""


def test_the_published_phases() -> None:
    """100 epochs: compressed from 10, 20, ... 70 for five each, dense from 75, compressed from 85."""
    turns = Turns(0.1, 0.05, 0.1, 0.85)
    turns.resolve(RunLength(100, 1000))
    assert [round(100 * begin, 6) for begin in turns.begins] == [*range(10, 80, 5), 85]


@pytest.mark.parametrize(
    ("spans", "epochs"),
    [
        ((0.1, 0.1, 0.1, 0.8), [1, 2, 3, 4, 5, 6, 8]),  # six would fit, and the sixth would be dense
        (("2 epochs", "3 epochs", "1 epoch", 0.9), [2, 5, 9]),
        ((0.0, "4 epochs", "4 epochs", "8 epochs"), [0, 4, 8]),
    ],
)
def test_phases_begin_and_end_compressed(spans: Any, epochs: list[int]) -> None:
    turns = Turns(*spans)
    turns.resolve(RunLength(10, 100))
    assert [round(10 * begin, 6) for begin in turns.begins] == epochs


def top_k(weights: list[Tensor], kept: int) -> list[Tensor]:
    """The largest of all weights by Python's own sorting; earlier ones first among equals."""
    entries = [(-abs(v), place, i) for place, w in enumerate(weights) for i, v in enumerate(w.flatten().tolist())]
    best = {(place, i) for _, place, i in sorted(entries)[:kept]}
    return [torch.tensor([(p, i) in best for i in range(w.numel())]).view(w.shape) for p, w in enumerate(weights)]


def by_hand(net: nn.Module, sparsity: float) -> None:
    """Algorithm 1, with momentum and weight decay written out."""
    parameters = list(net.parameters())
    weights = [p for p in parameters if p.ndim > 1]
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    momenta = [torch.zeros_like(p) for p in parameters]
    data, step = loader(), 0
    for epoch in range(3):
        data.set_epoch(epoch)
        for x, y in data:
            if step in COMPRESSED and step - 1 not in COMPRESSED:
                total = sum(w.numel() for w in weights)
                masks = top_k(weights, total - round(sparsity * total))
            if step not in COMPRESSED:
                masks = [torch.ones_like(mask) for mask in masks]
                if step - 1 in COMPRESSED:
                    momenta = [torch.zeros_like(p) for p in parameters]
            with torch.no_grad():
                for weight, mask in zip(weights, masks, strict=True):
                    weight.mul_(mask)
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for p, momentum in zip(parameters, momenta, strict=True):
                    assert p.grad is not None
                    momentum.mul_(0.9).add_(p.grad + 1e-3 * p)
                    p.sub_(0.05 * momentum)
                for weight, mask in zip(weights, masks, strict=True):
                    weight.mul_(mask)
            step += 1


def test_is_algorithm_1() -> None:
    module, other = toy(net=network(dropout=0)), network(dropout=0)
    module.load_state_dict(toy().state_dict())
    other.load_state_dict(module.net.state_dict())
    torch.manual_seed(0)
    fit(module, ACDC(0.8, **SHORT))
    torch.manual_seed(0)
    by_hand(other, 0.8)
    for found, expected in zip(module.net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert (found == 0).equal(expected == 0)


def test_golden_numbers() -> None:
    method = ACDC(0.9, **SHORT)
    diary = Diary(method)
    fit(toy(), method, diary)
    total = method.masks.total
    kept = [sum(int(mask.count_nonzero()) for mask in masks.values()) for masks in diary.masks]
    assert total == 2760
    assert kept == [276 if step in COMPRESSED else total for step in range(12)]
    assert diary.changes() == [3, 5, 7, 9, 11]
    assert method.summary()[-2].kept == 276


@pytest.mark.parametrize("structure", ["2:4", "channel", "coupled"])
def test_structures_come_and_go(structure: str) -> None:
    options = {"targets": ["!:first"]} if structure == "2:4" else {"sparsity": 0.5, "allocation": "uniform"}
    method = ACDC(structure=structure, **options, **SHORT)
    diary = Diary(method)
    fit(toy(), method, diary)
    total = method.masks.total
    kept = [sum(int(mask.count_nonzero()) for mask in masks.values()) for masks in diary.masks]
    assert [count < total for count in kept] == [step in COMPRESSED for step in range(12)]
    if structure == "2:4":
        assert all(kept[step] == total / 2 for step in COMPRESSED)


def test_optimizers_begin_a_dense_phase_without_memory() -> None:
    """Of biases either, and Adam starts anew: as the published code empties the buffers of SGD."""
    steps: list[float] = []

    class Note(L.Callback):
        def on_train_batch_start(self, fitted: L.Trainer, *args: Any) -> None:
            state = fitted.optimizers[0].state
            steps.append(min((float(entry["step"]) for entry in state.values()), default=0))

    fit(toy("adam"), ACDC(0.8, **SHORT), Note())
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


FORGETFUL: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **OPTIMIZERS,
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, initial_accumulator_value=0.1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
    "anchored": lambda parameters: Anchored(parameters),
}


class Anchored(torch.optim.Optimizer):
    """Steps from a copy of the weights that it made in its first step, as MADGRAD does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(start=parameter.clone(), sum=torch.zeros_like(parameter))
                state["sum"].add_(parameter.grad)
                parameter.copy_(state["start"] - 0.1 / group["step"] * state["sum"])


@pytest.mark.parametrize("optimizer", FORGETFUL)
def test_a_forgetful_optimizer_is_a_new_one(optimizer: str) -> None:
    module, make = toy(net=network(dropout=0)), FORGETFUL[optimizer]
    used, (x, y) = make(module.parameters()), next(iter(loader()))
    initial = initial_state([used])

    def step(stepped: torch.optim.Optimizer) -> None:
        stepped.zero_grad()
        F.cross_entropy(module.net(x), y).backward()
        stepped.step()

    for _ in range(3):
        step(used)
    restart(used, initial)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    step(used)
    found = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(before)
    step(make(module.parameters()))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(found[name], value)


def test_both_models_are_kept(tmp_path: Path) -> None:
    method = ACDC(0.8, save_to=str(tmp_path), **SHORT)
    module, dense = toy(), {}

    class Note(L.Callback):
        def on_train_batch_end(self, fitted: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            if fitted.global_step == 10:
                dense.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    fit(module, method, Note())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.ckpt", "sparse.ckpt"]
    for file, expected in (("dense", dense), ("sparse", module.state_dict())):
        plain = Toy()
        plain.load_state_dict(torch.load(tmp_path / f"{file}.ckpt", weights_only=True)["state_dict"], strict=True)
        assert all(value.equal(expected[name]) for name, value in plain.state_dict().items())
    alive = sum(
        int(value.count_nonzero()) for name, value in dense.items() if name.split(".")[1] in "0268" and value.ndim > 1
    )
    assert method.masks.kept == 552 < alive


def test_checkpoints_tell_dense_phases_from_compressed_ones(tmp_path: Path) -> None:
    """Epochs 0 and 2 end compressed, epoch 1 ends dense."""
    spans = {"start": "2 steps", "every": "4 steps", "last_dense": "2 steps", "end": "8 steps"}
    callbacks = [SparsityCheckpoint(dirpath=tmp_path / p, phase=p, save_top_k=-1) for p in ("dense", "at target")]
    fit(toy(), ACDC(0.8, **spans), *callbacks)
    found = {path.parent.name: path.stem for path in tmp_path.rglob("*.ckpt")}
    assert found.keys() == {"dense", "at target"}
    assert found["dense"].startswith("epoch=1")


class Stop(L.Callback):
    """Ends training after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, fitted: L.Trainer, *args: Any) -> None:
        fitted.should_stop = fitted.global_step >= self.at


def test_a_run_that_stops_early_says_so() -> None:
    with pytest.warns(UserWarning, match=r"ACDC ends in phase 2 of 5 at sparsity 0.0000: training stopped before"):
        fit(toy(), ACDC(0.8, **SHORT), Stop(at=5))


def test_data_without_a_length_take_phases_of_whole_epochs() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.rand(1, 8, 8), torch.tensor(i % 4)) for i in range(16)])

    data = torch.utils.data.DataLoader(Endless(), batch_size=8)
    method = ACDC(0.8, start=0.25, every=0.25, last_dense=0.25, end=0.75)
    diary = Diary(method)
    trainer(method, diary, max_epochs=4).fit(toy(), data, loader(1))
    dense = [all(bool(mask.all()) for mask in masks.values()) for masks in diary.masks]
    assert dense == [True, True, False, False, True, True, False, False]
