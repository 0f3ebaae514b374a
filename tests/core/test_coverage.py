"""How much of a model is chosen, what is missed, and when that is said."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_sparse import CKARegularization, MagnitudePruning
from lightning_sparse.core import find_targets
from lightning_sparse.core.coverage import Coverage, coverage
from lightning_sparse.testing import Toy, fit, network


class Strange(nn.Module):
    """A matrix that is not known, and what looks like one but is none."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))
        self.gain = nn.Parameter(torch.ones(1, outputs, 1))
        self.class_token = nn.Parameter(torch.zeros(2, outputs))


def net(inputs: int = 4) -> nn.Module:
    return nn.ModuleDict({"words": nn.Embedding(9, 5), "body": nn.Linear(10, 20), "own": Strange(inputs, 10)})


def measured(module: nn.Module, patterns: Sequence[str] = ("*",)) -> Coverage:
    return coverage(module, patterns, {target.name for target in find_targets(module, patterns)})


def test_what_is_missed_is_counted_and_named() -> None:
    found = measured(net())
    assert found.model == 45 + 220 + 40 + 10 + 20
    assert (found.matrices, found.missed, found.largest, found.layer) == (240, 40, "own.kernel", "Strange")
    assert found.warning == (
        "leaves out 17% of the trainable weights in matrices, embeddings not counted; the largest is 'own.kernel' (Strange, "
        "whose weight 'kernel' is not of a known kind; describe it with register_layer). register_layer makes Strange "
        "known, targets=['*', 'type:Strange'] takes it as it is, and targets=['*', '!type:Strange'] leaves it out without "
        "this warning."
    )


@pytest.mark.parametrize(
    ("module", "patterns"),
    [
        (net(2), ["*"]),  # 20 of 220
        (net(), ["!type:Strange"]),
        (net(), ["body"]),
        (net(), ["*", "type:Strange"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 40).requires_grad_(False)), ["*"]),
    ],
)
def test_nothing_is_said_of_a_tenth_or_of_what_was_asked_for(module: nn.Module, patterns: list[str]) -> None:
    assert measured(module, patterns).warning is None


def test_a_layer_of_one_input_or_output_has_a_matrix() -> None:
    assert measured(nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1))).matrices == 16


def test_a_shared_weight_counts_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    assert measured(module) == Coverage(model=16, matrices=16)


class Table(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.randn(rows, columns))


def model(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"fc": nn.Linear(10, 9), **parts})


def warning(net: nn.Module, *patterns: str) -> str | None:
    chosen = patterns or ("*",)
    return coverage(net, chosen, [target.name for target in find_targets(net, chosen)]).warning


@pytest.mark.parametrize(
    "part",
    [nn.Embedding(50, 9), Table(1, 99), Table(99, 1), Table(9, 9).requires_grad_(False), nn.BatchNorm1d(999)],
    ids=["embedding", "row", "column", "frozen", "norm"],
)
def test_what_is_no_matrix_that_trains_does_not_count(part: nn.Module) -> None:
    assert warning(model(part=part)) is None


def test_tied_embeddings_do_not_count() -> None:
    net = model(embed=nn.Embedding(50, 9), head=nn.Linear(9, 50))
    net["head"].weight = net["embed"].weight
    assert warning(net) is None


class Half(Toy):
    def __init__(self) -> None:
        super().__init__(net=network(dropout=0))
        self.table = nn.Parameter(torch.zeros(99, 99))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + self.table.sum()


def test_whoever_trains_is_told() -> None:
    with pytest.warns(UserWarning, match=r"MagnitudePruning leaves out 78% .* \x27table\x27 \(Half, whose weight"):
        fit(Half(), MagnitudePruning(0.5))
    fit(Half(), CKARegularization())  # nothing is removed, so nothing is left out


class Log(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged = dict(trainer.logged_metrics)


def test_the_sparsity_of_the_whole_model_is_logged() -> None:
    module, log = Toy(net=network(dropout=0)), Log()
    fit(module, MagnitudePruning(0.5, targets=["net.6"]), log)
    whole = sum(parameter.numel() for parameter in module.parameters())
    assert log.logged["sparsity/actual"] == 0.5
    assert log.logged["sparsity/model"] == pytest.approx(1024 / whole)


def test_what_is_frozen_or_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    module = Toy(net=network(dropout=0))
    module.net[2].requires_grad_(False)
    with caplog.at_level("INFO"):
        fit(module, MagnitudePruning(structure="2:4"))
    assert "leaves out frozen weights (1 tensor, 576 entries)" in caplog.text
    assert "keeps 'net.0.weight' dense: it has 1 input, and structure='2:4' needs groups of 4." in caplog.text
