"""How much of a model is chosen, and what is said of the rest."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_sparse import CKARegularization, MagnitudePruning
from lightning_sparse.core import coverage, find_targets
from lightning_sparse.testing import Toy, fit, network


class Table(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.randn(rows, columns))


def model(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"fc": nn.Linear(10, 9), **parts})


def warning(net: nn.Module, *patterns: str) -> str | None:
    chosen = patterns or ("*",)
    return coverage(net, chosen, [target.name for target in find_targets(net, chosen)]).warning


def test_a_tenth_is_still_passed_over() -> None:
    assert warning(model(table=Table(2, 5))) is None  # 10 of 100
    said = warning(model(table=Table(2, 6)))
    assert said is not None
    assert said.startswith(
        "leaves out 12% of the trainable weights in matrices, embeddings not counted; the largest is 'table."
    )
    assert "targets=['*', 'type:Table'] takes it" in said
    assert warning(model(table=Table(2, 6)), "*", "type:Table") is None


@pytest.mark.parametrize("pattern", ["!type:Table", "!table", "fc"])
def test_what_somebody_has_left_out_is_no_surprise(pattern: str) -> None:
    net = model(table=Table(9, 9))
    assert warning(net) is not None
    assert warning(net, *(["*", pattern] if pattern.startswith("!") else [pattern])) is None


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
    with pytest.warns(UserWarning, match=r"MagnitudePruning leaves out 78% .* \x27table\x27 \(Half, of which no weight"):
        fit(Half(), MagnitudePruning(0.5))
    fit(Half(), CKARegularization())  # nothing is removed, so nothing is left out


class Log(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged = dict(trainer.logged_metrics)


def test_the_sparsity_of_the_whole_model_is_logged() -> None:
    module, log = Toy(net=network(dropout=0)), Log()
    fit(module, MagnitudePruning(0.5, targets=["net.6"]), log)
    whole = sum(parameter.numel() for parameter in module.parameters())
    assert log.logged["sparsity"] == 0.5
    assert log.logged["sparsity/model"] == pytest.approx(1024 / whole)


def test_what_is_frozen_or_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    module = Toy(net=network(dropout=0))
    module.net[2].requires_grad_(False)
    with caplog.at_level("INFO"):
        fit(module, MagnitudePruning(structure="2:4"))
    assert "leaves out 1 frozen weights with 576 entries" in caplog.text
    assert "leaves 'net.0.weight' dense: it has 1 input, and structure='2:4' needs groups of 4." in caplog.text
