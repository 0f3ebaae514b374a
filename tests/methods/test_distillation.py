"""A teacher is a term in the loss: the same training as one in which it is written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import Distillation, MagnitudePruning, SparseGPT
from lightning_sparse.testing import Toy, fit, loader, network, toy, trainer
from tests.helpers.data import DATA, Talkative, run


def plain() -> Toy:
    module = Toy(net=network(dropout=0))
    module.load_state_dict(toy().state_dict())
    return module


def teacher_net(seed: int = 7) -> nn.Sequential:
    net = network(dropout=0.1)  # which must be off when it teaches
    net.load_state_dict(toy(seed=seed).net.state_dict())
    return net


class Written(Toy):
    """The term in the loss, by hand."""

    def __init__(self, teacher: nn.Sequential, strength: float, temperature: float, feature: int | None) -> None:
        super().__init__(net=network(dropout=0))
        self.load_state_dict(plain().state_dict())
        self.others = [teacher.eval()]
        self.strength, self.temperature, self.feature = strength, temperature, feature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, (teacher,) = batch[0], self.others
        t = self.temperature
        with torch.no_grad():
            theirs = teacher(x)
        softened = F.log_softmax(self.net(x) / t, 1), F.log_softmax(theirs / t, 1)
        loss = self.loss(batch) + self.strength * t**2 * F.kl_div(*softened, reduction="batchmean", log_target=True)
        if self.feature is not None:
            loss = loss + 0.3 * F.mse_loss(self.net[: self.feature + 1](x), teacher[: self.feature + 1](x).detach())
        return loss


@pytest.mark.parametrize("feature", [None, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_loss_that_is_written_out(feature: int | None, accumulate: int) -> None:
    net, module = teacher_net(), plain()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    features = None if feature is None else [str(feature)]
    method = Distillation(net, strength=0.7, temperature=3.0, features=features, feature_strength=0.3)
    fit(module, method, accumulate_grad_batches=accumulate)
    reference = Written(teacher_net(), 0.7, 3.0, feature)
    fit(reference, accumulate_grad_batches=accumulate)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert not module.net[8].weight.allclose(fitted_alone().net[8].weight, rtol=1e-2)


def fitted_alone() -> Toy:
    module = plain()
    fit(module)
    return module


def test_the_start_is_what_it_was_before_anything_was_pruned() -> None:
    """Listed behind a method that prunes and moves weights when it begins."""
    module = plain()
    start = copy.deepcopy(module.net)
    method = Distillation("start", strength=0.7, temperature=3.0)
    pruned = SparseGPT(0.5)
    fit(module, pruned, method)
    twin = plain()
    fit(twin, SparseGPT(0.5), Distillation(start, strength=0.7, temperature=3.0))
    for name, value in twin.state_dict().items():
        assert module.state_dict()[name].equal(value)


def weights(module: Toy, path: Path) -> Path:
    torch.save(module.state_dict(), path / "w.pt")
    return path / "w.pt"


def bare(module: Toy, path: Path) -> Path:
    torch.save(module.net.state_dict(), path / "w.pt")
    return path / "w.pt"


def checkpoint(module: Toy, path: Path) -> Path:
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, path / "w.ckpt")
    return path / "w.ckpt"


@pytest.mark.parametrize("save", [weights, bare, checkpoint])
def test_a_file_of_weights(save: Callable[[Toy, Path], Path], tmp_path: Path) -> None:
    taught, other = plain(), plain()
    fit(taught, Distillation(str(save(toy(seed=7), tmp_path))))
    fit(other, Distillation(teacher_net()))
    assert all(value.equal(other.state_dict()[name]) for name, value in taught.state_dict().items())


def test_nothing_of_the_teacher_is_saved_with_the_model(tmp_path: Path) -> None:
    fit(plain(), Distillation(teacher_net()), ModelCheckpoint(tmp_path, "last"))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == toy().state_dict().keys()
    assert saved["callbacks"]["Distillation"]["memory"]["dense"] == {}
    groups = [group["params"] for group in saved["optimizer_states"][0]["param_groups"]]
    assert groups == [list(range(8))]


class Output:
    """As models of transformers put it out."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module, form: str) -> None:
        super().__init__()
        self.inner, self.form = net, form

    def forward(self, pixels: Tensor | None = None) -> Any:
        logits = self.inner(pixels)
        forms = {"object": Output(logits), "dict": {"loss": logits.sum(), "logits": logits}, "tuple": (logits, None)}
        return forms[self.form]


@pytest.mark.parametrize("form", ["object", "dict", "tuple"])
def test_logits_are_found_in_what_a_network_puts_out(form: str) -> None:
    class Named(Toy):
        def loss(self, batch: Any) -> Tensor:
            out = self.net(pixels=batch[0])
            logits = out.logits if form == "object" else out["logits"] if form == "dict" else out[0]
            return F.cross_entropy(logits, batch[1])

    module, other = Named(net=Wrapped(plain().net, form)), plain()
    fit(module, Distillation(Wrapped(teacher_net(), form)))
    fit(other, Distillation(teacher_net()))
    assert module.net.inner[8].weight.equal(other.net[8].weight)


def test_its_terms_are_logged() -> None:
    seen: dict[str, float] = {}

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    fit(plain(), Distillation(teacher_net(), features=["2"]), Look(), max_epochs=1)
    assert {name for name in seen if name.startswith("Distillation/")} == {"Distillation/outputs", "Distillation/features"}


# ---- refusals --------------------------------------------------------------------------------------------------------


class Parts(Toy):
    """Called in pieces, of which none holds all."""

    def __init__(self) -> None:
        super().__init__(net=nn.Identity())
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])


def wide() -> nn.Module:
    net = teacher_net()
    net[8] = nn.Linear(16, 5)
    return net


def other_file(tmp_path: Path) -> str:
    torch.save({**toy().net.state_dict(), "8.weight": torch.ones(5, 16)}, tmp_path / "w.pt")
    return str(tmp_path / "w.pt")


def half_file(tmp_path: Path) -> str:
    torch.save({"0.weight": torch.ones(8, 1, 3, 3)}, tmp_path / "w.pt")
    return str(tmp_path / "w.pt")


Make = Callable[[Path], L.Callback]
REFUSED: list[tuple[Callable[[], Toy], Make, str]] = [
    (
        toy,
        lambda p: Distillation(wide()),
        "the network outputs (8, 4) and the teacher (8, 5), but logits must have equal shapes",
    ),
    (
        toy,
        lambda p: Distillation(teacher_net(), class_dim=1, features={"0": "2"}),
        "layer '0' outputs (8, 8, 8, 8)",
    ),
    (toy, lambda p: Distillation(features=["nine"]), "features: 'nine' is not a layer of the network (Sequential); did you"),
    (
        toy,
        lambda p: Distillation(nn.Flatten(), features=["0"]),
        "'0' is not a layer of the teacher (Flatten); it has no",
    ),
    (toy, lambda p: Distillation(other_file(p)), "w.pt' holds another shape of '8.weight', which the student network"),
    (toy, lambda p: Distillation(half_file(p)), "w.pt' has nothing for '0.bias', which the student network has; give"),
    (toy, lambda p: Distillation(str(p / "no.pt")), "no.pt' is not a file; give a checkpoint"),
    (toy, lambda p: Distillation(network="head"), "Distillation: network='head' is not a submodule of Toy; it has ['net']"),
    (
        Parts,
        lambda p: Distillation(),
        "saw no call of the network 'Parts' in the first batch's training_step; name",
    ),
]


class Begun(L.Callback):
    """Whether a batch has been trained on."""

    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize(("make", "method", "sentence"), REFUSED, ids=[row[-1][:30] for row in REFUSED])
def test_refusals(make: Callable[[], Toy], method: Make, sentence: str, tmp_path: Path) -> None:
    begun = Begun()
    with pytest.raises(ValueError, match=".") as error:
        fit(make(), method(tmp_path), begun)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert begun.batches == 0


def test_a_refusal_leaves_the_teacher_as_it_was() -> None:
    net = wide().train()
    net[0].eval()
    before = [(part.training, len(part._forward_hooks)) for part in net.modules()]
    with pytest.raises(ValueError, match="logits must have equal shapes"):
        fit(toy(), Distillation(net, features=["2"]))
    assert [(part.training, len(part._forward_hooks)) for part in net.modules()] == before
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_data_that_can_be_read_once_are_refused_in_the_first_batch() -> None:
    """A batch to try is a batch that training would not get."""
    begun = Begun()
    with pytest.raises(ValueError, match="logits must have equal shapes"):
        trainer(Distillation(wide()), begun, max_epochs=1).fit(toy(), once(), loader(1))
    assert begun.batches == 1
    trainer(Distillation(teacher_net()), begun, max_epochs=1).fit(toy(), once(), loader(1))
    assert begun.batches == 1 + 4


def once() -> Iterator[Any]:
    yield from loader()


def test_what_cannot_be_copied_is_tried_in_the_first_batch() -> None:
    class Locked(Toy):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    begun = Begun()
    with pytest.raises(ValueError, match="logits must have equal shapes"):
        fit(Locked(), Distillation(wide()), begun)
    assert begun.batches == 1


def test_nobody_notices_the_trial() -> None:
    plain_one, watched = Talkative(), Talkative()
    watched.load_state_dict(plain_one.state_dict())
    data = next(iter(DATA.values()))
    expected, got = (
        run(plain_one, data),
        run(watched, data, Distillation(strength=0.0, features=["0"], feature_strength=1e-30)),
    )
    assert {name for name in got["logged"] if "Distillation" not in name} == {*expected["logged"]}
    assert expected["random"] == got["random"]
    assert all(expected["weights"][name].equal(value) for name, value in got["weights"].items())


def test_a_part_that_is_named() -> None:
    """The teacher pulls at the part: it ends elsewhere than without one, and what is pruned is pruned as without."""
    ends = []
    for teacher in ([], [Distillation(network="head", temperature=1.0)]):
        torch.manual_seed(0)
        module, pruning = Parts(), MagnitudePruning(0.5, targets=["body"])
        fit(module, *teacher, pruning)
        assert pruning.masks.sparsity == 0.5
        ends.append(torch.cat([parameter.detach().flatten() for parameter in module.head.parameters()]))
    assert not ends[0].equal(ends[1])


def test_one_output_has_no_classes() -> None:
    class Regressor(Toy):
        def __init__(self) -> None:
            super().__init__(net=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))

        def loss(self, batch: Any) -> Tensor:
            return self.net(batch[0]).square().mean()

    with pytest.raises(ValueError, match=r"outputs of shape \(8, 1\) have a single class in class_dim=-1"):
        fit(Regressor(), Distillation())
    fit(Regressor(), Distillation(strength=0, features=["1"], network="net"))
