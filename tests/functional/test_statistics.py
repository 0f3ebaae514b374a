import itertools

import pytest
import torch
from torch import Tensor

from lightning_sparse.core import MaskSet
from lightning_sparse.functional import layer_density, mask_overlap, over_parameterization_rate, zero_fraction
from lightning_sparse.metrics import LayerDensity, MaskOverlap, OverParameterizationRate


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text])


def test_overlap_counts_over_all_layers() -> None:
    before, after = [bits("1100"), bits("11")], [bits("0110"), bits("11")]
    assert mask_overlap(before, after) == 3 / 4
    assert mask_overlap([bits("1111")], [bits("1100")]) == 0.5  # what has been pruned is gone, too
    assert mask_overlap([bits("1100")], [bits("1111")]) == 1.0
    assert mask_overlap([bits("00")], [bits("11")]) == 1.0


def test_density_of_masks_and_of_weights() -> None:
    assert layer_density({"a": bits("1000"), "b": bits("11")}) == {"a": 0.25, "b": 1.0}
    assert layer_density({"a": torch.tensor([0.0, -0.0, 2.0])}) == {"a": pytest.approx(1 / 3)}
    assert zero_fraction([torch.tensor([0.0, -0.0, 2.0])]) == pytest.approx(2 / 3)


def test_metrics_agree_with_their_functions() -> None:
    torch.manual_seed(0)
    readings = [{"a": torch.rand(5, 4) < 0.3, "b": torch.rand(30) < 0.3} for _ in range(4)]
    overlap, rate, density = (cls(readings[0]) for cls in (MaskOverlap, OverParameterizationRate, LayerDensity))
    for before, after in itertools.pairwise(readings):
        for metric in (overlap, rate, density):
            metric.update(after)
        assert float(overlap.compute()) == pytest.approx(mask_overlap(before.values(), after.values()))
        assert density.compute() == layer_density(after)
    union = [torch.stack([reading[name] for reading in readings]).any(0) for name in ("a", "b")]
    assert float(rate.compute()) == pytest.approx(over_parameterization_rate(union))
    assert over_parameterization_rate(union) == int(sum(u.count_nonzero() for u in union)) / 50
    for metric in (overlap, rate):
        metric.reset()
    rate.update(readings[0])
    assert float(rate.compute()) == pytest.approx(over_parameterization_rate(readings[0].values()))


def test_metrics_read_the_masks_of_a_method() -> None:
    masks = MaskSet({"fc": torch.ones(4)})
    overlap, rate, density = MaskOverlap(masks), OverParameterizationRate(masks), LayerDensity(masks)
    masks.replace({"fc": bits("1000")})
    for metric in (overlap, rate, density):
        metric.update(masks)
    assert (float(overlap.compute()), float(rate.compute()), density.compute()) == (0.25, 1.0, {"fc": 0.25})
