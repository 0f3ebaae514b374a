"""What every method promises, for every overlay in `configs/methods/`; DESIGN of the package, CONTRIBUTING.md."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn

from lightning_sparse import CKARegularization, SparsityMixin
from lightning_sparse.core import MaskSet
from lightning_sparse.families import Rewiring
from lightning_sparse.functional import unpack
from lightning_sparse.loop import Sparsifier
from tests import toys
from tests.toys import BATCHES, OVERLAYS, Toy, Watcher, fit, loader, method_of, overlay, toy, trainer

pytestmark = pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)


def state_of(module: L.LightningModule, runner: L.Trainer, method: Sparsifier) -> dict[str, Any]:
    """Everything that must be equal after a resume."""
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in runner.optimizers],
        "memory": method.memorize(),
        "rng": torch.get_rng_state(),
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places at which two nested states are not equal bit for bit."""
    if isinstance(a, Tensor):
        return [] if a.dtype == b.dtype and a.equal(b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {a.keys() ^ b.keys()}"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} {b}"]


def masks_of(method: Sparsifier) -> MaskSet:
    """Its masks; empty for a method that owns none."""
    return MaskSet() if method.mask_set is None else method.mask_set


def on_target(method: Sparsifier) -> bool:
    """As many weights are kept as was promised; always so where nothing was."""
    return method.goal["total"] in (None, masks_of(method).kept)


def rests(method: Sparsifier) -> bool:
    """Whether masks stay as they are once the run is over: not where dropped entries live on and no count is promised."""
    return method.goal["total"] is not None or not method.dropped_live_on


def zeros_hold(method: Sparsifier, module: nn.Module) -> bool:
    """Every entry that a mask drops is exactly zero, element by element."""
    weights, masks = dict(module.named_parameters()), masks_of(method)
    return all(bool((weights[name][masks.dropped(name)] == 0).all()) for name in masks)


# ---- 1 Target -------------------------------------------------------------------------------------------------------


def test_target_is_reached_exactly(path: Path) -> None:
    callbacks = overlay(path)
    module, method = toy(), method_of(callbacks)
    fit(module, *callbacks)
    weights = dict(module.named_parameters())
    assert on_target(method)
    for name, count in method.goal["layers"].items():
        assert masks_of(method).counts[name] == count
    for name in masks_of(method):
        # A connection grown at a dead unit has no gradient, and stays at the zero it started from.
        asleep = int((weights[name][masks_of(method)[name]] == 0).count_nonzero())
        assert asleep == 0 or isinstance(method, Rewiring)
        assert not weights[name][masks_of(method).dropped(name)].any()


def test_an_impossible_target_is_refused_before_the_first_batch(path: Path) -> None:
    usual = method_of(overlay(path)).config()
    if usual.get("sparsity") is None:
        pytest.skip("this overlay asks for no sparsity")
    module, method = toy(), type(method_of(overlay(path)))(**{**usual, "sparsity": 0.999999})
    before = copy.deepcopy(module.state_dict())
    runner = trainer(method)
    with pytest.raises(ValueError, match=r"leaves nothing"):
        runner.fit(module, loader(), loader(1))
    assert runner.global_step == 0
    assert not differences(before, module.state_dict())


# ---- 2 Zero invariant -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", toys.OPTIMIZERS)
def test_zeros_for_every_observer(path: Path, optimizer: str, tmp_path: Path) -> None:
    callbacks = overlay(path)
    module, method = toy(optimizer), method_of(callbacks)
    seen: list[str] = []

    def look(moment: str, observed: L.LightningModule) -> None:
        seen.append(moment)
        assert zeros_hold(method, observed), moment
        for name, weight in method.weights.items():
            for value in runner.optimizers[0].state[weight].values():
                if value.shape == weight.shape and name in masks_of(method) and not method.dropped_live_on:
                    assert not value[masks_of(method).dropped(name)].any(), "a pruned entry has momentum"

    files = ModelCheckpoint(tmp_path / "full", every_n_train_steps=1, save_top_k=-1)
    bare = ModelCheckpoint(tmp_path / "bare", every_n_train_steps=3, save_top_k=-1, save_weights_only=True)
    runner = trainer(Watcher(look), *callbacks, files, bare, val_check_interval=2)
    runner.fit(module, loader(), loader())
    assert set(seen) == {"batch end", "validation", "epoch end"}
    assert method.mask_set is None or method.mask_set.sparsity > 0
    for file in tmp_path.glob("full/*.ckpt"):
        saved = torch.load(file, weights_only=True)
        masks = saved["callbacks"][method.state_key]["memory"].get("masks", {})
        for name, entry in masks.items():
            assert not saved["state_dict"][name][~unpack(entry["kept"], tuple(entry["shape"]))].any()
    last = max(tmp_path.glob("bare/*.ckpt"), key=lambda file: torch.load(file, weights_only=True)["global_step"])
    weights = torch.load(last, weights_only=True)["state_dict"]
    assert all(not weights[name][masks_of(method).dropped(name)].any() for name in masks_of(method))


# ---- 3 Exact resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_from_any_step_equals_the_uninterrupted_run(path: Path, optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    callbacks = overlay(path)
    module = toy(optimizer)
    files = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=True)
    runner = fit(module, *callbacks, files)
    expected = state_of(module, runner, method_of(callbacks))
    for step in (1, BATCHES - 1, BATCHES, BATCHES + 2, 2 * BATCHES, 3 * BATCHES - 1):
        torch.manual_seed(1000 + step)  # the new process knows nothing of the old generators
        callbacks = overlay(path)
        module = toy(optimizer, seed=step)
        runner = fit(module, *callbacks, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert runner.global_step == 3 * BATCHES
        assert differences(expected, state_of(module, runner, method_of(callbacks))) == [], f"resumed at step {step}"


def test_training_on_after_the_end_keeps_the_masks(path: Path, tmp_path: Path) -> None:
    """The schedule of a finished run is not stretched when it is resumed with more epochs."""
    callbacks = overlay(path)
    fit(toy(), *callbacks, ModelCheckpoint(tmp_path, "last"))
    method = method_of(callbacks)
    again = overlay(path)
    module = toy()
    fit(module, *again, ckpt_path=tmp_path / "last.ckpt", max_epochs=5)
    resumed = method_of(again)
    assert not rests(method) or masks_of(resumed).fingerprint().equal(masks_of(method).fingerprint())
    assert zeros_hold(resumed, module)


# ---- 4 Plain checkpoints --------------------------------------------------------------------------------------------


def test_checkpoints_are_plain(path: Path, tmp_path: Path) -> None:
    callbacks = overlay(path)
    module = toy()
    names = list(dict(module.named_parameters()))
    keys = list(module.state_dict())
    fit(module, *callbacks, ModelCheckpoint(tmp_path, "last"))
    assert list(dict(module.named_parameters())) == names
    assert list(module.state_dict()) == keys
    assert all(type(parameter) is nn.Parameter for parameter in module.parameters())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    fresh = toy(seed=7)
    fresh.load_state_dict(saved["state_dict"], strict=True)
    assert not differences(dict(fresh.state_dict()), dict(module.state_dict()))
    groups = [group["params"] for state in saved["optimizer_states"] for group in state["param_groups"]]
    assert groups == [list(range(len(names)))]
    masks = saved["callbacks"][method_of(callbacks).state_key]["memory"].get("masks", {})
    assert all(entry["kept"].numel() == -(-torch.Size(entry["shape"]).numel() // 8) for entry in masks.values())


# ---- 6 Accumulation and precision -----------------------------------------------------------------------------------


def test_micro_batches_equal_one_large_batch(path: Path) -> None:
    if any(isinstance(callback, CKARegularization) for callback in overlay(path)):
        pytest.skip("similarity is not additive: a term per micro-batch, see tests/callbacks/test_cka.py")
    results = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        callbacks = overlay(path)
        net = toys.network()
        net[5] = nn.Identity()  # dropout draws per batch
        module = Toy("sgd", net).double()
        module.load_state_dict({name: value.double() for name, value in toy().state_dict().items()})
        fit(module, *callbacks, batch_size=batch_size, accumulate_grad_batches=accumulate)
        results.append(dict(module.state_dict()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_the_layout_of_memory_changes_nothing(path: Path) -> None:
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        callbacks, module = overlay(path), toy().double()
        module.net.to(memory_format=layout)
        fit(module, *callbacks)
        ends.append((module.state_dict(), masks_of(method_of(callbacks))))
    (plain, masks), (last, others) = ends
    assert last["net.2.weight"].is_contiguous(memory_format=torch.channels_last)
    assert all(bool((masks.dropped(name) == others.dropped(name)).all()) for name in masks)
    torch.testing.assert_close(last, plain, rtol=1e-9, atol=1e-9)


def test_bf16_mixed(path: Path) -> None:
    callbacks = overlay(path)
    module, method = toy("adamw"), method_of(callbacks)
    fit(module, *callbacks, precision="bf16-mixed")
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert zeros_hold(method, module)
    assert on_target(method)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_with_a_planted_infinity(path: Path, fused: bool) -> None:
    class Planted(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            return loss * torch.inf if self.trainer.global_step == 2 else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=fused)

    callbacks = overlay(path)
    module, method = Planted(), method_of(callbacks)
    fit(module, *callbacks, precision="16-mixed", accelerator="gpu", devices=1)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert zeros_hold(method, module)
    assert on_target(method)


# ---- 7 Good neighbor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_moving_average(path: Path, first: bool, tmp_path: Path) -> None:
    callbacks_module = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks_module, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    average = callbacks_module.EMAWeightAveraging(decay=0.9)
    callbacks = overlay(path)
    module, method = toy(), method_of(callbacks)
    order = [average, *callbacks] if first else [*callbacks, average]
    checks = Watcher(lambda moment, observed: _assert_zeros(method, observed, moment))
    runner = trainer(*order, checks, ModelCheckpoint(tmp_path, "last"))
    runner.fit(module, loader(), loader())
    assert zeros_hold(method, module)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(not saved[name][masks_of(method).dropped(name)].any() for name in masks_of(method))


def _assert_zeros(method: Sparsifier, module: nn.Module, moment: str) -> None:
    assert zeros_hold(method, module), moment


def test_beside_stochastic_weight_averaging(path: Path) -> None:
    callbacks = overlay(path)
    module, method = toy(), method_of(callbacks)
    fit(module, *callbacks, L.pytorch.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=4)
    assert zeros_hold(method, module)


def test_beside_an_accumulation_schedule_and_clipping(path: Path) -> None:
    callbacks = overlay(path)
    module, method = toy(), method_of(callbacks)
    fit(module, *callbacks, GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), gradient_clip_val=0.1)
    assert zeros_hold(method, module)
    assert on_target(method)
    assert method.steps == BATCHES + BATCHES // 2 + BATCHES // 4


def test_clipping_sees_no_pruned_gradient(path: Path) -> None:
    norms = []

    class Clipped(Toy):
        def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
            method = method_of(callbacks)
            for name in masks_of(method):
                gradient = method.weights[name].grad
                taken = all(p.grad is None for p in method.weights.values()) or name in getattr(method, "duals", ())
                assert (gradient is None) == taken  # by a method that makes the step itself
                silent = gradient is None or method.dropped_learn
                assert silent or not gradient[masks_of(method).dropped(name)].any()
            norms.append(optimizer)

    callbacks = overlay(path)
    fit(Clipped(), *callbacks)
    assert len(norms) == 3 * BATCHES


class Manual(SparsityMixin, Toy):
    """Two optimizers, stepped by hand, the second every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        layers = list(self.net.children())
        early = [p for layer in layers[:4] for p in layer.parameters()]
        late = [p for layer in layers[4:] for p in layer.parameters()]
        return torch.optim.SGD(early, lr=0.05, momentum=0.9), torch.optim.AdamW(late, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.optimizers()
        loss = self.loss(batch) + self.sparsity_penalty()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2 == 0:
            second.step()
        return loss.detach()


@pytest.mark.filterwarnings("ignore:.*has removed all of")  # the large layer, whose optimizer steps half as often
def test_manual_optimization_with_two_optimizers(path: Path) -> None:
    callbacks = overlay(path)
    method = method_of(callbacks)
    module = Manual()
    fit(module, Watcher(lambda moment, observed: _assert_zeros(method, observed, moment)), *callbacks)
    assert on_target(method)


class Tied(Toy):
    """One weight in two layers, built in `configure_model`."""

    def __init__(self) -> None:
        super().__init__(net=nn.Identity())

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = toys.network()
            extra = nn.Linear(16, 16)
            extra.weight = nn.Parameter(extra.weight.detach())
            twin = nn.Linear(16, 16)
            twin.weight = extra.weight
            self.net = nn.Sequential(*list(self.net)[:8], extra, twin, *list(self.net)[8:])


@pytest.mark.filterwarnings("ignore:.*has removed all of")  # nine of ten weights of a tiny network of five layers
def test_tied_weights_of_a_model_built_late(path: Path) -> None:
    callbacks = overlay(path)
    method = method_of(callbacks)
    module = Tied()
    fit(module, *callbacks)
    assert zeros_hold(method, module)
    if method.mask_set is not None:
        assert "net.8.weight" in method.mask_set
        assert "net.9.weight" not in method.mask_set
    assert on_target(method)


def test_compiled_equals_plain(path: Path) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        callbacks, module = overlay(path), toy()
        method = method_of(callbacks)
        fit(torch.compile(module, backend="eager") if compiled else module, *callbacks)  # type: ignore[arg-type]
        assert zeros_hold(method, module)
        assert on_target(method)
        results.append(dict(module.state_dict()))
    assert not differences(*results)


def nothing_left(module: L.LightningModule, optimizers: list[torch.optim.Optimizer], method: Sparsifier) -> bool:
    hooks = [h for o in optimizers for h in o._optimizer_step_post_hooks.values() if "lightning_sparse" in h.__module__]
    return not hooks and "training_step" not in vars(module) and method.weights == {} and not method.running


def test_two_fits_with_one_instance(path: Path) -> None:
    callbacks = overlay(path)
    method = method_of(callbacks)
    for seed in (0, 1):
        module = toy(seed=seed)
        runner = fit(module, *callbacks)
        assert method.steps == 3 * BATCHES
        assert on_target(method)
        assert zeros_hold(method, module)
        assert nothing_left(module, runner.optimizers, method)


def test_the_same_trainer_goes_on(path: Path) -> None:
    callbacks = overlay(path)
    method = method_of(callbacks)
    module = toy()
    runner = fit(module, *callbacks)
    masks = masks_of(method).fingerprint()
    runner.fit_loop.max_epochs = 5
    runner.fit(module, loader(), loader(1))
    assert runner.current_epoch == 5
    assert not rests(method) or masks_of(method).fingerprint().equal(masks)
    assert zeros_hold(method, module)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing_behind(path: Path, error: type[BaseException]) -> None:
    class Broken(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == BATCHES + 1:
                raise error
            return self.loss(batch)

    callbacks = overlay(path)
    method = method_of(callbacks)
    module = Broken()
    runner = trainer(*callbacks)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        runner.fit(module, loader(), loader(1))
    assert nothing_left(module, runner.optimizers, method)
    repaired = toy()
    fit(repaired, *callbacks)
    assert zeros_hold(method, repaired)
    assert on_target(method)


def test_survives_pickling_and_copying(path: Path) -> None:
    import pickle

    callbacks = overlay(path)
    fit(toy(), *callbacks)
    method = method_of(callbacks)
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert not differences(method.state_dict(), twin.state_dict())
