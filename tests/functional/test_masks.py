import pytest
import torch

from lightning_sparse.functional import (
    channel_score,
    expand_channels,
    magnitude,
    mask_sparsity,
    pack,
    random_generator,
    random_score,
    unpack,
    zero_fraction,
)


@pytest.mark.parametrize("dim", [0, 1])
def test_channels(dim: int) -> None:
    score = torch.rand(4, 5, 3, 3)
    expected = [score.select(dim, c).mean() for c in range(score.shape[dim])]
    assert channel_score(score, dim).tolist() == pytest.approx([float(e) for e in expected])
    kept = torch.arange(score.shape[dim]) % 2 == 0
    mask = expand_channels(kept, score, dim)
    assert all(bool(mask.select(dim, c).all()) == bool(k) == bool(mask.select(dim, c).any()) for c, k in enumerate(kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["whole", "channels last", "strided", "long"])
def test_bits_keep_or_erase(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sparse.functional import any_bits, apply_bits_, mask_bits
    from lightning_sparse.functional import masks as module

    if layout == "long":
        monkeypatch.setattr(module, "_CHUNK", 7)
    tensor = torch.randn(4, 6, 3, 3).to(dtype)
    tensor[0, 0, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    if layout == "channels last":
        tensor = tensor.to(memory_format=torch.channels_last)
    if layout == "strided":
        tensor = tensor[:, ::2]
    mask = torch.rand(tensor.shape) > 0.5
    mask[0, 0] = False
    expected = torch.where(mask, tensor, 0)
    apply_bits_(tensor, mask_bits(mask))
    assert tensor.equal(expected)
    assert not (torch.signbit(tensor) & ~mask).any()
    dropped = mask_bits(~mask)
    assert not any_bits(tensor, dropped)
    for place in ((0, 0, 0, 0), tuple((~mask).nonzero()[-1].tolist())):
        for value in (1e-7, -0.0, torch.nan):
            other = tensor.clone()
            other[place] = value
            assert any_bits(other, dropped), "also where it is the first or the last, and zero but for its sign"


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (2, 3, 3, 3), (0,)])
def test_packing_round_trip(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    packed = pack(mask)
    assert packed.numel() == (mask.numel() + 7) // 8
    assert unpack(packed, shape).equal(mask)


def test_packing_equals_numpy() -> None:
    mask = torch.rand(1003) > 0.3
    import numpy as np

    assert pack(mask).tolist() == np.packbits(mask.numpy()).tolist()


def test_packed_bytes_of_another_shape() -> None:
    with pytest.raises(ValueError, match="2 bytes do not hold a mask of shape"):
        unpack(torch.zeros(2, dtype=torch.uint8), (3, 3, 3))


def test_random_scores_depend_on_seed_step_and_name_alone() -> None:
    weight = torch.zeros(50)
    reference = random_score(weight, random_generator(1, 2, "a"))
    torch.rand(17)
    assert random_score(weight, random_generator(1, 2, "a")).equal(reference)
    for other in [(0, 2, "a"), (1, 3, "a"), (1, 2, "b")]:
        assert not random_score(weight, random_generator(*other)).equal(reference)


def test_random_scores_stay_where_they_are_drawn() -> None:
    """Not every device has numbers of 64 bits."""
    assert random_score(torch.empty(3, device="meta"), random_generator(0, 0, "a")).device.type == "cpu"


def test_magnitude_is_float32_at_least() -> None:
    assert magnitude(torch.tensor([-1.5], dtype=torch.bfloat16)).dtype == torch.float32
    assert magnitude(torch.tensor([-1.5], dtype=torch.float64)).tolist() == [1.5]
    assert magnitude(torch.tensor([-1.5], dtype=torch.float64)).dtype == torch.float64


def test_statistics_count_elements_not_sums() -> None:
    assert zero_fraction([torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.0])]) == 0.5
    assert mask_sparsity([]) == 0.0
