"""Every kind of layer: which parameters are weights, and whether outputs, inputs and stacks lie where its row says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import Budget, Target, describe, find_targets, lay_out, layers, register_layer
from lightning_sparse.core.computed import uses_its_zeros, why_computed


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LAYER_KINDS", [*layers.LAYER_KINDS])


class Conv1D(nn.Module):
    """Laid out like that of transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Linear(nn.Module):
    """Laid out like that of torch-geometric."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Experts(nn.Module):
    """Laid out like those of transformers; with `is_transposed` like those of gpt-oss."""

    def __init__(self, count: int, hidden: int, inner: int, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        first, second = (2 * inner, hidden), (hidden, inner)
        if transposed:
            first, second = first[::-1], second[::-1]
        self.gate_up_proj = nn.Parameter(torch.randn(count, *first))
        self.down_proj = nn.Parameter(torch.randn(count, *second))

    def forward(self, x: Tensor, expert: int = 0) -> Tensor:
        up, down = self.gate_up_proj[expert], self.down_proj[expert]
        if not self.transposed:
            up, down = up.T, down.T
        gate, value = (x @ up).chunk(2, -1)
        return (gate * value) @ down


def linear_in(target: Target) -> dict[str, int]:
    return {"outputs": target.weight.shape[target.output_dim], "inputs": target.weight.shape[target.input_dim]}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(3, 5), {"weight": (5, 3, 1)}),
        (nn.Conv2d(4, 6, 3), {"weight": (6, 4, 1)}),
        (nn.ConvTranspose1d(4, 6, 3), {"weight": (6, 4, 1)}),
        (nn.Bilinear(3, 4, 5), {"weight": (5, 3, 1)}),
        (
            nn.LSTM(3, 5, 2),
            {"weight_ih_l0": (20, 3, 1), "weight_hh_l0": (20, 5, 1), "weight_ih_l1": (20, 5, 1), "weight_hh_l1": (20, 5, 1)},
        ),
        (
            nn.GRU(3, 5, bidirectional=True),
            {f"weight_{what}_l0{way}": (15, n, 1) for way in ("", "_reverse") for what, n in (("ih", 3), ("hh", 5))},
        ),
        (nn.LSTM(3, 5, proj_size=2), {"weight_ih_l0": (20, 3, 1), "weight_hh_l0": (20, 2, 1), "weight_hr_l0": (2, 5, 1)}),
        (nn.RNN(3, 5), {"weight_ih_l0": (5, 3, 1), "weight_hh_l0": (5, 5, 1)}),
        (nn.GRUCell(3, 5), {"weight_ih": (15, 3, 1), "weight_hh": (15, 5, 1)}),
        (Conv1D(6, 4), {"weight": (6, 4, 1)}),
        (Linear(4, 6), {"weight": (6, 4, 1)}),
        (Experts(3, 4, 5), {"gate_up_proj": (10, 4, 3), "down_proj": (4, 5, 3)}),
        (Experts(3, 4, 5, transposed=True), {"gate_up_proj": (10, 4, 3), "down_proj": (4, 5, 3)}),
        (Experts(3, 10, 5), {"gate_up_proj": (10, 10, 3), "down_proj": (10, 5, 3)}),
        (Experts(3, 10, 5, transposed=True), {"gate_up_proj": (10, 10, 3), "down_proj": (10, 5, 3)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_inputs_and_stacks(layer: nn.Module, expected: dict[str, tuple[int, int, int]]) -> None:
    found = {}
    for target in find_targets(layer):
        assert target.layout_known
        assert target.outputs == target.weight.shape[target.output_dim] * len(target.matrices())
        found[target.name] = (*linear_in(target).values(), len(target.matrices()))
    assert found == expected


def jacobian(layer: nn.Module, inputs: int) -> Tensor:
    return torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], torch.randn(inputs))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), Conv1D(6, 4), Linear(4, 6), Experts(3, 4, 5), Experts(3, 4, 5, True)])
def test_a_removed_input_or_output_is_one_of_the_layer(layer: nn.Module) -> None:
    """By the layer's own forward pass: what the row calls an input must not matter once its weights are zero."""
    targets = {target.name: target for target in find_targets(layer)}
    first = targets.get("weight") or targets["gate_up_proj"]
    last = targets.get("weight") or targets["down_proj"]
    with torch.no_grad():
        first.unstack(first.weight)[0].select(first.matrices()[0].input_dim, 1).zero_()
        last.unstack(last.weight)[0].select(last.matrices()[0].output_dim, 2).zero_()
    slopes = jacobian(layer, 4)
    assert slopes[:, 1].count_nonzero() == 0
    assert slopes[2].count_nonzero() == 0
    assert slopes[0, 0] != 0


def test_stacks_come_apart_and_together() -> None:
    target = Target("w", nn.Parameter(torch.arange(24.0).reshape(2, 3, 4)), output_dim=0, input_dim=2, stack_dims=(1,))
    parts = target.unstack(target.weight.detach())
    assert [part.tolist() for part in parts] == [target.weight[:, i].tolist() for i in range(3)]
    assert target.restack(parts).equal(target.weight)
    assert [(matrix.name, matrix.output_dim, matrix.input_dim) for matrix in target.matrices()][1] == ("w[1]", 0, 1)
    assert target.outputs == 6


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("structure", ["unstructured", "channel"])
def test_each_expert_is_a_layer_of_its_own(allocation: str, structure: str) -> None:
    net = nn.Sequential(nn.Linear(8, 16), Experts(4, 16, 8), nn.Linear(16, 8))
    alone = nn.Sequential(nn.Linear(8, 16), *(Experts(1, 16, 8) for _ in range(4)), nn.Linear(16, 8))
    plans = [lay_out(Budget(0.5, allocation, structure), find_targets(module)) for module in (net, alone)]
    assert plans[0].units == plans[1].units
    total, kept = plans[0].kept_weights()
    assert (total, kept["0.weight"]) == (plans[1].kept_weights()[0], plans[1].kept_weights()[1]["0.weight"])
    scores = [torch.rand_like(target.weight) for target in plans[0].targets]
    scores[1] *= torch.tensor([1.0, 2, 3, 4])[:, None, None]  # a competition would leave little of the first expert
    masks = plans[0].masks(scores)
    counts = [int(mask.count_nonzero()) for mask in masks[1]]
    assert max(counts) - min(counts) <= 2 * 16
    assert sum(counts) == kept["1.gate_up_proj"]
    if structure == "channel":
        assert all(row.all() or not row.any() for row in masks[1].flatten(0, 1))


def test_global_scores_compete_across_experts() -> None:
    plan = lay_out(Budget(0.5), find_targets(Experts(4, 16, 8)))
    scores = [torch.rand_like(target.weight) for target in plan.targets]
    scores[0][0] -= 2
    masks = plan.masks(scores)
    assert masks[0][0].count_nonzero() == 0
    assert sum(int(mask.count_nonzero()) for mask in masks) == plan.kept_units()


@pytest.mark.parametrize("layer", [Experts(2, 4, 8), Experts(2, 4, 8, transposed=True), Conv1D(8, 4), nn.LSTM(4, 8)])
def test_two_of_four_holds_along_inputs(layer: nn.Module) -> None:
    plan = lay_out(Budget(None, structure="2:4"), find_targets(layer))
    for target, mask in zip(plan.targets, plan.masks([torch.rand_like(t.weight) for t in plan.targets]), strict=True):
        groups = mask.movedim(target.input_dim, -1).reshape(-1, 4).sum(1)
        assert groups.tolist() == [2] * len(groups)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Adapted(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.a, self.b = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.b @ self.a, self.bias)


class Odd(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


@pytest.mark.parametrize(
    ("layer", "used"),
    [
        (nn.Conv2d(4, 4, 3), True),
        (Standardized(4, 6, 3), False),
        (Padded(4, 6, 3, dilation=2, groups=2), True),
        (Scaled(4, 6), True),
        (Adapted(4, 6), False),
        (Odd(4, 6), True),
        (Conv1D(6, 4), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whether_zeros_reach_what_is_used(layer: nn.Module, used: bool) -> None:
    before, rng = [p.clone() for p in layer.parameters()], torch.get_rng_state()
    assert uses_its_zeros(layer) is used
    assert all(p.equal(b) for p, b in zip(layer.parameters(), before, strict=True))
    assert rng.equal(torch.get_rng_state())


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "a parametrization"),
        (torch.nn.utils.spectral_norm(nn.Conv1d(4, 4, 1)), "a hook of torch.nn.utils"),
        (Standardized(4, 6, 3), "the forward pass of Standardized"),
    ],
    ids=["parametrization", "hook", "forward"],
)
def test_computed_weights_are_refused_or_excluded(layer: nn.Module, why: str) -> None:
    assert why_computed(layer) == why
    net = nn.ModuleDict({"body": layer, "head": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=rf"'body' .* is computed by {why}.* targets=\['!body'\]"):
        find_targets(net)
    assert [target.name for target in find_targets(net, ["!body"])] == ["head.weight"]
    assert [target.name for target in find_targets(net, ["head"])] == ["head.weight"]


def test_the_hook_form_of_weight_norm_is_refused() -> None:
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="computed by a hook"):
        find_targets(nn.Sequential(layer))


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 3, 5))
        self.matrix = nn.Parameter(torch.randn(3, 4))


def test_a_layer_of_ones_own() -> None:
    net = nn.Sequential(Mine(), nn.Linear(4, 4))
    reason = describe(net)[0].reason
    assert reason == "Mine, whose weight 'table' is not of a known kind; describe it with register_layer"
    register_layer(Mine, "table", output_dim=2, input_dim=1, stack_dims=0)
    register_layer(Mine, ["matrix"], output_dim=1, input_dim=0)
    found = {target.name: (target.outputs, len(target.matrices())) for target in find_targets(net)}
    assert found == {"0.table": (10, 2), "0.matrix": (4, 1), "1.weight": (4, 1)}


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("Mine",), {}, "'Mine' is not a layer type; give a class such as nn.Linear"),
        ((Mine, []), {}, "name at least one weight of Mine"),
        ((Mine,), {"output_dim": 1}, "output_dim=1, input_dim=1 .* must be different dimensions"),
        ((Mine,), {"stack_dims": (0,)}, r"stack_dims=\(0,\) of Mine must be different"),
        ((Mine,), {"output_dim": -1}, "counted from 0"),
    ],
)
def test_what_cannot_be_registered(arguments: tuple[Any, ...], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        register_layer(*arguments, **options)


@pytest.mark.parametrize("structure", ["channel", "2:4"])
def test_structures_refuse_what_is_laid_out_in_an_unknown_way(structure: str) -> None:
    misfit = Budget(None if structure == "2:4" else 0.5, structure=structure).structure.misfit
    net = nn.Sequential(Mine(), nn.Linear(4, 4))
    unknown = next(target for target in find_targets(net, ["type:Mine"]) if target.name == "0.table")
    assert "in a layer of an unknown type" in str(misfit(unknown))
    assert "register_layer" in str(misfit(unknown))
