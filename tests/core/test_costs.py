"""Multiply-accumulates, against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sparse.core import BETWEEN_ACTIVATIONS, count_macs, effective_macs


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(5, 3), (5,), 15),
        (nn.Linear(5, 3), (4, 5), 4 * 15),
        (nn.Linear(5, 3, bias=False), (5,), 15),
        (nn.Conv2d(2, 6, 3), (2, 5, 5), 9 * 6 * 2 * 9),
        (nn.Conv2d(2, 6, 3, stride=2, padding=1), (2, 5, 5), 9 * 6 * 2 * 9),
        (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 5, 5), 25 * 8 * 1 * 9),
        (nn.Conv1d(2, 3, 3), (2, 6), 4 * 3 * 2 * 3),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 4, 4), 16 * 2 * 3 * 4),
    ],
)
def test_one_layer(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(layer, lambda: layer(torch.ones(7, *shape)), samples=7) == {"weight": macs}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(8, 16), {"weight_ih_l0": 5 * 64 * 8, "weight_hh_l0": 5 * 64 * 16}),
        (nn.GRU(8, 16), {"weight_ih_l0": 5 * 48 * 8, "weight_hh_l0": 5 * 48 * 16}),
        (nn.LSTM(8, 16, proj_size=4), {"weight_ih_l0": 5 * 64 * 8, "weight_hh_l0": 5 * 64 * 4, "weight_hr_l0": 5 * 4 * 16}),
    ],
    ids=["LSTM", "GRU", "projected"],
)
def test_recurrent_layers_count_every_step(layer: nn.Module, expected: dict[str, int]) -> None:
    fused = torch.backends.mkldnn.is_available(), torch.backends.cudnn.enabled
    assert count_macs(layer, lambda: layer(torch.ones(5, 1, 8))) == expected
    assert fused == (torch.backends.mkldnn.is_available(), torch.backends.cudnn.enabled)


def test_attention_is_counted_with_its_scores() -> None:
    tokens, width = 6, 8
    attention = nn.MultiheadAttention(width, 2, batch_first=True)
    x = torch.ones(3, tokens, width)
    assert count_macs(attention, lambda: attention(x, x, x, need_weights=False), samples=3) == {
        "in_proj_weight": 3 * tokens * width**2,
        BETWEEN_ACTIVATIONS: 2 * tokens**2 * width,  # scores and their sums, whatever the number of heads
        "out_proj.weight": tokens * width**2,
    }


class Functional(nn.Module):
    """A weight of its own, used by hand and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.kernel), self.kernel)


@pytest.mark.parametrize("autocast", [False, True])
def test_wherever_a_weight_is_used(autocast: bool) -> None:
    module = Functional()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert count_macs(module, lambda: module(torch.ones(2, 4)), samples=2) == {"kernel": 32}


def test_a_compiled_module_is_counted_too() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    module.compile(backend="eager")
    assert count_macs(module, lambda: module(torch.ones(2, 4)), samples=2) == {"0.weight": 16}
    torch.compiler.reset()


def test_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4).eval())
    mean, fast = module[0].running_mean.clone(), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count_macs(module, lambda: module(torch.ones(2, 5)))
    count_macs(module, lambda: module(torch.ones(2, 4)))
    assert module[0].training
    assert not module[1].training
    assert torch.equal(module[0].running_mean, mean)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_effective_macs_go_by_masks_or_by_zeros() -> None:
    macs = {"fc": 100, "head": 10, BETWEEN_ACTIVATIONS: 7}
    mask = torch.tensor([True, False, False, True, False])
    expected = {"fc": 40, "head": 10, BETWEEN_ACTIVATIONS: 7}
    assert effective_macs(macs, {"fc": mask}) == expected
    assert effective_macs(macs, {"fc": mask.float(), "unused": mask}) == expected
