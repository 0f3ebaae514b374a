"""Hoyer's sparsity of a network, beside a loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sparse.functional import hoyer_sparsity
from lightning_sparse.metrics import HoyerSparsity
from lightning_sparse.testing import network


def test_it_is_the_mean_over_outputs_weighted_by_layers() -> None:
    net = network()
    total, entries = 0.0, 0
    for parameter in net.parameters():
        if parameter.ndim > 1:
            values = [float(hoyer_sparsity(row.unsqueeze(0))) for row in parameter.detach().flatten(1)]
            total += sum(values) / len(values) * parameter.numel()
            entries += parameter.numel()
    metric = HoyerSparsity()
    metric.update(net)
    assert float(metric.compute()) == pytest.approx(total / entries, rel=1e-5)


def test_patterns_frozen_weights_and_several_networks() -> None:
    net = network()
    net.requires_grad_(False)
    net[8].weight.zero_()[:, 3] = 7
    metric = HoyerSparsity(targets=":last")
    metric.update(net)
    assert float(metric.compute()) == 1
    net[8].weight.fill_(-0.5)
    metric.update(net)
    assert float(metric.compute()) == 0.5
    metric.reset()
    metric.update(net)
    assert float(metric.compute()) == 0


def test_transposed_convolutions_count_their_outputs() -> None:
    net = nn.Sequential(nn.ConvTranspose1d(4, 2, 1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[1, 0] = net[0].weight[:, 1] = 3
    metric = HoyerSparsity()
    metric.update(net)
    assert float(metric.compute()) == 0.5  # one output listens to a single input, the other to all alike


def test_outputs_of_one_entry_do_not_count() -> None:
    metric = HoyerSparsity()
    net = nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 2))
    metric.update(net)
    alone = HoyerSparsity("1")
    alone.update(net)
    assert metric.compute() == alone.compute()
    with pytest.raises(ValueError, match="chooses no weight of Sequential whose outputs have at least two entries"):
        HoyerSparsity("0").update(net)
