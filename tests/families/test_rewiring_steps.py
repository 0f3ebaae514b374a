"""Which gradients decide: those of the step, whole, unscaled, once; with scalers, several optimizers and odd modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_sparse import SET, GraNet, RigL
from lightning_sparse.families import Rewiring, rewiring
from lightning_sparse.testing import Manual, Toy, differences, fit, loader, toy, trainer
from tests.helpers.modules import double
from tests.helpers.rewiring import METHODS, STEPS, Diary


class Recorder(Rewiring):
    """Keeps what it was shown."""

    seen: list[tuple[str, Tensor]]

    def keep_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        self.seen.append((name, gradient.clone()))
        return weight.abs()

    def grow_score(self, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs()


def recorder(**options: Any) -> Recorder:
    method = Recorder(0.5, seed=0, allocation="uniform", every="3 steps", end="6 steps", **options)
    method.seen = []
    return method


def recorded(module: Toy, **options: Any) -> dict[str, Tensor]:
    method = recorder()
    fit(module, method, **options)
    assert len(method.seen) == 4
    return dict(method.seen)


def test_the_gradient_is_dense_and_that_of_the_step() -> None:
    dense: list[dict[str, Tensor]] = []

    class Whole(L.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            named = pl_module.named_parameters()
            dense.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})

    method = recorder()
    fit(toy(), Whole(), method)
    for name, gradient in method.seen:
        assert gradient.equal(dense[2][name])
    assert any(gradient[method.masks.dropped(name)].any() for name, gradient in method.seen)


def test_the_gradient_is_the_mean_over_accumulated_batches() -> None:
    large = recorded(double(Toy))
    small = recorded(double(Toy), batch_size=2, accumulate_grad_batches=4)
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_held_on_steps_with_an_update_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    copy, method = rewiring._copy, METHODS[name](0.9, every="3 steps")

    def counted(gradient: Tensor | None, scale: Tensor | None) -> Tensor | None:
        copies.append(method.steps)
        return copy(gradient, scale)

    class Look(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert method.gradients == {}
            assert not method.prepares_steps

    monkeypatch.setattr(rewiring, "_copy", counted)
    fit(toy(), Look(), method)
    expected = {"SET": [], "RigL": [3, 6], "GraNet": [3, 6, 9]}[name]
    assert copies == [step for step in expected for _ in range(4)]


# ---- gradient scalers: the real one, which also works on a CPU ------------------------------------------------------


class Scaled(Toy):
    """Its optimizer may unscale by itself; the losses of some batches are infinite."""

    def __init__(self, fused: bool, infinite: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.load_state_dict(toy().state_dict())
        self.net[5] = nn.Identity()
        self.fused, self.infinite, self.number = fused, infinite, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.number += 1
        return self.loss(batch) * (torch.inf if self.number in self.infinite else 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, fused=self.fused)


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled(fused: bool) -> None:
    plain = recorded(Scaled(False))
    scaled = recorded(Scaled(fused), plugins=[half()])
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["RigL", "GraNet"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_falls_on_a_skipped_step_is_made_at_the_next_and_once(name: str, fused: bool) -> None:
    method = METHODS[name](0.8, every="4 steps")
    diary = Diary(method)
    scales: list[float] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            scales.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[union-attr]
            assert method.gradients == {}
            assert all(weight.isfinite().all() for weight in pl_module.parameters())

    fit(Scaled(fused, infinite=(4, 5)), method, diary, Look(), plugins=[half()])
    # Due at the fourth step, which is skipped, as is the fifth.
    assert diary.changes() == {"RigL": [6, 8], "GraNet": [6, 8]}[name]
    assert scales[2:6] == [1024, 512, 256, 256]
    assert method.updates == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_replaced_step_moves_nothing_under_a_scaler(fused: bool) -> None:
    module = Scaled(fused)
    seen: list[Tensor] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.net[6].bias.detach().clone())

    fit(module, RigL(0.8, every="3 steps"), Look(), plugins=[half()])
    assert [i + 1 for i in range(1, STEPS) if seen[i].equal(seen[i - 1])] == [3, 6]


# ---- several optimizers ---------------------------------------------------------------------------------------------


class Alternating(Manual):
    """Two optimizers that never step in the same batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_optimizers_that_take_turns(tmp_path: Path) -> None:
    """The gradients of the first wait for those of the second, and for nobody if the run is resumed in between."""
    method, module = RigL(0.8, every=0.25, end=1.0), Alternating()
    module.load_state_dict(toy().state_dict())
    diary = Diary(method)
    waiting: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            waiting.append(len(method.gradients))
            trainer.save_checkpoint(tmp_path / f"{len(waiting)}.ckpt")

    fit(module, method, diary, Look())
    assert diary.changes() == [4, 7, 10]
    assert waiting == [0, 0, 2, 0, 0, 2, 0, 0, 2, 0, 0, 0]
    for number in (3, 6, 7):
        torch.manual_seed(number)
        again, other = RigL(0.8, every=0.25, end=1.0), Alternating()
        fit(other, again, ckpt_path=tmp_path / f"{number}.ckpt")
        assert differences(method.memorize(), again.memorize()) == []


class Uneven(Manual):
    """The first optimizer steps in every batch, the second in every fourth."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, steps in zip(self.optimizers(), (True, batch_idx % 4 == 3), strict=True):
            optimizer.zero_grad()
            if steps:
                self.manual_backward(self.loss(batch))
                optimizer.step()


def test_an_optimizer_that_waits_for_another_gives_up_one_step_only() -> None:
    method, module = RigL(0.8, every=0.25, end=1.0), Uneven()
    diary = Diary(method)
    seen: list[Tensor] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.net[0].bias.detach().clone())

    fit(module, method, diary, Look())
    assert diary.changes() == [4, 8]  # the third waits until the end, where nothing is moved any more
    assert [i + 1 for i in range(1, STEPS) if seen[i].equal(seen[i - 1])] == [3, 6, 10]


def test_manual_steps_counted_in_steps() -> None:
    class ByHand(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    method = RigL(0.8, every=0.2, end=1.0)
    diary = Diary(method)
    fit(ByHand(), method, diary, max_epochs=-1, max_steps=10)
    assert diary.changes() == [2, 4, 6, 8]


def test_two_methods_under_one_optimizer() -> None:
    """Each reads its gradients before either takes the step."""
    first, second = (RigL(0.8, every="3 steps", targets=[layer], name=layer) for layer in ("net.2", "net.6"))
    diaries = [Diary(first), Diary(second)]
    fit(toy(), first, second, *diaries)
    assert [diary.changes() for diary in diaries] == [[3, 6], [3, 6]]


# ---- gradients that do not come -------------------------------------------------------------------------------------


def test_a_run_that_became_too_short_to_prune(tmp_path: Path) -> None:
    fit(toy(), GraNet(0.9), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1), max_epochs=10)
    with pytest.raises(ValueError, match=r"end=0.5 is 50% of the run as originally planned, but .* stop at 30%"):
        fit(toy(), GraNet(0.9), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=3)


def test_a_layer_without_a_gradient_stays_as_it_is() -> None:
    class Spare(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(8, 8)

    method, module = RigL(0.5, every="3 steps", allocation="uniform"), Spare()
    diary = Diary(method)
    fit(module, method, diary)
    assert diary.changes() == [3, 6]
    assert method.masks["spare.weight"].equal(diary.first["spare.weight"])
    assert not method.masks["net.6.weight"].equal(diary.first["net.6.weight"])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_a_loss_waits_for_the_next() -> None:
    class Choosy(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if self.trainer.global_step == 2 else self.loss(batch)

    method = RigL(0.8, every="3 steps")
    diary = Diary(method)
    fit(Choosy(), method, diary)
    assert diary.changes() == [4, 6]


def test_gradients_that_nobody_can_see_are_said() -> None:
    class Closed(Toy):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            def closure() -> Tensor:
                self.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            self.optimizers(use_pl_optimizer=False).step(closure)

    with pytest.warns(UserWarning, match="RigL has moved no connection"):
        fit(Closed(), RigL(0.8))
    fit(Closed(), SET(0.8))


def test_a_diverged_loss_is_named() -> None:
    class Diverging(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (torch.nan if self.trainer.global_step == 2 else 1)

    with pytest.raises(ValueError, match=r"RigL cannot rewire 'net.0.weight': A growth score is NaN or infinite"):
        fit(Diverging(), RigL(0.8, every="3 steps"))


def test_a_run_counted_in_steps_and_one_without_a_length() -> None:
    method = RigL(0.8, every=0.2, end=1.0)
    diary = Diary(method)
    fit(toy(), method, diary, max_steps=10, max_epochs=-1)
    assert diary.changes() == [2, 4, 6, 8]

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(loader())

    method = RigL(0.8, every=0.25, end=1.0)
    diary = Diary(method)
    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    trainer(method, diary, max_epochs=4).fit(toy(), data, loader(1))
    assert diary.changes() == [5, 9]


@pytest.mark.parametrize("cls", [RigL, GraNet])
def test_true_half_precision(cls: type[Rewiring]) -> None:
    method = cls(0.8, every="3 steps")
    fit(toy().bfloat16(), method, precision="bf16-true")
    assert method.updates >= 2
