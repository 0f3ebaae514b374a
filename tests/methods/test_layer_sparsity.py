"""What layer sparsity promises: testable properties 5 to 7, 9 and 11 of the note, in training."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_sparse import LayerSparsity, merge_layers
from lightning_sparse.core import find_chains, find_targets
from lightning_sparse.data import Teacher
from lightning_sparse.loop import Step
from lightning_sparse.models import MLP, Regressor
from lightning_sparse.testing import BATCHES, Toy, fit, loader, trainer


def deep(seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise([64, 12, 12, 12]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(12, 4)).double()


class Written(Toy):
    """The objective, written out from the note, for autograd: no callback."""

    def __init__(self, net: nn.Sequential, strength: float, decay: float, l1: float, norm: str = "fro") -> None:
        super().__init__(net=net)
        self.strength, self.decay, self.l1, self.norm = strength, decay, l1, norm

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        inner = [(self.net[i].weight, self.net[i].bias) for i in (3, 5)]  # type: ignore[union-attr]
        for pair in inner:
            negative = torch.cat([torch.minimum(t, torch.zeros(())).flatten() for t in pair])  # type: ignore[arg-type]
            value = {"fro": negative.norm, "l1": lambda n=negative: -n.sum(), "fro_sq": lambda n=negative: (n**2).sum()}
            loss = loss + self.strength * value[self.norm]()  # type: ignore[operator]
        weights = [layer.weight for layer in self.net if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
        return loss + sum(self.decay * w.square().sum() + self.l1 * w.abs().sum() for w in weights)


@pytest.mark.parametrize("norm", ["fro", "l1", "fro_sq"])
def test_training_is_that_of_the_written_loss(norm: str) -> None:
    written, ours = Written(deep(), 0.3, 1e-2, 1e-3, norm), Toy(net=deep())
    fit(written)
    fit(ours, LayerSparsity(strength=0.3, scale_decay=1e-2, l1=1e-3, norm=norm))
    for name, value in written.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_proximal_steps_are_a_step_and_then_the_map() -> None:
    """Forward-backward splitting by hand: plain SGD on the loss, soft-threshold, scale the negative part."""
    rate, strength, l1, decay = 0.05, 9.0, 1e-3, 1e-2

    class Plain(Toy):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=rate)

    class ByHand(Plain):
        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                for layer in self.net:  # type: ignore[union-attr]
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(layer.weight.sign() * (layer.weight.abs() - rate * l1).clamp(min=0))
                for layer in (self.net[3], self.net[5]):  # type: ignore[index]
                    pair = [layer.weight, layer.bias]  # type: ignore[union-attr]
                    length = torch.cat([p[p < 0] for p in pair]).norm()  # type: ignore[index]
                    factor = max(0.0, 1 - rate * strength / max(float(length), 1e-300))
                    for p in pair:
                        p.copy_(torch.where(p < 0, factor * p, p))  # type: ignore[operator, arg-type]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weights = [layer.weight for layer in self.net if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
            return self.loss(batch) + sum(decay * w.square().sum() for w in weights)

    hand, ours = ByHand(net=deep()), Plain(net=deep())
    fit(hand)
    method = LayerSparsity(strength=strength, proximal=True, scale_decay=decay, l1=l1)
    fit(ours, method)
    for name, value in hand.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert method.history[-1]["ratios"] == {"net.3": 0.0, "net.5": 0.0}
    assert merge_layers(ours, tolerance=0)[1].merged == ["net.3", "net.5"]


def test_batch_normalization_is_penalized_folded() -> None:
    """One step equals autograd through the folded running statistics."""
    module, twin = Toy(net=deep(norm=True)), Toy(net=deep(norm=True))
    batch = next(iter(loader()))
    seen: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 1 and not seen:
                seen.update({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    runner = trainer(LayerSparsity(strength=0.5, scale_decay=0), Look(), max_steps=2)
    runner.fit(module, DataLoader([batch, batch], batch_size=None), loader(1))  # type: ignore[arg-type]
    loss = twin.loss(batch)
    net: Any = twin.net
    for i in (4, 7):
        linear, norm = net[i], net[i + 1]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight, bias = linear.weight * scale[:, None], norm.bias + scale * (linear.bias - norm.running_mean)
        loss = loss + 0.5 * torch.cat([weight.clamp(max=0).flatten(), bias.clamp(max=0)]).norm()
    loss.backward()
    assert seen
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)


def test_the_first_and_the_last_layer_are_never_penalized() -> None:
    before = deep()
    module = Toy(net=copy.deepcopy(before))
    method = LayerSparsity(strength=0.3, scale_decay=0)
    names: list[str] = []

    class Look(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            names.extend(link.name for link in method.links)

    fit(module, method, Look(), max_epochs=1)
    assert set(names) == {"net.3", "net.5"}
    assert [link.name for link in find_chains(module, (0, 1)).links] == ["net.1", "net.3", "net.5"]


def test_strengths_of_layers_and_a_warm_up() -> None:
    method = LayerSparsity(strength=0.3, layer_strength={"net.5": 0.0}, warmup="6 steps", scale_decay=0)
    plain, ours = Toy(net=deep()), Toy(net=deep())
    seen: list[float] = []

    class Look(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(method.ramp)

    fit(ours, method, Look())
    assert seen == pytest.approx([min(1.0, step / 6) for step in range(1, 3 * BATCHES + 1)])
    fit(plain, LayerSparsity(strength=0.0, scale_decay=0))
    reference = Toy(net=deep())
    fit(reference)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), reference.parameters(), strict=True))
    assert not torch.equal(ours.net[3].weight, reference.net[3].weight)  # type: ignore[index]


def test_what_is_logged_and_remembered() -> None:
    method = LayerSparsity(strength=0.3)
    runner = fit(Toy(net=deep()), method)
    logged = runner.logged_metrics
    assert {"LayerSparsity/ratio/net.3", "LayerSparsity/ratio/net.5"} < set(logged)
    assert float(logged["LayerSparsity/active layers"]) == 2
    assert float(logged["LayerSparsity/penalty"]) > 0
    assert [entry["epoch"] for entry in method.history] == [0, 1, 2, 3]
    assert all(0 < ratio < 1 for entry in method.history for ratio in entry["ratios"].values())


@pytest.mark.parametrize(
    ("tolerance", "sentence"),
    [
        (1e-9, "0 of 2 layers that may merge are linear to 1e-09; none can be"),
        (0.999, "2 of 2 layers that may merge are linear to 0.999; lightning_sparse.merge"),
    ],
)
def test_what_can_be_merged_is_said(tolerance: float, sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Toy(net=deep()), LayerSparsity(strength=0.3, tolerance=tolerance), max_epochs=1)
    assert sentence in caplog.text


def test_a_collapsed_network_is_a_warning() -> None:
    module = Toy(net=deep())
    module.net[3].weight.data.mul_(1e-9)  # type: ignore[index, union-attr, operator]
    with pytest.warns(
        UserWarning, match=r"the weights of \['net\.3'\] are almost zero: the signal is cut off, the layer is"
    ):
        fit(module, LayerSparsity(strength=0.0, layer_strength={"net.5": 0.1}), limit_train_batches=1, max_epochs=1)


def student(seed: int) -> Regressor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Regressor(lambda *shape: MLP(*shape, hidden=[20] * 4, kaiming=True))


def test_a_deep_network_becomes_shallow_and_is_refitted() -> None:
    """Property 11, and the structure of property 9; nothing is asserted of the refit's error."""
    data = Teacher(depth=5, passes=100, seed=0)
    quiet = {"limit_val_batches": 0, "max_epochs": 5}
    depths, modules = [], []
    for strength in (0.0, 1.0):
        module, runner = student(0), trainer(LayerSparsity(strength=strength), **quiet)
        runner.fit(module, data)
        x, y = data.parts["test"]
        merged, report = merge_layers(module, x, rounds=0)
        depths.append(report.depth[1])
        modules.append(merged)
        assert not report.collapsed
        with torch.no_grad():
            errors = [float(F.mse_loss(net(x), y)) for net in (module, merged)]
        assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert depths[1] < depths[0] == 5
    assert report.depth[1] == 2 + sum(v.level == "active" and v.ratio is not None for v in report.layers)
    refit = modules[1].train()
    assert isinstance(refit, Regressor)
    hidden = [layer.out_features for layer in refit.network if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    assert hidden == [20] * (depths[1] - 1) + [1]
    trainer(LayerSparsity(strength=0.0), max_epochs=1, limit_val_batches=0).fit(refit, data)
    assert merge_layers(refit)[1].depth[0] == depths[1]


def test_gradients_that_carry_a_scale_get_the_penalty_at_that_scale() -> None:
    layer = nn.Linear(4, 3)
    method = LayerSparsity(strength=0.0, scale_decay=0.25)
    method.chosen = find_targets(layer)
    layer.weight.grad = torch.zeros(3, 4)
    step = Step(torch.optim.SGD(layer.parameters()), {"weight": layer.weight}, gradient_scale=torch.tensor(8.0))
    with torch.no_grad():
        step.add_gradients(method.weight_penalty(step))
    assert layer.weight.grad.equal(4 * layer.weight)
