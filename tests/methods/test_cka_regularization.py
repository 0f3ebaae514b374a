"""CKA-SR as a callback: the right term in the right batches, from the right features, and nothing left behind."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_sparse import CKARegularization, HyperSparse, RandomSparsity, SparsityMixin
from lightning_sparse.data import TensorLoader
from lightning_sparse.functional import linear_cka_matrix, off_diagonal_mean, similarity_penalty
from lightning_sparse.models import MLP
from lightning_sparse.testing import BATCHES, Toy, fit, loader, network, toy, trainer
from tests.helpers.modules import double
from tests.helpers.oracles import slow_cka


class Written(Toy):
    """The loss with the term written out, by the pairwise formula."""

    samples: int | None = 8
    every = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if batch_idx % self.every:
            return loss
        x = batch[0].double()[: self.samples]
        return loss + 2 * 0.5 * slow_cka(self.net[:2](x), self.net[:4](x))


@pytest.mark.parametrize(("samples", "every"), [(8, 1), (5, 2), (None, 3)])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=["plain", "acc", "clip"]
)
def test_equals_the_term_in_the_loss(samples: int | None, every: int, options: dict[str, Any]) -> None:
    """Also that an accumulated step sees the mean of the terms of its batches, and that k counts batches of an epoch."""
    expected, module = double(Written), double(Toy)
    expected.samples, expected.every = samples, every
    plain = double(Toy)
    fit(expected, **options)
    fit(module, CKARegularization(strength=0.5, samples=samples, every_n_batches=every), **options)
    fit(plain, **options)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.allclose(module.net[0].weight, plain.net[0].weight, rtol=1e-3)


class ByHand(SparsityMixin, Toy):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) + self.sparsity_penalty())
        optimizer.step()


def test_manual_optimization() -> None:
    expected, module = double(Written), double(ByHand)
    expected.every = 2
    fit(expected)
    fit(module, CKARegularization(strength=0.5, every_n_batches=2))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_strength_zero_changes_no_bit() -> None:
    results = []
    for extra in ([], [CKARegularization(strength=0)]):
        torch.manual_seed(0)
        module = toy()
        fit(module, RandomSparsity(0.5, seed=0), *extra)
        results.append(module.state_dict())
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


class Silent(ByHand):
    """Never asks for the penalty."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))


@pytest.mark.parametrize("cls", [Toy, ByHand, Silent])
def test_no_feature_outlives_its_step(cls: type[Toy]) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Ends(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            gc.collect()
            alive.append(sum(reference() is not None for reference in seen))

        def on_validation_batch_end(self, *args: Any) -> None:
            alive.append(len(method._tap._seen))

    gc.freeze()  # what is there already is not looked through every time
    module, method = cls(net=network(dropout=0)), CKARegularization(strength=0.1, every_n_batches=1)
    handle = module.net[1].register_forward_hook(lambda m, i, output: seen.append(weakref.ref(output)))
    fit(module, method, Ends(), val_check_interval=2)
    handle.remove()
    gc.unfreeze()
    assert len(seen) > 3 * BATCHES
    assert not any(alive)
    assert method._tap is None
    assert not any(m._forward_hooks for m in module.modules())


def test_a_copy_of_the_model_is_not_seen() -> None:
    """HyperSparse tries out a copy in the middle of training; a copy run inside the step is not seen either."""
    import copy

    class Doubled(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            copy.deepcopy(self.net)(3 - batch[0])
            return loss

    results = []
    for cls in (Toy, Doubled):
        module = cls(net=network(dropout=0))
        module.load_state_dict(toy().state_dict())
        fit(module, HyperSparse(0.5), CKARegularization(strength=0.5, every_n_batches=1))
        results.append(module.state_dict())
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


class Layered(Toy):
    """Three hidden layers of one size, called through `around`."""

    around: Callable[..., Tensor] = staticmethod(lambda layer, x: layer(x))

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *[nn.Linear(16, 16) for _ in range(3)]))
        self.head = nn.Linear(16, 4)

    def loss(self, batch: Any) -> Tensor:
        x = batch[0]
        for layer in self.net:
            x = self.around(layer, x).tanh() if isinstance(layer, nn.Linear) else layer(x)
        return nn.functional.cross_entropy(self.head(x), batch[1])


def layered(cls: type[Layered] = Layered) -> Layered:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls()


def test_beside_gradient_checkpointing() -> None:
    class Checkpointed(Layered):
        around = staticmethod(lambda layer, x: checkpoint(layer, x, use_reentrant=False))

    modules = [layered(), layered(Checkpointed)]
    for module in modules:
        fit(module, CKARegularization(strength=0.5, every_n_batches=1))
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], value)


def test_checkpointing_that_hides_the_features_is_refused() -> None:
    class Hidden(Layered):
        around = staticmethod(lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True))

    module, runner = layered(Hidden), trainer(CKARegularization(strength=0.5))
    with pytest.raises(ValueError, match=r"do not run layers under torch.no_grad, and do not checkpoint them"):
        runner.fit(module, loader(), loader(1))
    assert runner.global_step == 0
    assert not any(m._forward_hooks for m in module.modules())


class Compiled(Toy):
    """A network that is compiled in one of the ways there are.

    Args:
        way: what is compiled.
        run_before: whether it has been run before the fit, so that there is a graph that knows nothing of the hooks.
    """

    def __init__(self, way: str, run_before: bool) -> None:
        super().__init__(net=network(dropout=0))
        self.load_state_dict(toy().state_dict())
        run: Any = self.net
        if way == "in place":
            self.net.compile(backend="eager")
        elif way == "wrapped":
            run = torch.compile(self.net, backend="eager")
        else:
            run = torch.compile(lambda x: self.net(x), backend="eager")
        self.hidden = [run]  # no part of the module, so nothing of it shows in its names
        if run_before:
            run(torch.ones(8, 1, 8, 8)).sum().backward()
            self.zero_grad()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.hidden[0](batch[0]), batch[1])


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("way", ["in place", "wrapped", "a function"])
def test_a_compiled_network(way: str, run_before: bool) -> None:
    """Run before, its graph knows nothing of the hooks, and is made anew."""
    torch.compiler.reset()
    plain, module = Toy(net=network(dropout=0)), Compiled(way, run_before)
    plain.load_state_dict(toy().state_dict())
    for each in (plain, module):
        fit(each, CKARegularization(strength=0.5, every_n_batches=2))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_tied_layers_contribute_their_last_output() -> None:
    class Tied(Toy):
        def __init__(self) -> None:
            super().__init__(net=nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()))
            self.again, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def loss(self, batch: Any) -> Tensor:
            first = self.again(self.net(batch[0]))
            self.seen = [self.net(batch[0]), self.again(first)]
            return nn.functional.cross_entropy(self.head(self.seen[1]), batch[1])

    terms = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            expected = linear_cka_matrix([feature.detach() for feature in pl_module.seen])
            terms.append((off_diagonal_mean(method._similarities), off_diagonal_mean([expected])))

    method = CKARegularization(strength=0.5, every_n_batches=1)
    fit(Tied(), method, Look(), max_epochs=1)
    assert len(terms) == BATCHES
    assert all(float(mine) == pytest.approx(float(expected), abs=1e-6) for mine, expected in terms)


def test_a_network_of_zeros_trains_on() -> None:
    module = toy()
    nn.init.zeros_(module.net[0].weight)
    nn.init.zeros_(module.net[0].bias)
    fit(module, CKARegularization(strength=10.0, every_n_batches=1), detect_anomaly=True)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_small_batches_are_left_out_with_one_warning() -> None:
    modules = [toy(), toy()]
    with pytest.warns(UserWarning, match=r"skips batches of fewer than 4 samples \(this one has 2\)") as caught:
        fit(modules[0], CKARegularization(strength=10.0, every_n_batches=1), batch_size=2)
    assert len([w for w in caught if "skips batches" in str(w.message)]) == 1
    torch.manual_seed(0)
    results = []
    for extra in ([], [CKARegularization(strength=10.0, every_n_batches=1, unbiased=False)]):
        torch.manual_seed(0)
        module = toy()
        fit(module, *extra, batch_size=2)
        results.append(module.net[0].weight)
    assert not results[0].equal(results[1])  # the biased form has something to say


def test_says_what_is_compared_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        runner = fit(toy(), CKARegularization(strength=0.1))
    [said] = [record.getMessage() for record in caplog.records if "compares" in record.getMessage()]
    assert said.splitlines() == [
        "CKARegularization compares the layers of each group:",
        "group  layer  type  feature",
        "all    net.1  ReLU  8x8x8",
        "all    net.3  ReLU  8x4x4",
    ]
    assert -1 <= float(runner.logged_metrics["CKARegularization/similarity"]) <= 1


def test_groups_weights_and_means() -> None:
    module = layered()
    features: list[Tensor] = []
    for layer in list(module.net)[1:]:
        layer.register_forward_hook(lambda m, i, output: features.append(output.detach()))

    def value(**options: Any) -> tuple[float, list[Tensor]]:
        features.clear()
        method = CKARegularization(strength=2.0, every_n_batches=1, **options)
        penalties = []
        original = method.feature_penalty
        method.feature_penalty = lambda: penalties.append(original()) or penalties[-1]  # type: ignore[method-assign,func-returns-value]
        fit(module, method, max_epochs=1)
        assert penalties[0].dtype == (torch.float64 if options.get("dtype") == "float64" else torch.float32)
        return penalties[0].item(), features[:4]

    total, seen = value(pair_weight=lambda distance: 1 / distance)
    matrix = linear_cka_matrix(seen)
    assert total == pytest.approx(2 * float(similarity_penalty([matrix], lambda distance: 1 / distance)), abs=1e-5)
    total, seen = value(reduction="mean", unbiased=False, samples=None, pairs="all", dtype="float64")
    assert total == pytest.approx(2 * float(off_diagonal_mean([linear_cka_matrix(seen, unbiased=False)])), abs=1e-5)
    total, seen = value(groups={"first": ["net.1", "net.2"], "ends": ["net.1", "net.4"]}, pair_weight="adjacent")
    matrix = linear_cka_matrix(seen)
    assert total == pytest.approx(2 * 3 * 2 * float(matrix[0, 1] + matrix[0, 3]), abs=1e-5)


def test_a_term_in_16_bits_is_wide() -> None:
    kinds = set()

    class Look(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            kinds.add(method._similarities[0].dtype)

    method = CKARegularization(strength=0.1, every_n_batches=1)
    fit(toy(), method, Look(), precision="bf16-mixed", max_epochs=1)
    assert kinds == {torch.float32}


def test_features_of_different_samples_are_refused() -> None:
    class Windows(Toy):
        def __init__(self) -> None:
            super().__init__(net=nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4)))

        def loss(self, batch: Any) -> Tensor:
            rows = self.net[0](batch[0].flatten(0, 2))
            return nn.functional.cross_entropy(self.net[1:](rows.view(len(batch[0]), -1)), batch[1])

    runner = trainer(CKARegularization(strength=0.1))
    with pytest.raises(ValueError, match=r"'net.0' and 'net.2' are compared, but their outputs have 64 and 8 samples"):
        runner.fit(Windows(), loader(), loader(1))
    assert runner.global_step == 0


def test_similarity_falls() -> None:
    """What the paper builds on; accuracy and sparsity are for the benchmarks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (1024,), generator=generator)
    centers = torch.randn(10, 64, generator=generator)
    images = (128 + 25 * (centers[labels] + torch.randn(1024, 64, generator=generator))).clamp(0, 255)
    data = images.view(-1, 1, 8, 8).to(torch.uint8)
    half = torch.full((1,), 0.5)
    similarities = []
    for strength in (0.0, 0.1):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = Toy(net=MLP(10, 1, 8, hidden=(48, 48, 48, 48), batch_norm=True))
        train = TensorLoader(data[:896], labels[:896], half, half / 2, 32)
        method = CKARegularization(strength=strength, every_n_batches=1)
        trainer(method, max_epochs=-1, max_steps=80).fit(module, train, loader(1))
        features, x = [], (data[896:].float() / 255 - 0.5) * 4
        module.eval()
        with torch.no_grad():
            for layer in module.net:
                x = layer(x)
                features += [x] if isinstance(layer, nn.ReLU) else []
        similarities.append(float(off_diagonal_mean([linear_cka_matrix(features)])))
    assert similarities[0] - similarities[1] > 0.2, similarities
