"""Dense weights behind a sparse model: the same training as with the mask written into the network."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_sparse.core import LiveMasks
from lightning_sparse.families import ShadowWeights
from lightning_sparse.loop import Step
from lightning_sparse.testing import BATCHES, Toy, Watcher, fit, loader, network, toy
from tests.helpers.steps import SkippedSteps


def wave(dense: Tensor) -> Tensor:
    return (60 * dense).sin() > -0.5


class Bands(ShadowWeights):
    """Shows a weight where its dense value lies in one of many bands: entries come and go as the optimizer moves them."""

    def shown(self, name: str, dense: Tensor) -> Tensor:
        return wave(dense)


class Written(Toy):
    """The same mask in the graph."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        masked = {n: p * wave(p) if p.ndim > 1 else p for n, p in self.net.named_parameters()}
        return F.cross_entropy(functional_call(self.net, masked, x.to(next(self.parameters()).dtype)), y)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_mask_in_the_graph(optimizer: str, accumulate: int) -> None:
    written, module, method = Written(optimizer, network(dropout=0)), Toy(optimizer, network(dropout=0)), Bands()
    module.load_state_dict(written.state_dict())
    returned = torch.zeros(())
    torch.manual_seed(0)

    class Regrowth(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            self.before = {name: weight == 0 for name, weight in method.weights.items()}

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            for name, weight in method.weights.items():
                returned.add_((self.before[name] & (weight != 0)).sum())

    fit(written, accumulate_grad_batches=accumulate)
    torch.manual_seed(0)  # the same order of the data
    fit(module, method, Regrowth(), accumulate_grad_batches=accumulate)
    for name, dense in written.named_parameters():
        weight = dict(module.named_parameters())[name]
        if dense.ndim > 1:
            assert weight.equal(torch.where(wave(dense), dense, 0.0)), name
            assert (weight + method.hidden[name]).equal(dense), name
            assert 0.1 < float((weight == 0).float().mean()) < 0.9
        else:
            assert weight.equal(dense)
    assert returned > 0


def test_after_a_skipped_step_every_callback_sees_masked_weights() -> None:
    method, seen = Bands(), []

    class Early(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            hidden = [method.hidden[name] != 0 for name in method.weights]
            shown = [weight != 0 for weight in method.weights.values()]
            seen.append(not any((h & s).any() for h, s in zip(hidden, shown, strict=True)) and any(h.any() for h in hidden))

    runner = fit(toy(), Early(), method, plugins=[SkippedSteps({2})], max_epochs=1)
    assert seen == [True] * BATCHES
    assert "optimizer_step" not in vars(runner.strategy)


def test_a_skipped_step_leaves_no_trace() -> None:
    method = Bands()
    states: list[list[Tensor]] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            states.append([value.detach().clone() for value in (*method.weights.values(), *method.hidden.values())])

    fit(toy(), method, Note(), plugins=[SkippedSteps({2})], max_epochs=1)
    assert [all(a.equal(b) for a, b in zip(states[i], states[i + 1], strict=True)) for i in range(3)] == [False, True, False]


class Overwriting(Bands):
    """Uses the room that the hidden weights leave free during a step."""

    def before_step(self, step: Step) -> None:
        super().before_step(step)
        for name in step.weights:
            self.hidden[name].fill_(torch.nan)


def test_hidden_is_free_during_a_step() -> None:
    plain, method = toy(), Overwriting()
    module = toy()
    torch.manual_seed(0)
    fit(plain, Bands(), plugins=[SkippedSteps({3, 7})])
    torch.manual_seed(0)
    fit(module, method, plugins=[SkippedSteps({3, 7})])
    assert all(a.equal(b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert all(hidden.isfinite().all() for hidden in method.hidden.values())


def test_kept_weights_that_others_change_are_honored() -> None:
    method = Bands(targets=["net.6"])

    class Limit(L.Callback):
        """As weight clipping does, between steps."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            with torch.no_grad():
                pl_module.net[6].weight.clamp_(max=0.01)

    class Idle(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Idle()
    fit(module, Limit(), method)
    assert float(module.net[6].weight.detach().max()) == pytest.approx(0.01)
    assert (method.hidden["net.6.weight"] != 0).equal(module.net[6].weight == 0)


def test_an_interruption_between_the_halves_of_a_step_leaves_a_sparse_model() -> None:
    class Broken(Toy):
        def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
            if self.trainer.global_step == BATCHES:
                assert not any(bool(wave(weight).all()) for weight in method.weights.values())
                raise RuntimeError("in the middle")

    module, method = Broken(), Bands()
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(module, method)
    for weight, hidden in zip(_weights(module), method.hidden.values(), strict=True):
        assert wave(weight).all()
        assert (hidden != 0).equal(weight == 0)


def test_low_precision_weights_hide_without_loss() -> None:
    method = Bands()

    def look(moment: str, observed: L.LightningModule) -> None:
        for name, weight in method.weights.items():
            dense = weight.float() + method.hidden[name]
            assert dense.equal(dense.bfloat16().float())
            assert method.hidden[name].dtype == torch.float32
            assert (weight == 0).equal(~wave(dense.bfloat16()))

    fit(toy(), Watcher(look), method, precision="bf16-true")


def test_a_model_that_was_changed_between_two_fits_counts() -> None:
    module, method = toy(), Bands()
    runner = fit(module, method)
    other = toy(seed=5)
    module.load_state_dict(other.state_dict())
    seen: list[bool] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            if not seen:
                for (name, weight), loaded in zip(method.weights.items(), _weights(other), strict=True):
                    seen.append((weight + method.hidden[name]).equal(loaded) and bool(wave(weight).all()))

    runner.callbacks.append(Note())  # type: ignore[attr-defined]
    runner.fit_loop.max_epochs = 4
    runner.fit(module, loader(), loader(1))
    assert seen == [True] * 4


def _weights(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.ndim > 1]


def test_masks_that_follow_variables() -> None:
    variables = {"a": torch.tensor([[0.5, -0.5], [0.0, 1.0]]), "b": torch.tensor([1.0])}
    masks = LiveMasks(variables)
    assert masks.counts == {"a": 2, "b": 1}
    assert (masks.kept, masks.total, masks.numel("a"), list(masks), len(masks)) == (3, 5, 4, ["a", "b"], 2)
    assert masks["a"].tolist() == [[True, False], [False, True]]
    before = masks.fingerprint()
    variables["a"][1, 0] = 1e-30
    assert masks.kept == 4
    assert not masks.dropped("a")[1, 0]
    assert (masks.fingerprint() == before).tolist() == [False, True]
    assert LiveMasks({}).kept == LiveMasks({}).total == 0
