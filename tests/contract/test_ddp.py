"""Two gloo processes, no seed, generators used differently on every rank: weights and masks stay equal bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_sparse import SNIP, GraSP
from tests.functional.test_cka import slow_cka
from tests.toys import OVERLAYS, ROOT, L2Penalty, Toy, fit, loader, network, toy, trainer


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    shared.pop("PL_GLOBAL_SEED", None)
    command = [sys.executable, "-m", "tests.contract.ddp_worker", str(folder)]
    workers = []
    for rank in (0, 1):
        with (folder / f"log{rank}").open("w") as log:
            env = {**shared, "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log))
    try:
        for rank, worker in enumerate(workers):
            assert worker.wait(timeout=300) == 0, (folder / f"log{rank}").read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_ranks_agree_at_every_epoch(ranks: list[dict[str, Any]], path: Path) -> None:
    first, second = (rank[path.stem] for rank in ranks)
    assert len(first["epochs"]) == 3
    for epoch, (mine, yours) in enumerate(zip(first["epochs"], second["epochs"], strict=True)):
        for part in ("weights", "masks"):
            assert mine[part].keys() == yours[part].keys()
            assert all(mine[part][name].equal(yours[part][name]) for name in mine[part]), f"epoch {epoch}: {part}"
    assert first["goal"] in (None, first["kept"])


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_resumed_ranks_equal_the_uninterrupted_ones(ranks: list[dict[str, Any]], path: Path) -> None:
    for rank in ranks:
        weights = rank[path.stem]["epochs"][-1]["weights"]
        resumed = rank[path.stem]["resumed"]
        assert [name for name in weights if not weights[name].equal(resumed[name])] == []


def test_a_decision_from_local_data_is_an_error(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "LocalScore: the ranks hold different masks of 'net." in rank["local score"]


@pytest.mark.parametrize("kind", ["weights", "features", "similarity"])
def test_penalties_count_once(ranks: list[dict[str, Any]], kind: str) -> None:
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

    net = network()
    net[5] = torch.nn.Identity()
    module = Written(net=net)
    module.load_state_dict(toy().state_dict())
    halves = [loader(rank=rank, world_size=2) for rank in (0, 1)]
    batches = []
    for epoch in range(3):
        for half in halves:
            half.set_epoch(epoch)
        batches += [(torch.cat([x, u]), torch.cat([y, v])) for (x, y), (u, v) in zip(*halves, strict=True)]
    data = DataLoader(batches, batch_size=None)  # type: ignore[arg-type,var-annotated]
    trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, data, loader(1))
    for rank in ranks:
        for name, value in module.state_dict().items():
            torch.testing.assert_close(rank[kind][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["SNIP", "GraSP"])
def test_scores_are_those_of_all_ranks(ranks: list[dict[str, Any]], method: str) -> None:
    """The first batches of both ranks together, scored by one process, give the same mask."""
    module = toy()
    module.net[5] = torch.nn.Identity()
    batches = [next(iter(loader(rank=rank, world_size=2))) for rank in (0, 1)]
    both = DataLoader([tuple(map(torch.cat, zip(*batches, strict=True)))], batch_size=None)  # type: ignore[arg-type,var-annotated]
    alone = {"SNIP": SNIP, "GraSP": GraSP}[method](0.8)
    trainer(alone, max_steps=1).fit(module.double(), both, loader(1))
    for rank in ranks:
        assert all(rank[method][name].equal(alone.masks[name]) for name in alone.masks)


def test_the_first_rank_watches_for_all(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["watched"] for rank in ranks)
    assert first["best"] == second["best"]
    weights = [value for value in torch.load(first["best"], weights_only=True)["state_dict"].values() if value.ndim > 1]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == 0.5
    assert first["sparsity"][-1] == 0.5
    assert second["sparsity"] == []
    assert len(list(Path(first["best"]).parent.parent.rglob("report.html"))) == 1


def test_the_reference_differs_without_the_penalty() -> None:
    plain, penalized = toy(), toy()
    fit(plain)
    fit(penalized, L2Penalty(0.5))
    assert not torch.allclose(plain.net[0].weight, penalized.net[0].weight, rtol=1e-2)
