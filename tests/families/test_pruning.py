"""What the papers of the two methods promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sparse import MagnitudePruning, RandomSparsity
from lightning_sparse.core import Budget, Position, find_targets, lay_out
from lightning_sparse.families import Masked
from lightning_sparse.functional import SCHEDULES, exact_count, random_generator, random_score
from lightning_sparse.models import ResNet
from lightning_sparse.observe import SparsityTable
from lightning_sparse.testing import BATCHES, Toy, fit, loader, toy, trainer
from tests.helpers.methods import L2Penalty


class Diary(L.Callback):
    """Masks and weights after every batch."""

    def __init__(self, method: Masked) -> None:
        self.method = method
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.masks.append({name: self.method.masks[name] for name in self.method.masks})

    @property
    def kept(self) -> list[int]:
        return [sum(int(mask.count_nonzero()) for mask in masks.values()) for masks in self.masks]


@pytest.mark.parametrize("schedule", ["linear", "cubic", lambda progress, start, end: end * progress**2])
def test_gradual_pruning_follows_the_schedule_exactly(schedule: Any) -> None:
    method = MagnitudePruning(0.9, start=0.25, end=0.75, schedule=schedule)
    diary = Diary(method)
    fit(toy(), method, diary)
    shape: Callable[[float, float, float], float] = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    total = method.masks.total
    expected = []
    for step in range(1, 3 * BATCHES + 1):
        progress = min(max((step / 12 - 0.25) / 0.5, 0), 1)
        expected.append(total - exact_count(shape(progress, 0.0, 0.9), total))
    assert diary.kept == expected


@pytest.mark.parametrize(
    "shape", [lambda p, a, b: 0.5 * p, lambda p, a, b: b * (1 + 0.4 * p * (1 - p))], ids=["short", "overshooting"]
)
def test_whatever_a_schedule_does_the_end_is_the_target(shape: Any) -> None:
    method = MagnitudePruning(0.9, schedule=shape)
    fit(toy(), method)
    assert method.masks.kept == method.masks.total - exact_count(0.9, method.masks.total)


def test_what_is_removed_stays_removed() -> None:
    method = MagnitudePruning(0.9, allocation="erk")
    diary = Diary(method)
    fit(toy(), method, diary)
    for before, after in zip(diary.masks, diary.masks[1:], strict=False):
        assert not any((after[name] & ~before[name]).any() for name in before)


def test_one_shot_removes_the_smallest() -> None:
    module = toy()
    net = module.net
    flat = torch.cat([p.detach().flatten() for p in net.parameters() if p.ndim > 1]).abs()
    boundary = flat.sort().values[exact_count(0.8, flat.numel())]
    expected = {f"net.{name}": p.detach().abs() >= boundary for name, p in net.named_parameters() if p.ndim > 1}
    method = MagnitudePruning(0.8, start=0, end=0)
    fit(module, method)
    assert all(method.masks[name].equal(mask) for name, mask in expected.items())


@pytest.mark.parametrize("every", ["1 epoch", "2 epochs"])
def test_updates_at_the_start_of_epochs(every: str) -> None:
    method = MagnitudePruning(0.9, start=0, end=1, every=every, schedule="linear")
    diary = Diary(method)
    fit(toy(), method, diary, max_epochs=4)
    per_epoch = [set(diary.kept[e * BATCHES : (e + 1) * BATCHES]) for e in range(4)]
    assert [len(kept) for kept in per_epoch] == [1, 1, 1, 1]
    changes = [e for e in range(1, 4) if per_epoch[e] != per_epoch[e - 1]]
    assert changes == ([1, 2, 3] if every == "1 epoch" else [2])


def test_two_of_four_in_the_trained_model() -> None:
    module = toy()
    fit(module, MagnitudePruning(structure="2:4", targets=["!:first"]))
    assert ((module.net[2].weight != 0).view(8, 2, 4, 3, 3).sum(2) == 2).all()
    assert ((module.net[6].weight != 0).view(16, 32, 4).sum(2) == 2).all()
    assert module.net[0].weight.all()


def test_channels_in_the_trained_model() -> None:
    module = toy()
    fit(module, MagnitudePruning(0.5, structure="channel", allocation="uniform", targets=["!:last"]))
    for layer, channels in ((0, 8), (2, 8), (6, 16)):
        alive = module.net[layer].weight.flatten(1).any(1)
        assert int(alive.count_nonzero()) == channels // 2
        assert module.net[layer].weight.flatten(1)[alive].all()


def test_several_methods_on_several_layers() -> None:
    module = toy()
    fit(module, MagnitudePruning(0.5, targets=["net.6"]), RandomSparsity(0.75, targets=["net.2"]))
    assert int(module.net[6].weight.count_nonzero()) == 1024
    assert int(module.net[2].weight.count_nonzero()) == 144
    assert module.net[0].weight.all()


# ---- random sparsity ------------------------------------------------------------------------------------------------


def random_mask(seed: int | None = None, **options: Any) -> tuple[RandomSparsity, Toy]:
    method, module = RandomSparsity(0.8, seed=seed, **options), toy()
    fit(module, method, max_epochs=1)
    return method, module


def test_a_random_mask_never_changes() -> None:
    method = RandomSparsity(0.8)
    diary = Diary(method)
    fit(toy(), method, diary)
    assert all(mask.equal(diary.masks[0][name]) for masks in diary.masks for name, mask in masks.items())


def test_the_seed_decides() -> None:
    first, again, other = (random_mask(seed)[0].masks.fingerprint() for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def test_seed_everything_decides_where_no_seed_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert random_mask()[0].masks.fingerprint().equal(random_mask(1)[0].masks.fingerprint())
    monkeypatch.delenv("PL_GLOBAL_SEED")
    torch.manual_seed(3)
    first = random_mask()[0]
    assert not first.masks.fingerprint().equal(random_mask()[0].masks.fingerprint())


def test_erk_counts_are_within_one_weight() -> None:
    """Golden densities at 5 % of a ResNet-20 for 100 classes."""

    class Images(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.loss((batch[0].expand(-1, 3, -1, -1), batch[1]))

    method = RandomSparsity(0.95)
    module = Images(net=ResNet(100, 3, depth=20))
    runner = trainer(method, max_steps=1, limit_val_batches=0)
    runner.fit(module, loader(1), loader(1))
    golden = {"conv1": 0.4598, "stages.0.0.conv1": 0.1310, "stages.1.0.shortcut.0": 0.7759, "stages.2.2.conv2": 0.0289}
    for name, density in {**golden, "fc": 0.2036}.items():
        full = f"net.{name}.weight"
        assert abs(method.masks.counts[full] - density * method.masks.numel(full)) <= 1 + 5e-5 * method.masks.numel(full)
    assert method.masks.kept == 276_656 - exact_count(0.95, 276_656)


def test_every_weight_has_the_same_chance() -> None:
    net = nn.Sequential(nn.Linear(20, 50))
    counts = torch.zeros(50, 20)
    targets, budget = find_targets(net), Budget(0.5, "uniform")
    for seed in range(60):
        score = random_score(net[0].weight, random_generator(seed, 0, "0.weight"))
        counts += lay_out(budget, targets).masks([score])[0]
    assert counts.mean() == 30
    assert abs(float(counts.std()) - 15**0.5) < 0.25  # binomial: n p q = 60 / 4


def test_rescaling_keeps_the_variance() -> None:
    module, plain = toy(), toy()
    method = RandomSparsity(0.75, allocation="uniform", rescale=True, seed=0)

    ratios = []

    class First(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                mask = method.masks["net.6.weight"]
                ratios.append((pl_module.net[6].weight / plain.net[6].weight)[mask].detach())

    fit(module, method, First(), max_epochs=1)
    torch.testing.assert_close(ratios[0], torch.full((512,), 2.0))


def test_global_allocation_of_random_scores() -> None:
    method, _ = random_mask(allocation="global")
    densities = [method.masks.counts[name] / method.masks.numel(name) for name in method.masks]
    assert max(densities) < 0.5
    assert method.masks.kept == method.masks.total - exact_count(0.8, method.masks.total)


# ---- the closing table ----------------------------------------------------------------------------------------------


def test_the_table_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    fit(toy(), MagnitudePruning(0.75, allocation="uniform"), SparsityTable())
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "net.6.weight" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["net.6.weight", "512 of 2,048", "512", "25.00%"]
    total, model = out.splitlines()[-3:-1]
    assert "total" in total
    assert [cell.strip() for cell in model.strip("│").split("│")] == ["whole model", "726 of 2,796", "726", "25.97%"]


def test_no_table_without_masks(capsys: pytest.CaptureFixture[str]) -> None:
    fit(toy(), L2Penalty(0.1), SparsityTable())
    assert "density" not in capsys.readouterr().out


class Curious(MagnitudePruning):
    """Looks at every position."""

    def evolve(self, position: Position) -> None:
        self.seen = [*getattr(self, "seen", []), position.step]
        super().evolve(position)


def test_topology_is_visited_until_the_schedule_ends_and_always_where_it_is_overridden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    position = MagnitudePruning.position
    monkeypatch.setattr(MagnitudePruning, "position", lambda self, *args: asked.append(self.steps) or position(self, *args))
    fit(toy(), MagnitudePruning(0.9, start=0.25, end=0.5))
    assert asked == [0, 1, 2, 3, 4, 4, 5, 6], "12 steps in 3 epochs"
    method = Curious(0.9, start=0.25, end=0.5)
    fit(toy(), method)
    assert method.seen == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12]
