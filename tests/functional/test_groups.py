from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import group_soft_threshold, n_m_mask, show_softly_


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_n_of_m_keeps_the_largest_sum(n: int, m: int) -> None:
    """The oracle tries every combination of every group."""
    score = torch.rand(5, 3 * m)
    mask = n_m_mask(score, n, m)
    for row, kept in zip(score.view(-1, m), mask.view(-1, m), strict=True):
        best = max(combinations(range(m), n), key=lambda chosen, row=row: sum(float(row[i]) for i in chosen))
        assert kept.nonzero().flatten().tolist() == list(best)


def test_n_of_m_ties_go_to_the_earlier() -> None:
    assert n_m_mask(torch.ones(1, 8), 2, 4).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


def test_n_of_m_groups_inputs_at_one_kernel_position() -> None:
    score = torch.rand(6, 8, 3, 3)
    mask = n_m_mask(score, 2, 4)
    assert (mask.view(6, 2, 4, 3, 3).sum(2) == 2).all()
    other = n_m_mask(score.transpose(0, 1), 2, 4, dim=0)
    assert other.transpose(0, 1).equal(mask)


def test_n_of_m_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="4 does not divide the 6 inputs"):
        n_m_mask(torch.ones(2, 6), 2, 4)


def by_sorting(score: Tensor, n: int, m: int) -> Tensor:
    """The mask along the last dimension, by a stable sort of every group."""
    order = score.reshape(-1, m).argsort(stable=True, dim=1, descending=True)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True).view(score.shape)


LAYOUTS = {
    "whole": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: torch.stack([t, torch.zeros_like(t)], -1).flatten(-2)[..., ::2],
}
"""The same values in other orders of the memory."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 3), (5, 6)])
def test_n_of_m_in_any_layout(n: int, m: int, layout: str, dtype: torch.dtype) -> None:
    """Large enough for several parts, with many ties."""
    score = torch.randint(-3, 4, (60, 60, 5, 5)).to(dtype)
    mask = n_m_mask(LAYOUTS[layout](score), n, m)
    assert mask.movedim(1, -1).equal(by_sorting(score.movedim(1, -1), n, m))
    assert n_m_mask(LAYOUTS[layout](score), n, m, 0).movedim(0, -1).equal(by_sorting(score.movedim(0, -1), n, m))
    if layout != "every other":
        assert mask.stride() == LAYOUTS[layout](score).stride()


def test_groups_larger_than_a_part() -> None:
    score = torch.randint(0, 1000, (3, 4, 40_000))
    assert n_m_mask(score.float(), 2, 4).movedim(1, -1).equal(by_sorting(score.movedim(1, -1), 2, 4))
    assert n_m_mask(score, 2, 4).movedim(1, -1).equal(by_sorting(score.movedim(1, -1), 2, 4))
    wide = torch.randint(0, 1000, (3, 600))
    assert n_m_mask(wide.float(), 200, 300).equal(by_sorting(wide, 200, 300))
    assert n_m_mask(torch.ones(0, 4), 2, 4).shape == (0, 4)


def softened(weight: Tensor, kept: Tensor, m: int) -> Tensor:
    """The formula, group by group."""
    groups, chosen = weight.reshape(-1, m), kept.reshape(-1, m)
    threshold = torch.where(chosen, 0, groups.abs()).amax(1, keepdim=True)
    return (groups.sign() * (groups.abs() - threshold).clamp(min=0)).view(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 3), (1, 6)])
def test_soft_thresholds_in_any_layout(n: int, m: int, layout: str, dtype: torch.dtype) -> None:
    """Of the largest of every group, and of any other mask: what is kept but smaller than the threshold is zero."""
    weight = torch.randn(60, 60, 5, 5).to(dtype)
    weight[::7] = -0.0
    for kept in (n_m_mask(weight.abs(), n, m), torch.rand(weight.shape) < 0.5):
        shown = group_soft_threshold(LAYOUTS[layout](weight), kept, m)
        assert shown.movedim(1, -1).equal(softened(weight.movedim(1, -1), kept.movedim(1, -1), m))
        assert not torch.signbit(shown[shown == 0]).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choose", [False, True])
def test_one_pass_is_the_same_as_one_after_the_other(choose: bool, dtype: torch.dtype, layout: str) -> None:
    weight, scale = torch.randn(60, 60, 5, 5).to(dtype), torch.tensor(1.7)
    wide = torch.promote_types(dtype, torch.float32)
    dense = weight.to(wide)
    before = torch.rand(weight.shape) < 0.5
    after = n_m_mask(dense.abs(), 2, 4) if choose else before
    expected = (group_soft_threshold(dense, after, 4) * scale.to(wide)).to(dtype)
    shown, hidden, held = LAYOUTS[layout](weight.clone()), torch.zeros(weight.shape, dtype=wide), before.clone()
    seen = LAYOUTS[layout](torch.zeros_like(weight))
    show_softly_(shown, hidden, held, seen, scale.to(wide), 4, n=2 if choose else None)
    assert shown.equal(expected)
    assert seen.equal(expected)
    assert hidden.equal(dense)
    assert held.equal(after)


def test_infinite_weights_that_are_kept_do_not_change_the_threshold() -> None:
    weight = torch.tensor([[torch.inf, 1.0, 3.0, -2.0]])
    assert group_soft_threshold(weight, n_m_mask(weight.abs(), 2, 4), 4).tolist() == [[torch.inf, 0.0, 1.0, 0.0]]
