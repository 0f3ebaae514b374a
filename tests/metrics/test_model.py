"""Numbers by layer, beside loops; plots; and what is said where matplotlib is missing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sparse.core import MaskSet, count_macs
from lightning_sparse.functional import dead_outputs, mask_churn, nonzero_counts
from lightning_sparse.metrics import (
    CKA,
    DeadUnits,
    EffectiveMACs,
    EffectiveParameters,
    HoyerSparsity,
    LayerDensity,
    MaskChurn,
    OverParameterizationRate,
    Sparsity,
)
from lightning_sparse.testing import network


def masks_of(net: nn.Module, density: float = 0.3) -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(p) < density for name, p in net.named_parameters() if p.ndim > 1}


def test_masks_and_zeros_are_two_readings() -> None:
    net, metric = network(), Sparsity()
    weights, masks = dict(net.named_parameters()), masks_of(network())
    weights["6.weight"].data[3, :64] = 0  # beyond what its mask removes
    metric.update(masks, weights)
    total = sum(mask.numel() for mask in masks.values())
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert metric.compute() == {"sparsity": pytest.approx(removed / total), "zeros": pytest.approx(64 / total)}


def test_churn_counts_what_came_and_what_went() -> None:
    before, after = (
        {"a": torch.rand(40) < 0.5, "b": torch.rand(6, 6) < 0.5},
        {"a": torch.rand(40) < 0.3, "b": torch.ones(6, 6) > 0},
    )
    lists = [[int(x) for name in "ab" for x in masks[name].flatten()] for masks in (before, after)]
    old, new = ({i for i, kept in enumerate(masks) if kept} for masks in lists)
    expected = len(old ^ new) / len(old | new)
    metric = MaskChurn(before)
    metric.update(after)
    assert float(metric.compute()) == pytest.approx(expected)
    assert mask_churn(before.values(), after.values()) == pytest.approx(expected)
    metric.update(after)
    assert float(metric.compute()) == 0
    assert mask_churn([torch.zeros(3) > 0], [torch.zeros(3) > 0]) == 0


def test_effective_macs_are_those_of_the_products_that_are_left() -> None:
    net = network()
    x = torch.ones(3, 1, 8, 8)
    macs = count_macs(net, lambda: net(x), samples=3)
    masks = masks_of(net)
    metric = EffectiveMACs(macs)
    assert metric.dense == macs
    metric.update(masks)
    positions = {"0.weight": 64, "2.weight": 16, "6.weight": 1, "8.weight": 1}  # outputs of a filter per image
    assert metric.compute() == {name: positions[name] * int(masks[name].sum()) for name in macs}
    metric.update({"8.weight": masks["8.weight"]})
    assert metric.compute()["0.weight"] == macs["0.weight"], "without a mask, dense"


def test_effective_parameters_count_biases_whole() -> None:
    net, masks = network(), MaskSet(masks_of(network()))
    masks.replace(masks_of(net, 0.5))
    metric = EffectiveParameters(net)
    metric.update(masks)
    biases = sum(p.numel() for p in net.parameters() if p.ndim == 1)
    assert sum(metric.compute().values()) == masks.kept + biases
    assert sum(metric.dense.values()) == sum(p.numel() for p in net.parameters())


def test_dead_outputs_of_convolutions_and_their_transposes() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 5, 2), nn.Flatten(), nn.Linear(4, 2))
    masks = {name: torch.ones_like(p) > 0 for name, p in net.named_parameters() if p.ndim > 1}
    masks["0.weight"][1] = False
    masks["1.weight"][:, [0, 4]] = False
    masks["1.weight"][1] = False  # an input, not an output
    metric = DeadUnits(net)
    metric.update(masks)
    assert metric.compute() == {"0.weight": 1, "1.weight": 2, "3.weight": 0}
    assert metric.dense == {"0.weight": 3, "1.weight": 5, "3.weight": 2}
    assert dead_outputs(masks["1.weight"], 1).tolist() == [True, False, False, False, True]
    metric.update({"0.weight": masks["0.weight"]})
    assert metric.compute() == {"0.weight": 1, "1.weight": 0, "3.weight": 0}
    metric.reset()
    assert set(metric.values.tolist()) == {0}


def test_counts_keep_the_order_and_see_weights_too() -> None:
    assert nonzero_counts({"b": torch.tensor([-0.0, 2.0]), "a": torch.tensor([True, True])}) == {"b": 1, "a": 2}
    assert nonzero_counts({}) == {}


def test_every_metric_draws_itself() -> None:
    pytest.importorskip("matplotlib")
    net = network()
    masks = masks_of(net)
    density = LayerDensity(masks)
    density.update(masks)
    _, axes = density.plot()
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [1.0] * 4 + list(density.compute().values())
    _, axes = MaskChurn(masks).plot([0.1, torch.tensor(0.5)])
    assert axes.lines[0].get_ydata().tolist() == [0.1, 0.5]
    assert axes.get_ylabel() == "churn"
    _, again = OverParameterizationRate(masks).plot(0.5, axes)
    assert again is axes
    sparsity = Sparsity()
    sparsity.update(masks, dict(net.named_parameters()))
    _, axes = sparsity.plot()
    assert len(axes.lines) == 2
    hoyer = HoyerSparsity()
    hoyer.update(net)
    assert hoyer.plot()[1].lines[0].get_ydata()[0] == pytest.approx(float(hoyer.compute()))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sparse.metrics.drawing.find_spec", lambda name: None)
    density = LayerDensity(masks_of(network()))
    density.update(masks_of(network()))
    for plot in (density.plot, lambda: HoyerSparsity().plot(0.5), lambda: CKA(["a", "b"]).plot(torch.eye(2))):
        with pytest.raises(
            ModuleNotFoundError, match="draws with matplotlib, which is not installed; `pip install matplotlib`"
        ):
            plot()
