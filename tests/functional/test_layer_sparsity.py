"""Testable properties 4 to 8, 10 and 12 of the note on layer sparsity, on tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.functional import (
    LAYER_NORMS,
    Convolution,
    add_convolutions,
    compose,
    fold_batch_norm,
    layer_penalty,
    layer_penalty_gradient,
    layer_prox_,
    lowest_output,
    merge_convolutions,
    merge_linear,
    negative_ratio,
    regroup,
    shift_input,
    soft_threshold_,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- penalty, gradient, proximal map ------------------------------------------------------------------------------------


def by_hand(tensors: list[Tensor]) -> float:
    return sum(min(float(v), 0.0) ** 2 for t in tensors for v in t.flatten()) ** 0.5


def test_the_penalty_is_the_length_of_the_negative_entries() -> None:
    pair = [rand(4, 3), rand(4, seed=1)]
    assert float(layer_penalty(pair)) == pytest.approx(by_hand(pair), rel=1e-14)
    changed = [torch.where(t > 0, 7 * t, t) for t in pair]
    assert float(layer_penalty(changed)) == float(layer_penalty(pair))
    assert float(layer_penalty([3 * t for t in pair])) == pytest.approx(3 * by_hand(pair), rel=1e-14)
    assert float(layer_penalty([t.abs() for t in pair])) == 0
    assert float(layer_penalty([pair[0].abs(), -pair[1].abs()])) > 0, "the bias counts"


@pytest.mark.parametrize("norm", LAYER_NORMS)
def test_the_gradient_is_that_of_autograd(norm: str) -> None:
    pair = [rand(4, 3).requires_grad_(), rand(4, seed=1).requires_grad_()]
    expected = torch.autograd.grad(layer_penalty(pair, norm), pair)
    for mine, theirs in zip(layer_penalty_gradient(pair, norm), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not mine[theirs == 0].any()


def test_the_gradient_has_length_one_and_raises_negative_entries() -> None:
    pair = [rand(4, 3), rand(4, seed=1)]
    gradient = layer_penalty_gradient(pair)
    assert float(torch.cat([g.flatten() for g in gradient]).norm()) == pytest.approx(1, rel=1e-14)
    for tensor, g in zip(pair, gradient, strict=True):
        assert bool((g[tensor < 0] < 0).all())
        assert not g[tensor >= 0].any()


@pytest.mark.parametrize("norm", LAYER_NORMS)
def test_nothing_is_nan_at_zero(norm: str) -> None:
    weight = torch.zeros(3, 3, requires_grad=True)
    assert not torch.autograd.grad(layer_penalty([weight], norm), weight)[0].any()
    assert not layer_penalty_gradient([weight], norm)[0].any()
    with torch.no_grad():
        layer_prox_([weight], 0.1, norm)
    assert not weight.any()
    assert float(negative_ratio([weight])) == 0


def test_the_proximal_map_scales_negative_entries() -> None:
    pair = [rand(4, 3), rand(4, seed=1)]
    length, before = by_hand(pair), [t.clone() for t in pair]
    layer_prox_(pair, 0.25 * length)
    for new, old in zip(pair, before, strict=True):
        torch.testing.assert_close(new, torch.where(old < 0, 0.75 * old, old))
    layer_prox_(pair, 0.75 * length * (1 + 1e-12))
    assert all(bool((t >= 0).all()) and not bool(t.signbit().any()) for t in pair)


VALUES = {
    "fro": lambda rows: rows.clamp(max=0).square().sum(1).sqrt(),
    "l1": lambda rows: rows.clamp(max=0).abs().sum(1),
    "fro_sq": lambda rows: rows.clamp(max=0).square().sum(1),
}


@pytest.mark.parametrize("norm", LAYER_NORMS)
@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_nothing_near_the_proximal_map_is_better(norm: str, strength: float) -> None:
    """Of 1,000 perturbations of each size; with an l1 norm on top and without."""
    start = [rand(4, 3), rand(4, seed=1)]
    point = [t.clone() for t in start]
    for tensor in point:
        soft_threshold_(tensor, strength)
    layer_prox_(point, 0.7, norm)
    origin, best = (torch.cat([t.flatten() for t in pair])[None] for pair in (start, point))

    def objective(rows: Tensor) -> Tensor:
        near = (rows - origin).square().sum(1) / 2
        return near + 0.7 * VALUES[norm](rows) + strength * rows.abs().sum(1)

    for size in (1e-4, 1e-2, 0.3):
        assert bool((objective(best + size * rand(1000, best.numel(), seed=7)) >= objective(best) - 1e-12).all())


def test_the_ratio_does_not_know_the_scale() -> None:
    pair = [rand(4, 3), rand(4, seed=1)]
    whole = float(torch.cat([t.flatten() for t in pair]).norm())
    assert float(negative_ratio(pair)) == pytest.approx(by_hand(pair) / whole, rel=1e-12)
    assert float(negative_ratio([0.01 * t for t in pair])) == pytest.approx(float(negative_ratio(pair)), rel=1e-12)


# ---- when a layer is linear ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_lowest_output_is_attained_at_a_corner(sign: int) -> None:
    weight, bias = rand(5, 4), rand(5, seed=1)
    low, high = -0.4, 1.3
    corners = torch.tensor(list(itertools.product([low, high], repeat=4)), dtype=torch.float64)
    outputs = corners @ (sign * weight).T + bias
    torch.testing.assert_close(lowest_output(sign * weight, bias, low, high), outputs.amin(0))


def test_without_an_upper_bound_only_non_negative_layers_are_linear() -> None:
    weight, bias = rand(5, 4).abs(), rand(5, seed=1).abs()
    inf = float("inf")
    assert bool((lowest_output(weight, bias, 0.0, inf) >= 0).all())
    assert lowest_output(weight, bias - 2 * bias.max(), 0.0, inf).min() < 0
    weight[2, 1] = -1e-9
    assert lowest_output(weight, bias, 0.0, inf).min() == -inf
    assert lowest_output(weight.abs(), bias, -inf, inf).max() == -inf
    assert lowest_output(torch.zeros(2, 2), None, -inf, inf).tolist() == [0, 0]


def test_shifting_the_input() -> None:
    """ELU is bounded below by -1: inputs counted from there are non-negative."""
    weight, bias, x = rand(5, 4), rand(5, seed=1), rand(7, 4, seed=2)
    shifted, moved = shift_input(weight, bias, -1.0)
    torch.testing.assert_close((x + 1) @ shifted.T + moved, x @ weight.T + bias)
    torch.testing.assert_close(shift_input(weight, None, -1.0)[1], -weight.sum(1))


def test_deleting_the_relu_of_a_nearly_linear_layer_costs_at_most_the_bound() -> None:
    weight, bias = rand(6, 5).abs(), rand(6, seed=1).abs()
    weight[0, :2], bias[3] = -0.5, -2.0
    z = rand(1000, 5, seed=2).abs()
    pre = z @ weight.T + bias
    change = (pre.relu() - pre).norm(dim=1)
    bound = layer_penalty([weight, bias]) * torch.cat([z, torch.ones(1000, 1)], 1).norm(dim=1)
    assert bool((change <= bound + 1e-12).all())
    assert change.max() > 0
    assert not change[(pre >= 0).all(1)].any(), "exact where all pre-activations are positive"


# ---- merging ------------------------------------------------------------------------------------------------------------


def test_linear_layers_merge_into_the_successor() -> None:
    w1, b1, w2, b2 = rand(5, 4), rand(5, seed=1), rand(3, 5, seed=2), rand(3, seed=3)
    weight, bias = merge_linear((w2, b2), (w1, b1))
    torch.testing.assert_close(weight, w2 @ w1)
    torch.testing.assert_close(bias, w2 @ b1 + b2)
    for biases in ((b2, None), (None, b1), (None, None)):
        weight, bias = merge_linear((w2, biases[0]), (w1, biases[1]))
        x = rand(7, 4, seed=4)
        expected = F.linear(F.linear(x, w1, biases[1]), w2, biases[0])
        torch.testing.assert_close(F.linear(x, weight, bias), expected)


def test_products_are_rounded_once() -> None:
    layers = [(rand(64, 64, seed=i).float(), rand(64, seed=9 + i).float()) for i in range(8)]
    weight, bias = compose(layers)
    exact = compose([(w.double(), b.double()) for w, b in layers])
    assert weight.dtype == torch.float32
    assert bias is not None
    assert weight.equal(exact[0].float())
    assert bias.equal(exact[1].float())  # type: ignore[union-attr]


def run(conv: Convolution, x: Tensor) -> Tensor:
    f = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return f(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[operator]


def conv(
    i: int, o: int, k: int = 3, s: int = 1, p: int = 0, d: int = 1, g: int = 1, n: int = 2, **options: Any
) -> Convolution:
    seed = options.get("seed", 0)
    bias = rand(o, seed=seed + 1) if options.get("bias", True) else None
    return Convolution(rand(o, i // g, *[k] * n, seed=seed), bias, (s,) * n, (p,) * n, (d,) * n, g)


PAIRS = {
    "3 then 3": (conv(2, 4, p=1), conv(4, 3, seed=5)),
    "padding in front": (conv(2, 4, p=2), conv(4, 3, seed=5)),
    "strides": (conv(2, 4, s=2, p=1), conv(4, 3, s=2, seed=5)),
    "stride 3 then 2": (conv(2, 4, k=5, s=3, p=4), conv(4, 3, k=2, s=2, seed=5)),
    "without bias": (conv(2, 4, bias=False), conv(4, 3, bias=False, seed=5)),
    "first bias only": (conv(2, 4), conv(4, 3, bias=False, seed=5)),
    "dilations": (conv(2, 4, d=2, p=3), conv(4, 3, d=3, s=2, seed=5)),
    "depthwise": (conv(4, 4, g=4, p=1), conv(4, 4, g=4, seed=5)),
    "depthwise then pointwise": (conv(4, 4, g=4, p=1), conv(4, 6, k=1, seed=5)),
    "groups 4 and 6": (conv(12, 12, g=4, p=1), conv(12, 12, g=6, seed=5)),
    "1x1 without bias before a padded one": (conv(2, 4, k=1, bias=False), conv(4, 3, p=1, seed=5)),
    "strided 1x1 without bias before a padded one": (conv(2, 4, k=1, s=2, bias=False), conv(4, 3, p=1, s=2, seed=5)),
    "one dimension": (conv(2, 4, n=1, p=1), conv(4, 3, n=1, s=2, seed=5)),
    "three dimensions": (conv(2, 3, k=2, n=3, p=1), conv(3, 2, k=2, n=3, seed=5)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", [13, 14])
def test_convolutions_merge_exactly(name: str, size: int) -> None:
    first, second = PAIRS[name]
    whole = merge_convolutions(second, first)
    channels = first.weight.shape[1] * first.groups
    x = rand(2, channels, *[size] * len(first.stride), seed=11)
    expected = run(second, run(first, x))
    torch.testing.assert_close(run(whole, x), expected, rtol=1e-11, atol=1e-11)


def test_kernel_sizes_strides_and_groups() -> None:
    whole = merge_convolutions(conv(4, 3, k=3, s=2, seed=5), conv(2, 4, k=5, s=3, p=1))
    assert (whole.kernel, whole.stride, whole.padding) == ((11, 11), (6, 6), (1, 1))
    assert merge_convolutions(*reversed(PAIRS["depthwise"])).groups == 4
    assert merge_convolutions(*reversed(PAIRS["groups 4 and 6"])).groups == 2


@pytest.mark.parametrize("bias", [True, False])
def test_padding_between_is_wrong_in_the_border_ring_only(bias: bool) -> None:
    """20 of the 36 pixels of a 6x6 image, as in a public report of the same mistake."""
    first, second = conv(1, 2, p=1, bias=bias), conv(2, 1, p=1, seed=5, bias=bias)
    x = rand(1, 1, 6, 6, seed=11)
    wrong = (run(merge_convolutions(second, first), x) - run(second, run(first, x))).abs() > 1e-9
    assert int(wrong.sum()) == 20
    assert not wrong[..., 1:-1, 1:-1].any()


def test_regrouping() -> None:
    grouped = conv(12, 12, g=6)
    x = rand(1, 12, 5, 5, seed=3)
    for fewer in (1, 2, 3, 6):
        weight = regroup(grouped.weight, 6, fewer)
        torch.testing.assert_close(F.conv2d(x, weight, grouped.bias, groups=fewer), run(grouped, x))


@pytest.mark.parametrize("groups", [1, 4])
def test_a_residual_block_is_one_convolution(groups: int) -> None:
    large = conv(4, 4, k=5, p=2, g=groups)
    identity = Convolution(regroup(torch.ones(4, 1, 1, 1), 4, groups).double(), None, (1, 1), (0, 0), (1, 1), groups)
    whole = add_convolutions(large, identity)
    assert whole is not None
    x = rand(1, 4, 7, 7, seed=3)
    torch.testing.assert_close(run(whole, x), run(large, x) + x)


def test_a_projection_shortcut_too() -> None:
    large, small = conv(3, 4, k=5, s=2, p=2), conv(3, 4, k=1, s=2, seed=5)
    whole = add_convolutions(large, small)
    assert whole is not None
    x = rand(1, 3, 9, 9, seed=3)
    torch.testing.assert_close(run(whole, x), run(large, x) + run(small, x))
    assert add_convolutions(large, conv(3, 4, k=1, s=1)) is None
    assert add_convolutions(conv(3, 4, k=3, p=0), conv(3, 4, k=1)) is None, "the outputs differ in size"
    assert add_convolutions(small, large) is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_equals_evaluation_mode(affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 4, 3, bias=bias).double(), nn.BatchNorm2d(4, affine=affine).double()
    for tensor in [*norm.parameters(), norm.running_mean, norm.running_var]:
        nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
    norm.eval()
    x = rand(2, 3, 6, 6)
    weight, b = fold_batch_norm(
        layer.weight,
        layer.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(F.conv2d(x, weight, b), norm(layer(x)))
