from typing import Any

import numpy as np
import pytest
import torch

from lightning_sparse.functional import exact_count, kth_smallest, top_k_masks
from lightning_sparse.functional import order as order_module


@pytest.fixture(autouse=True, params=["partition", "between two", "histograms"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways find the same: few entries are partitioned, and the tests below have few."""
    if request.param == "between two":
        monkeypatch.setattr(order_module, "_SAMPLE", 1)
    if request.param == "histograms":
        monkeypatch.setattr(order_module, "_between_two", lambda *args: None)
    return str(request.param)


def cases() -> dict[str, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    normal = [torch.randn(3, 16, generator=g), torch.randn(29, generator=g)]
    return {
        "normal": normal,
        "magnitudes": [t.abs() for t in normal],
        "ties": [torch.randint(-3, 4, (80,), generator=g).float()],
        "zeros of both signs": [torch.tensor([0.0, -0.0, 1.0, -1.0, 0.0, -0.0])],
        "infinities": [torch.tensor([torch.inf, -torch.inf, 1.0, -torch.inf, torch.inf])],
        "subnormal": [torch.tensor([1e-45, -1e-45, 1e-40, 0.0, -1e-40, 1e-38])],
        "bfloat16": [t.bfloat16() for t in normal],
        "float16": [t.half() for t in normal],
        "float64": [t.double() * 1e-200 for t in normal],
        "float64, the last bits alone": [1 + torch.randint(-9, 9, (60,), generator=g).double() * 2**-52],
        "float64, all kinds": [torch.tensor([0, -0.0, 5e-324, -5e-324, -torch.inf, -1.5, torch.inf], dtype=torch.float64)],
    }


@pytest.mark.parametrize("name", cases())
def test_every_rank_equals_a_full_sort(name: str) -> None:
    values = cases()[name]
    ordered = np.sort(torch.cat([v.flatten() for v in values]).double().numpy(), kind="stable")
    found = [float(kth_smallest(values, k)) for k in range(len(ordered))]
    assert found == ordered.tolist()
    assert kth_smallest(values, 0).dtype == values[0].dtype


@pytest.mark.parametrize("name", cases())
def test_ranks_of_magnitudes(name: str) -> None:
    values = cases()[name]
    ordered = np.sort(torch.cat([v.flatten() for v in values]).abs().double().numpy())
    assert [float(kth_smallest(values, k, magnitudes=True)) for k in range(len(ordered))] == ordered.tolist()


@pytest.mark.parametrize("name", ["normal", "float64"])
def test_chunks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = cases()[name]
    whole = [float(kth_smallest(values, k)) for k in range(0, 77, 4)]
    monkeypatch.setattr(order_module, "_CHUNK", 52)
    assert [float(kth_smallest(values, k)) for k in range(0, 77, 4)] == whole


def many() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(200_003, generator=g)
    mask = torch.rand(200_003, generator=g) < 0.1
    return {
        "normal": normal,
        "sorted": normal.sort().values,
        "mostly zeros": normal * mask,
        "nine in ten are -inf": normal.masked_fill(~mask, -torch.inf),
        "few values": (normal * 2).round(),
        "alike": torch.ones(200_003),
        "float64": normal.double() * 1e-200,
        "bfloat16": normal.bfloat16(),
        "the sample misses all of one kind": torch.where(torch.arange(200_003) % 3 == 0, 5.0, normal),
    }


@pytest.mark.parametrize("name", many())
@pytest.mark.parametrize("magnitudes", [False, True])
def test_among_many_entries_a_sample_tells_where_to_look(name: str, magnitudes: bool, way: str, monkeypatch: Any) -> None:
    if way == "between two":
        monkeypatch.setattr(order_module, "_SAMPLE", 1 << 10)
    values = many()[name]
    ordered = np.sort((values.abs() if magnitudes else values).double().numpy())
    for k in {0, 1, 7, 20_000, 100_001, 179_000, 180_002, 199_000, 200_001, 200_002}:
        assert float(kth_smallest(torch.tensor_split(values, 3), k, magnitudes)) == ordered[k], k


def test_only_what_lies_between_two_sampled_values_is_copied(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "between two":
        pytest.skip("the others do not sample")
    monkeypatch.setattr(order_module, "_SAMPLE", 1 << 12)
    sizes: list[int] = []
    partition: Any = np.partition

    def watched(array: Any, k: int) -> Any:
        sizes.append(len(array))
        return partition(array, k)

    monkeypatch.setattr(np, "partition", watched)
    values = many()["normal"]
    assert float(kth_smallest([values], 180_000)) == float(values.sort().values[180_000])
    assert len(sizes) == 1
    assert sizes[0] < 12_000  # of 200,003


@pytest.mark.parametrize("name", ["mostly zeros", "nine in ten are -inf", "few values", "alike"])
def test_ties_need_no_histogram(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "between two":
        pytest.skip("the others do not sample")
    monkeypatch.setattr(order_module, "_SAMPLE", 1 << 12)
    monkeypatch.setattr(order_module, "_histogram", lambda *args: pytest.fail("a histogram was made"))
    values = many()[name]
    ordered = values.sort().values
    for k in (0, 90_000, 110_000, 180_000, 200_002):
        assert float(kth_smallest([values], k)) == float(ordered[k])


@pytest.mark.parametrize("numbers", [[5, -5], [-5, 5], [0, 0]])
def test_a_sample_that_misleads_does_no_harm(numbers: list[int], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample holds one number, the entries of the ranks asked for the other, above or below it."""
    if way == "between two":
        monkeypatch.setattr(order_module, "_SAMPLE", 100)
    sampled, other = map(float, numbers)
    values = torch.full((1_000,), other)
    values[:: 1000 // 100 | 1] = sampled
    ordered = values.sort().values
    assert [float(kth_smallest([values], k)) for k in range(0, 1000, 83)] == ordered[::83].tolist()


def test_more_than_2_to_the_24_entries(way: str) -> None:
    if way == "partition":
        pytest.skip("so many are never partitioned")
    n = (1 << 24) + 1001
    values = torch.arange(n, dtype=torch.int32).flip(0).view(torch.float32)  # the n smallest floats, descending
    k = n - 500
    assert kth_smallest([values], k).view(torch.int32).item() == k
    kept = top_k_masks([values], 1000)[0]
    assert kept[:1000].all()
    assert int(kept.count_nonzero()) == 1000


def test_no_such_rank() -> None:
    with pytest.raises(ValueError, match="k=3 is not a rank among 3 values; give 0 <= k < 3"):
        kth_smallest([torch.ones(3)], 3)


def slow_masks(scores: list[torch.Tensor], keep: int) -> list[torch.Tensor]:
    """The obviously true version: sort by (descending score, position)."""
    flat = [(-float(value), position) for position, value in enumerate(torch.cat([s.flatten() for s in scores]))]
    kept = {position for _, position in sorted(flat)[:keep]}
    mask = torch.tensor([position in kept for position in range(len(flat))])
    parts = mask.split([s.numel() for s in scores])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


@pytest.mark.parametrize("name", cases())
def test_masks_equal_the_slow_version(name: str) -> None:
    scores = cases()[name]
    total = sum(s.numel() for s in scores)
    for keep in {0, 1, total // 3, total // 2, total - 1, total}:
        masks, expected = top_k_masks(scores, keep), slow_masks(scores, keep)
        assert sum(int(m.count_nonzero()) for m in masks) == keep
        assert all(m.equal(e) for m, e in zip(masks, expected, strict=True)), keep


def test_ties_go_to_the_earlier_entry_across_tensors() -> None:
    first, second = top_k_masks([torch.ones(2, 2), torch.ones(3)], 5)
    assert first.all()
    assert second.tolist() == [True, False, False]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_tensors_of_different_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (20, 100_000):
        first, second = (torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) for dtype in dtypes)
        values = torch.cat([first.double(), second.double()])
        for order in ([first, second], [second, first]):
            for k in range(1, 2 * size, max(1, size // 3 - 6)):
                assert float(kth_smallest(order, k)) == float(values.sort().values[k])
                masks = top_k_masks(order, k)
                assert sum(int(mask.count_nonzero()) for mask in masks) == k
                kept = torch.cat([score[mask].double() for score, mask in zip(order, masks, strict=True)])
                assert kept.sort(descending=True).values.equal(values.sort(descending=True).values[:k])


def test_nan_is_named() -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_k_masks([torch.tensor([1.0, torch.nan])], 1)


@pytest.mark.parametrize("keep", [-1, 3])
def test_impossible_counts_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep={keep} is impossible among 2"):
        top_k_masks([torch.ones(2)], keep)


@pytest.mark.parametrize(
    ("fraction", "total", "expected"),
    [
        (0.9, 1000, 900),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.95, 77_072, 73_218),
        (0.0, 7, 0),
        (0.998, 20_024_000, 19_983_952),
    ],
)
def test_counts_are_exact(fraction: float, total: int, expected: int) -> None:
    assert exact_count(fraction, total) == expected
