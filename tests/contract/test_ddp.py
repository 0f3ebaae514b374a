"""Two gloo processes: penalties count once, scores are those of all data, local decisions are noticed, one rank watches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sparse import SNIP, CKARegularization, GraSP, MagnitudePruning, SparsityCheckpoint, SparsityMonitor
from lightning_sparse.families import Pruning
from lightning_sparse.testing import Toy, fit, fit_on_ranks, loader, network, run_on_ranks, toy, trainer
from tests.helpers.methods import FeaturePenalty, L2Penalty
from tests.helpers.oracles import slow_cka

PENALTIES = {
    "weights": lambda: L2Penalty(0.5),
    "features": lambda: FeaturePenalty(0.5),
    "similarity": lambda: CKARegularization(strength=0.05, every_n_batches=1),
}


class LocalScore(Pruning):
    """A mistake on purpose: every rank scores by its own random numbers."""

    def score(self, name: str, weight: Tensor) -> Tensor:
        return torch.rand_like(weight)


def with_local_scores(rank: int) -> None:
    torch.manual_seed(rank)
    fit_on_ranks(rank, toy(), LocalScore(0.5))


def test_a_decision_from_local_data_is_an_error() -> None:
    with pytest.raises(AssertionError, match="RuntimeError: LocalScore: the ranks hold different masks of 'net."):
        run_on_ranks(with_local_scores)


def test_a_rank_that_fails_is_heard() -> None:
    def fails(rank: int) -> None:
        if rank == 1:
            raise KeyError("lost")
        torch.distributed.barrier()

    with pytest.raises(AssertionError, match="KeyError: 'lost'"):
        run_on_ranks(fails)


def test_ranks_that_do_not_end_are_ended() -> None:
    with pytest.raises(AssertionError, match=r"Ranks \[0, 1\] did not end within 0.5 s, or died \(exit codes \[-9, -9\]\)"):
        run_on_ranks(lambda rank: time.sleep(60), timeout=0.5)


def penalized(rank: int, kind: str) -> dict[str, Tensor]:
    module = toy(net=network(dropout=0))
    module.load_state_dict(toy().state_dict())
    fit_on_ranks(rank, module, PENALTIES[kind](), accumulate_grad_batches=2)
    return dict(module.state_dict())


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties_count_once(kind: str) -> None:
    """Two ranks with accumulation equal one process whose loss has the penalty written out."""

    class Written(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if kind == "features":
                feature = self.net[0](batch[0])
                return self.loss(batch) + 0.5 * feature.square().mean()
            if kind == "similarity":  # not additive: the mean of the terms of the ranks, each from its own samples
                terms = [2 * slow_cka(self.net[:2](half), self.net[:4](half)) for half in batch[0].chunk(2)]
                return self.loss(batch) + 0.05 * (terms[0] + terms[1]).float() / 2
            weights = [p for p in self.parameters() if p.ndim > 1]
            return self.loss(batch) + 0.25 * sum(w.square().sum() for w in weights)

    module = Written(net=network(dropout=0))
    module.load_state_dict(toy().state_dict())
    halves = [loader(rank=rank, world_size=2) for rank in (0, 1)]
    batches = []
    for epoch in range(3):
        for half in halves:
            half.set_epoch(epoch)
        batches += [(torch.cat([x, u]), torch.cat([y, v])) for (x, y), (u, v) in zip(*halves, strict=True)]
    data = DataLoader(batches, batch_size=None)  # type: ignore[arg-type,var-annotated]
    trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, data, loader(1))
    for found in run_on_ranks(penalized, kind):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def scored(rank: int) -> dict[str, dict[str, Tensor]]:
    masks = {}
    for method in (SNIP(0.8), GraSP(0.8)):
        module = toy(net=network(dropout=0))
        module.load_state_dict(toy().state_dict())
        fit_on_ranks(rank, module.double(), method, max_steps=1)
        masks[method.label] = {name: method.masks[name] for name in method.masks}
    return masks


def test_scores_are_those_of_all_ranks() -> None:
    """The first batches of both ranks together, scored by one process, give the same mask."""
    ranks = run_on_ranks(scored)
    batches = [next(iter(loader(rank=rank, world_size=2))) for rank in (0, 1)]
    both = DataLoader([tuple(map(torch.cat, zip(*batches, strict=True)))], batch_size=None)  # type: ignore[arg-type,var-annotated]
    for alone in (SNIP(0.8), GraSP(0.8)):
        module = toy(net=network(dropout=0))
        module.load_state_dict(toy().state_dict())
        trainer(alone, max_steps=1).fit(module.double(), both, loader(1))
        for found in ranks:
            assert all(found[alone.label][name].equal(alone.masks[name]) for name in alone.masks)


def watched(rank: int, folder: Path) -> dict[str, Any]:
    monitor = SparsityMonitor(table=False)
    best = SparsityCheckpoint(dirpath=folder / "best", monitor="val_loss")
    options = {"logger": CSVLogger(folder, version=0), "log_every_n_steps": 1, "default_root_dir": folder}
    fit_on_ranks(rank, toy(), MagnitudePruning(0.5, start=0.3, end=0.6), monitor, best, **options)
    return {"best": best.best_model_path, "sparsity": monitor.history.column("sparsity")}


def test_the_first_rank_watches_for_all(tmp_path: Path) -> None:
    first, second = run_on_ranks(watched, tmp_path)
    assert first["best"] == second["best"]
    weights = [value for value in torch.load(first["best"], weights_only=True)["state_dict"].values() if value.ndim > 1]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == 0.5
    assert first["sparsity"][-1] == 0.5
    assert second["sparsity"] == []
    assert len(list(tmp_path.rglob("report.html"))) == 1


def test_the_reference_differs_without_the_penalty() -> None:
    plain, penalized = toy(), toy()
    fit(plain)
    fit(penalized, L2Penalty(0.5))
    assert not torch.allclose(plain.net[0].weight, penalized.net[0].weight, rtol=1e-2)
