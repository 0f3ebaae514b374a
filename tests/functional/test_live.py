"""Masks that are made anew at every step: numpy and torch say the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sparse.functional import above, beyond, mask_bits, part_

EDGES = torch.tensor(
    [[0.0, -0.0, 1.0, -1.0, 1.5], [-1.5, 1e-45, -1e-45, torch.inf, -torch.inf], [torch.nan, 2.0, -2.0, 0.5, -0.5]]
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_above(dtype: torch.dtype) -> None:
    values = EDGES.to(dtype)
    assert above(values).equal(values > 0)
    assert above(values.t()).equal(values.t() > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [torch.tensor(1.0), torch.tensor([[1.0], [-0.5], [0.5]]), torch.tensor(0.0)])
def test_beyond(dtype: torch.dtype, threshold: Tensor) -> None:
    values = EDGES.to(dtype)
    out = torch.empty_like(values, dtype=torch.bool)
    assert beyond(values, threshold.to(dtype), out) is out
    expected = values.abs() > threshold.to(dtype)
    assert out[~values.isnan()].equal(expected[~values.isnan()])
    assert not out[values.isnan() & (threshold >= 0)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_parts_are_all_there_is(dtype: torch.dtype, turned: bool) -> None:
    values = EDGES.to(dtype)
    values = values.t() if turned else values
    mask = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    left, hidden = values.clone(), torch.full_like(values, 7.0, dtype=torch.float32)
    part_(left, hidden, mask_bits(mask))
    for found, kept in ((left, mask), (hidden.to(dtype), ~mask)):
        assert found[kept].view(torch.int8).equal(values[kept].view(torch.int8))
        assert not found[~kept].view(torch.int8).any()
