"""Every bad input at the start of fit: one clear sentence that names what was given and what to do; nothing is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

from lightning_sparse import (
    ACDC,
    SET,
    SNIP,
    SRSTE,
    CKARegularization,
    GraNet,
    GraSP,
    HyperSparse,
    LayerSparsity,
    LotteryTicket,
    LpSphere,
    MagnitudePruning,
    QuantizationAware,
    RandomSparsity,
    RigL,
    WeightPenalty,
)
from lightning_sparse import SparseConnectivityLearning as SCL
from lightning_sparse.core import find_targets
from lightning_sparse.testing import Toy, fit, loader, toy, trainer


class Frozen(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.requires_grad_(False)


class HalfOptimized(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)


class SecondOrder(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


class Averaging(torch.optim.SGD):
    """Switches the weights, as the optimizers of schedulefree do."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


class Averaged(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Averaging(self.parameters(), lr=0.1)


class HalfStepping(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        rest = {"params": list(self.net[2:].parameters())}
        return torch.optim.SGD([{"params": list(self.net[0].parameters()), "lr": 0.0}, rest], lr=0.1)


class Normalized(Toy):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.net[6])


class Embedded(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4, sparse=True)


class Upsampling(Toy):
    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 4)))


class Narrow(Toy):
    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(256, 4)))


class Six(Toy):
    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4)))


class Diverged(Toy):
    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.net[6].weight, torch.nan)


class Normed(Toy):
    def __init__(self) -> None:
        layers = [nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)]
        super().__init__(net=nn.Sequential(*layers))


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.flatten(1))
            x = x.relu() if x.sum() > 0 else x
        return x


class Untraceable(Toy):
    def __init__(self) -> None:
        super().__init__(net=Dynamic())


AT_START: list[tuple[Callable[[], L.LightningModule], Callable[[], list[L.Callback]], dict[str, Any], str]] = [
    (
        toy,
        lambda: [MagnitudePruning(0.5, targets=["head"])],
        {},
        "'head' matches nothing in the model; write such as 'net.0.weight' or 'type:Conv2d'.",
    ),
    (toy, lambda: [MagnitudePruning(0.5, targets=["*", "!re:net"])], {}, "chooses no weight of Toy"),
    (
        Frozen,
        lambda: [MagnitudePruning(0.5, targets=["net.0", "net.2"])],
        {},
        "'net.0' chooses nothing that can be used: 'net.0.weight' (Conv2d) is frozen (requires_grad=False); unfreeze it",
    ),
    (HalfOptimized, lambda: [MagnitudePruning(0.5)], {}, "no optimizer updates 'net.2.weight'"),
    (SecondOrder, lambda: [MagnitudePruning(0.5)], {}, "does not work with LBFGS"),
    (
        Averaged,
        lambda: [LpSphere(0.5, p=1.5)],
        {},
        "LpSphere does not work with Averaging, whose train() and eval()",
    ),
    (
        Averaged,
        lambda: [SCL(0.8)],
        {},
        "SparseConnectivityLearning does not work with Averaging, whose train() and eval() mix",
    ),
    (
        Averaged,
        lambda: [SRSTE(structure="2:4", targets=["!:first"])],
        {},
        "SRSTE does not work with Averaging, whose train()",
    ),
    (
        Averaged,
        lambda: [QuantizationAware()],
        {},
        "QuantizationAware does not work with Averaging, whose train() and eval()",
    ),
    (Averaged, lambda: [ACDC(0.8)], {}, "ACDC does not work with Averaging, which averages the weights of all phases"),
    (
        toy,
        lambda: [ACDC(0.8)],
        {"fast_dev_run": True},
        "fast_dev_run=True makes the run too short; for a trial run, set max_",
    ),
    (
        toy,
        lambda: [HyperSparse(0.8)],
        {"fast_dev_run": 2},
        "fast_dev_run=2 makes the run too short; for a trial run, set max_",
    ),
    (
        toy,
        lambda: [LotteryTicket(0.8)],
        {"fast_dev_run": True},
        "fast_dev_run=True makes the run too short; for a trial run,",
    ),
    (Normalized, lambda: [MagnitudePruning(0.5)], {}, "'net.6' (ParametrizedLinear) is computed by a parametrization"),
    (
        toy,
        lambda: [MagnitudePruning(structure="2:4", targets=["net.0", "net.6"])],
        {},
        "'net.0.weight' (Conv2d) has 1 input, and structure='2:4' needs groups of 4; take another structure, or choose",
    ),
    (
        toy,
        lambda: [MagnitudePruning(0.999, structure="coupled", budget="macs")],
        {},
        "macs cannot be reached: with the fewest channels in every layer",
    ),
    (
        Six,
        lambda: [MagnitudePruning(0.5, structure="block:4x4", targets=["net.1"])],
        {},
        "is 6 by 64 (outputs by inputs), which blocks of 4 by 4 do not divide",
    ),
    (
        toy,
        lambda: [SRSTE(structure="2:4", targets=["net.0"])],
        {},
        "'net.0.weight' (Conv2d) has 1 input, and structure='2:4' needs groups of 4",
    ),
    (
        Six,
        lambda: [SRSTE(structure="transposable 2:4", targets=["net.1"])],
        {},
        "has 6 outputs, and structure='transposable 2:4' needs groups of 4 of them too",
    ),
    (toy, lambda: [MagnitudePruning(0.5, end="9 epochs")], {}, "end='9 epochs' is after the end of training (3 epochs)"),
    (toy, lambda: [MagnitudePruning(0.5, end="99 steps")], {}, "end='99 steps' is after the end of training (12 steps)"),
    (toy, lambda: [MagnitudePruning(0.5)], {"max_epochs": -1}, "The length of this run is unknown"),
    (toy, lambda: [ACDC(0.5)], {"max_epochs": -1}, "The length of this run is unknown, so phases cannot be scheduled"),
    (
        toy,
        lambda: [ACDC(0.5)],
        {},
        "every='0.05' leaves a phase less than one of the run's 12 steps; make it longer",
    ),
    (
        toy,
        lambda: [ACDC(0.5, every=0.1, end="12 steps")],
        {},
        "end='12 steps' leaves the last compressed phase less than one of the run's 12 steps",
    ),
    (
        toy,
        lambda: [ACDC(0.5, start=0.5, every=0.3, last_dense=0.2)],
        {},
        "leave no room for a compressed phase before the last dense one; start earlier, or use shorter phases",
    ),
    (toy, lambda: [RandomSparsity(0.999, allocation="uniform")], {}, "leaves nothing of 'net.0.weight' (72 units)"),
    (
        toy,
        lambda: [RandomSparsity(0.99, allocation="erk+")],
        {},
        "layers whose sparsity is fixed, by layer_sparsity or by the allocation, keep",
    ),
    (
        toy,
        lambda: [MagnitudePruning(0.9, layer_sparsity={"net.6": 0.0})],
        {},
        "layer_sparsity keeps 2,048 and the other layers hold 712",
    ),
    (toy, lambda: [MagnitudePruning(0.9, layer_sparsity={"*.net": 0.0})], {}, "); write 'net'."),
    (toy, lambda: [MagnitudePruning(0.9, layer_sparsity={"fc": 0.0})], {}, "'fc' matches none of the chosen weights"),
    (
        toy,
        lambda: [MagnitudePruning(0.5, targets=["net.6", "net.8"]), RandomSparsity(0.5, targets=["net.8"])],
        {},
        "MagnitudePruning and RandomSparsity both own masks of 'net.8.weight'",
    ),
    (toy, lambda: [MagnitudePruning(0.5), ModelPruning("l1_unstructured")], {}, "cannot share a Trainer with ModelPruning"),
    (toy, lambda: [MagnitudePruning(0.5, targets=[5])], {}, "targets: 5 is not a pattern"),
    (toy, lambda: [MagnitudePruning(0.5)], {"max_epochs": 0}, "max_epochs=0 trains nothing; give a number >= 1."),
    (toy, lambda: [MagnitudePruning(0.5)], {"max_steps": 0}, "max_steps=0 trains nothing; give a number >= 1"),
    (toy, lambda: [RandomSparsity(0.5)], {"limit_train_batches": 0}, "has nothing to train on: the training set yields no"),
    (toy, lambda: [RandomSparsity(0.5)], {"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 must be a number >= 1"),
    (toy, lambda: [SNIP(0.5, batches=10**9)], {}, "batches=1000000000 is more than an epoch has; write at most 4."),
    (Embedded, lambda: [MagnitudePruning(0.5, targets=["type:Embedding"])], {}, "make the layer with sparse=False"),
    (toy, lambda: [MagnitudePruning(0.9999)], {}, "sparsity=0.9999 of 2,760 units leaves nothing"),
    (toy, lambda: [CKARegularization(layers=["net.9"])], {}, "layers: 'net.9' matches no layer; did you mean 'net.8'?"),
    (
        toy,
        lambda: [CKARegularization(layers=["net.1"])],
        {},
        "Toy has 1 layer ('net.1') to compare, but it takes two",
    ),
    (toy, lambda: [CKARegularization(groups={"a": ["net.1"]})], {}, "groups['a']=['net.1'] has 1 layer, but it takes two"),
    (
        toy,
        lambda: [CKARegularization(pairs="stage")],
        {},
        "No group has two layers whose outputs were seen in training mode",
    ),
    (toy, lambda: [HyperSparse(0.9)], {"max_epochs": 2}, "HyperSparse needs 3 epochs (pretrain 1, regularize 1, finetune"),
    (
        toy,
        lambda: [HyperSparse(0.9, finetune="9 epochs")],
        {"max_epochs": 10},
        "(pretrain 2, regularize 4, finetune 9), but training ends after 10; shorten the phases or raise max_epochs, or set",
    ),
    (toy, lambda: [HyperSparse(0.9)], {"max_epochs": -1}, "pretrain=0.2 is a fraction of a run without a length"),
    (toy, lambda: [HyperSparse(0.9999)], {}, "sparsity=0.9999 of 2,760 weights leaves nothing"),
    (toy, lambda: [RigL(0.9, every="9 epochs")], {}, "every='9 epochs' leaves no update between 0% and"),
    (toy, lambda: [SET(0.9, every="99 steps")], {}, "of a training of 3 epochs or 12 steps; choose a shorter interval"),
    (toy, lambda: [RigL(0.9, every=0.8)], {}, "every=0.8 leaves no update between"),
    (toy, lambda: [RigL(0.9, start=0.5, end="1 epoch")], {}, "start='0.5' is after end='1 epochs'"),
    (toy, lambda: [RigL(0.999, allocation="uniform")], {}, "leaves nothing of 'net.0.weight' (72 units)"),
    (
        toy,
        lambda: [SET(0.99, allocation="erk+")],
        {},
        "layers whose sparsity is fixed, by layer_sparsity or by the allocation, keep",
    ),
    (
        toy,
        lambda: [RigL(structure="2:4", targets=["net.0"])],
        {},
        "'net.0.weight' (Conv2d) has 1 input, and structure='2:4'",
    ),
    (toy, lambda: [GraNet(0.9, end="9 epochs")], {}, "end='9 epochs' is after the end of training"),
    (
        toy,
        lambda: [GraNet(0.9, start=0.6)],
        {},
        "end=0.5 is 50% of the run as originally planned, but updates start at 60%",
    ),
    (toy, lambda: [GraNet(0.9, rewiring_end=0.4)], {}, "but updates start at 0% and stop at 40%; move it between them"),
    (toy, lambda: [GraNet(0.99, initial_sparsity=0.98, initial_allocation="erk+")], {}, "keep"),
    (
        toy,
        lambda: [LpSphere(p=[1.2, 1.3])],
        {},
        "p lists 2 values for 3 constrained weights (net.0.weight, net.2",
    ),
    (toy, lambda: [LpSphere(p={"net.1": 1.2})], {}, "p: the glob 'net.1' matches none of the constrained weights"),
    (toy, lambda: [LpSphere(p={"net.0": 1.2})], {}, "has no entry for 'net.2.weight'; add '*' for all others"),
    (Upsampling, lambda: [LpSphere(p=1.2)], {}, "'net.0.weight' is a grouped transposed convolution"),
    (Narrow, lambda: [LpSphere(p=1.2)], {}, "'net.0.weight' has outputs of a single entry"),
    (toy, lambda: [LpSphere(p=1.2)], {"max_epochs": -1}, "The length of this run is unknown, so eta has no schedule"),
    (toy, lambda: [LpSphere(p=1.2, sparsity=0.9, end="9 epochs")], {}, "end='9 epochs' is after the end of training"),
    (toy, lambda: [LpSphere(p=1.2, sparsity=0.99, of_all_parameters=True)], {}, "sparsity=0.99 of 2,796 leaves nothing"),
    (
        toy,
        lambda: [LpSphere(p=1.2), LpSphere(p=1.3, name="b")],
        {},
        "LpSphere moves 'net.0.weight' itself, so LpSphere(name",
    ),
    (
        lambda: toy(net=nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))),
        lambda: [LayerSparsity()],
        {},
        "'net.0': GELU between it and the next layer is not linear, or cannot be merged across; 'net.2': GELU",
    ),
    (Normed, lambda: [LayerSparsity(proximal=True)], {}, "no closed form for 'net.3', a layer with batch normalization"),
    (toy, lambda: [LayerSparsity(layer_strength={"net.0": 1.0})], {}, "'net.0' matches none of the layers that may merge"),
    (toy, lambda: [LayerSparsity(targets=["!net.6"])], {}, "'net.0': the next layer pads between the two"),
    (toy, lambda: [LayerSparsity(warmup="9 epochs")], {}, "warmup='9 epochs' is after the end of training"),
    (Untraceable, lambda: [LayerSparsity()], {}, "'net.layers.0': Dynamic cannot be traced (symbolically traced"),
    (
        toy,
        lambda: [LotteryTicket(0.5)],
        {"max_epochs": -1},
        "The length of this run is unknown, so rounds cannot be scheduled",
    ),
    (
        toy,
        lambda: [LotteryTicket(0.5, rounds=12)],
        {},
        "rounds=12 leave less than one of the run's 12 steps to each training",
    ),
    (toy, lambda: [LotteryTicket(0.5, rewind_to="12 steps")], {}, "rewind_to='12 steps' is the end of training"),
    (toy, lambda: [LotteryTicket(0.5, rewind_to="9 epochs")], {}, "rewind_to='9 epochs' is after the end of training (3"),
    (toy, lambda: [LotteryTicket(0.5, every="2 epochs")], {}, "rounds=4 need 5 trainings of every='2 epochs'"),
    (
        toy,
        lambda: [WeightPenalty(proximal=True)],
        {},
        "zeros that last only as long as the penalty, but end=0.8 is before the",
    ),
    (toy, lambda: [WeightPenalty(0.5)], {"max_epochs": -1}, "The length of this run is unknown"),
    (toy, lambda: [WeightPenalty(end="9 epochs")], {}, "end='9 epochs' is after the end of training (3 epochs)"),
    (Diverged, lambda: [MagnitudePruning(0.5, start=0, end=0)], {}, "'net.6.weight': not finite (NaN or infinite)"),
    (HalfOptimized, lambda: [SCL(price=0.05)], {}, "no optimizer updates 'net.2.weight'"),
    (
        HalfStepping,
        lambda: [SCL(price=0.05)],
        {},
        "the optimizer does not step 'net.0.weight', whose learning rate is 0; set",
    ),
    (toy, lambda: [SCL(price=0.05, min_kept=65)], {}, "min_kept=65 is more than 'net.8.weight' has (64)"),
    (
        toy,
        lambda: [SCL(sparsity=0.99, min_kept=8)],
        {},
        "sparsity=0.99 keeps 28 connections, fewer than min_kept=8 in each of 4",
    ),
    (toy, lambda: [SCL(sparsity=0.9, end="9 epochs")], {}, "end='9 epochs' is after the end of training (3 epochs)"),
    (toy, lambda: [SCL(price=0.05, warmup="99 steps")], {}, "warmup='99 steps' is after the end of training (12 steps)"),
    (toy, lambda: [SCL(price=0.05, end=0.5)], {"max_epochs": -1}, "The length of this run is unknown"),
    (
        toy,
        lambda: [SCL(price=0.05, targets=["net.6"]), MagnitudePruning(0.5, targets=["net.6"])],
        {},
        "SparseConnectivityLearning and MagnitudePruning both own masks of 'net.6.weight'",
    ),
]


@pytest.mark.parametrize(("make", "callbacks", "options", "sentence"), AT_START, ids=[row[-1][:45] for row in AT_START])
def test_at_the_start_of_fit(
    make: Callable[[], L.LightningModule], callbacks: Callable[[], list[L.Callback]], options: dict[str, Any], sentence: str
) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    runner = trainer(*callbacks(), **options)
    with pytest.raises(ValueError, match=".") as error:
        runner.fit(module, loader(), loader(1))
    assert sentence in str(error.value)
    assert runner.global_step == 0
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) or value.isnan().any(), "something was half applied"
    assert not any(
        "lightning_sparse" in h.__module__ for o in runner.optimizers for h in o._optimizer_step_post_hooks.values()
    )


FLAT = "flattens weights into pieces without rows; use ModelParallelStrategy"
SHARDED: list[tuple[str, Callable[[], L.Callback], int, str]] = [
    (
        "FSDPStrategy",
        lambda: MagnitudePruning(0.5),
        1,
        f"MagnitudePruning does not .* which {FLAT}",
    ),
    ("DeepSpeedStrategy", lambda: RigL(0.5), 1, f"RigL does not support strategy=DeepSpeed.* {FLAT}"),
    (
        "ModelParallelStrategy",
        lambda: GraSP(0.5),
        1,
        "GraSP does not support .* whole weights; use 'ddp'",
    ),
    (
        "ModelParallelStrategy",
        lambda: SCL(0.5),
        2,
        "Learning does not support tensor parallelism, where",
    ),
    (
        "ModelParallelStrategy",
        CKARegularization,
        2,
        "CKARegularization does not support tensor parallelism",
    ),
]


@pytest.mark.parametrize(("name", "make", "wide", "sentence"), SHARDED)
def test_sharding_strategies(
    name: str, make: Callable[[], L.Callback], wide: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in, for these strategies need several devices to be made."""
    cls = getattr(L.pytorch.strategies, name)
    runner, strategy = trainer(), cls.__new__(cls)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: wide)}
    monkeypatch.setattr(type(runner), "strategy", property(lambda self: strategy))
    with pytest.raises(ValueError, match=sentence):
        make().setup(runner, toy(), "fit")


RESUMED: list[tuple[Callable[[], L.Callback], Callable[[], L.LightningModule], str]] = [
    (lambda: MagnitudePruning(0.8), toy, "sparsity=0.8 (checkpoint: 0.5)"),
    (lambda: MagnitudePruning(0.5, schedule="linear"), toy, "schedule='linear' (checkpoint: 'cubic')"),
    (lambda: MagnitudePruning(0.5, targets=["!:last"]), toy, "targets=['!:last'] (checkpoint: ['*'])"),
]


@pytest.mark.parametrize(("callback", "make", "sentence"), RESUMED, ids=[row[-1][:30] for row in RESUMED])
def test_resuming_with_another_configuration(
    callback: Callable[[], L.Callback], make: Callable[[], L.LightningModule], sentence: str, tmp_path: Any
) -> None:
    fit(toy(), MagnitudePruning(0.5), ModelCheckpoint(tmp_path, "last"))
    with pytest.raises(ValueError, match="MagnitudePruning resumes with") as error:
        fit(make(), callback(), ckpt_path=tmp_path / "last.ckpt", max_epochs=4)
    assert sentence in str(error.value)
    assert "restore the checkpoint's values, or start a new run" in str(error.value)


def test_resuming_with_other_weights() -> None:
    method = MagnitudePruning(0.5)
    fit(toy(), method)
    method.brought = method.state_dict()
    method.chosen = find_targets(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"MagnitudePruning resumes with weights other than the checkpoint's: .*0.weight"):
        method.check_brought()


def test_two_callbacks_of_one_class_need_names() -> None:
    a, b = MagnitudePruning(0.5, targets=["net.6"], name="a"), MagnitudePruning(0.5, targets=["net.8"], name="b")
    fit(toy(), a, b)
    assert (a.masks.sparsity, b.masks.sparsity) == (0.5, 0.5)
    assert a.state_key != b.state_key
