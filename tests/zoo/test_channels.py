"""Channels of timm's networks: half of the multiplications leave, and the outputs are those of the masked network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import MagnitudePruning
from lightning_sparse.core import count_macs
from lightning_sparse.models import Classifier
from lightning_sparse.testing import trainer
from tests.helpers.zoo import timm

pytest.importorskip("torch_pruning")
pytest.importorskip("timm")
from lightning_sparse.export import remove_dead

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAMES = {
    "mobilenetv3_small_050": "normalizations that end in an activation, depthwise layers, squeeze-and-excitation",
    "regnetx_002": "convolutions in groups",
    "repvgg_a0": "branches that are added",
    "dla34": "concatenations",
}


def macs(network: nn.Module) -> int:
    return sum(count_macs(network, lambda: network(IMAGES), len(IMAGES)).values())


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_multiplications_leave(name: str) -> None:
    torch.manual_seed(0)
    batches = DataLoader(TensorDataset(IMAGES, torch.arange(4)), 4)
    module = Classifier(lambda *shape: timm(name)(), 4, 3, 64)
    method = MagnitudePruning(0.5, structure="coupled", budget="macs", start=0, end=0)
    trainer(method, max_epochs=1).fit(module, batches, batches)
    net = module.eval().network
    smaller, removal = remove_dead(net, IMAGES)
    assert not removal.refused
    assert not removal.carriers
    assert macs(smaller) / macs(net) == pytest.approx(0.5, abs=0.005)
    assert macs(smaller) <= macs(net) / 2
    with torch.no_grad():
        expected = net(IMAGES)
        assert (smaller(IMAGES) - expected).abs().max() <= 1e-5 * expected.abs().max()
