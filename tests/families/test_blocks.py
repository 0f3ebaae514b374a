"""Whole blocks of outputs by inputs, for every kind of method."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import ACDC, SET, SNIP, GraNet, MagnitudePruning, RandomSparsity, RigL
from lightning_sparse.core import Blocks, Target
from lightning_sparse.export import use_kernels
from lightning_sparse.functional import block_score, expand_blocks
from lightning_sparse.testing import Watcher, fit, toy

METHODS: dict[str, Any] = {
    "gradual": lambda **o: MagnitudePruning(0.9, **o),
    "gradual, erk": lambda **o: MagnitudePruning(0.9, allocation="erk", **o),
    "random": lambda **o: RandomSparsity(0.9, **o),
    "SNIP": lambda **o: SNIP(0.9, **o),
    "RigL": lambda **o: RigL(0.9, every="2 steps", drop_fraction=0.5, **o),
    "SET": lambda **o: SET(0.9, every="2 steps", drop_fraction=0.5, **o),
    "GraNet": lambda **o: GraNet(0.9, every="2 steps", **o),
    "AC/DC": lambda **o: ACDC(0.9, every="2 steps", last_dense="2 steps", **o),
}


def blocks_of(mask: Tensor) -> list[Tensor]:
    """Every block of four by two at every place of the kernel, cut out one by one."""
    flat = mask.reshape(*mask.shape[:2], -1)
    return [
        flat[o : o + 4, i : i + 2, place]
        for o in range(0, flat.shape[0], 4)
        for i in range(0, flat.shape[1], 2)
        for place in range(flat.shape[2])
    ]


@pytest.mark.parametrize("name", METHODS)
def test_blocks_are_whole_at_every_moment_and_the_target_is_met(name: str) -> None:
    method, first = METHODS[name](structure="block:4x2", targets=["!:first"]), {}

    def look(moment: str, module: L.LightningModule) -> None:
        for key in method.masks:
            assert all(len(set(block.flatten().tolist())) == 1 for block in blocks_of(method.masks[key])), (moment, key)
            first.setdefault(key, method.masks[key])

    fit(toy(), Watcher(look), method)
    units = (576 + 2048 + 64) // 8
    assert method.masks.kept == 8 * (units - round(0.9 * units))
    assert method.at_target is not False
    if name in ("RigL", "SET"):
        moved = [int((method.masks[key] & ~mask).sum()) for key, mask in first.items()]
        assert sum(moved) > 0
        assert all(int(method.masks[key].sum()) == int(mask.sum()) for key, mask in first.items())


def test_scores_are_means_and_masks_their_inverse() -> None:
    score = torch.rand(8, 6, 3, generator=torch.Generator().manual_seed(0))
    found = block_score(score, 4, 2)
    assert found.shape == (2, 3, 3)
    assert float(found[1, 2, 0]) == pytest.approx(float(score[4:8, 4:6, 0].mean()))
    assert block_score(score.transpose(0, 1), 4, 2, (1, 0)).equal(found.transpose(0, 1))
    kept = found > 0.5
    mask = expand_blocks(kept, 4, 2)
    assert mask.shape == score.shape
    assert (block_score(mask.float(), 4, 2) == kept.float()).all()


def test_the_layout_of_the_layer_is_asked() -> None:
    layer = nn.ConvTranspose2d(8, 4, 3)  # inputs first
    target = Target.of("weight", layer.weight, layer)
    structure = Blocks(2, 8)
    assert structure.units(target) == 2 * 1 * 9
    assert structure.score(layer.weight.detach(), target).shape == (1, 2, 3, 3)
    assert structure.misfit(Target.of("weight", nn.Conv2d(4, 8, 3).weight, nn.Conv2d(4, 8, 3))) is not None


def test_the_blocks_are_those_of_bsr() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    method, target = Blocks(8, 8), Target.of("weight", layer.weight, layer)
    layer.weight.data.mul_(method.expand(method.score(torch.rand(32, 64), target) > 0.5, target))
    expected, x = layer(torch.ones(3, 64)), torch.ones(3, 64)
    sparse: Any = use_kernels(nn.Sequential(layer), {"0": "bsr8"})[0]
    assert sparse.weight.values().shape[0] == int((block_score(layer.weight.abs(), 8, 8) > 0).sum())
    torch.testing.assert_close(sparse(x), expected)
