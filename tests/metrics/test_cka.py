"""CKA over batches."""

from __future__ import annotations

import pytest
import torch

from lightning_sparse.metrics import CKA
from tests.helpers.oracles import related, slow_hsic


def test_ratio_of_sums_over_batches() -> None:
    metric = CKA(["a", "b", "c"])
    batches = [[f.float() + i * f.float() ** 2 for f in related(8)] for i in range(3)]
    for batch in batches:
        metric.update(batch)
    sums = torch.stack([torch.stack([torch.stack([slow_hsic(x, y) for y in b]) for x in b]) for b in batches]).sum(0)
    expected = sums / sums.diagonal().outer(sums.diagonal()).sqrt()
    torch.testing.assert_close(metric.compute().double(), expected, rtol=1e-4, atol=1e-5)
    metric.update([f[:3] for f in related(8)])  # three samples say nothing
    torch.testing.assert_close(metric.compute().double(), expected, rtol=1e-4, atol=1e-5)
    metric.reset()
    assert not metric.hsic.any()


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    metric = CKA(["a", "b", "c"])
    metric.update(related(8))
    figure, ax = metric.plot()
    assert ax.images[0].get_array().shape == (3, 3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    other, same = CKA(["a", "b", "c"]).plot(torch.eye(3), ax)
    assert (other, same) == (figure, ax)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"names=\['a'\] must name at least two layers"):
        CKA(["a"])
    with pytest.raises(ValueError, match=r"CKA of 2 layers got 3 features"):
        CKA(["a", "b"]).update(related())
