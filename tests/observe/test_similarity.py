"""The heat map of layers after validation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sparse.functional import linear_cka_matrix, off_diagonal_mean
from lightning_sparse.observe import SimilarityMap
from lightning_sparse.testing import fit, loader, toy, trainer


def test_the_mean_is_logged_and_the_figure_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    module, chart = toy(), SimilarityMap()
    runner = fit(module, chart, logger=CSVLogger(tmp_path), num_sanity_val_steps=1)
    assert len(chart.history) == 3
    with torch.no_grad():
        [(x, _)] = list(loader(1))
        features = [module.net.eval()[:2](x), module.net[:4](x)]
    expected = off_diagonal_mean([linear_cka_matrix(features)])
    assert chart.history[-1] == pytest.approx(float(expected), abs=1e-5)
    assert float(runner.logged_metrics["similarity"]) == pytest.approx(chart.history[-1])
    assert len(list(tmp_path.rglob("step=*.png"))) == 3
    assert not any(m._forward_hooks for m in module.modules())


def test_chosen_layers_and_few_batches() -> None:
    module, chart = toy(), SimilarityMap(layers=["net.6", "net.7", "net.8"], batches=1, figure=False)
    trainer(chart).validate(module, loader(), verbose=False)
    assert chart.metric is not None
    assert chart.metric.names == ["net.6", "net.7", "net.8"]
    assert chart.metric.update_count == 1


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batches=0 must be at least 1"):
        SimilarityMap(batches=0)
    monkeypatch.setattr("lightning_sparse.observe.similarity.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="draws with matplotlib, which is not installed; install it, or set figure=False"):
        fit(toy(), SimilarityMap())
