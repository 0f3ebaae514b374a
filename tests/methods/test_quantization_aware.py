"""Quantization-aware training: weights on the grid of int8, zeros that stay, codes that come out as they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_sparse import STR, KeepSparsity, MagnitudePruning, QuantizationAware
from lightning_sparse import SparseConnectivityLearning as SCL
from lightning_sparse.functional import fake_quantize, round_symmetric
from lightning_sparse.testing import Toy, fit, toy

# ---- mathematics --------------------------------------------------------------------------------------------------------


def test_weights_are_rounded_to_codes_of_their_output() -> None:
    weight = torch.tensor([[0.0, 1.0, -3.0, 1.6], [0.0, 0.45, 0.24, -1.0]])
    expected = torch.tensor([[0.0, 1.0, -3.0, 2.0], [0.0, 1 / 3, 1 / 3, -1.0]])
    torch.testing.assert_close(round_symmetric(weight, bits=3), expected)  # scales of 1 and 1/3
    assert torch.equal(round_symmetric(weight.t(), (1,), bits=3), round_symmetric(weight, bits=3).t())
    assert torch.equal(round_symmetric(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(round_symmetric(torch.tensor([3.0, -2.0]), (0,)), torch.tensor([3.0, -2.0])), "a scale for each"


def test_rounding_agrees_with_a_loop_and_with_torch() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 2, 2)
    scales = weight.abs().amax((1, 2, 3)) / 127
    expected = torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(5, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(round_symmetric(weight), expected)
    for row, rounded, scale in zip(weight, round_symmetric(weight), scales, strict=True):
        for value, found in zip(row.flatten().tolist(), rounded.flatten().tolist(), strict=True):
            assert found == pytest.approx(round(value / float(scale)) * float(scale), abs=float(scale) * 1e-3)


def test_inputs_are_rounded_sample_by_sample_with_zero_kept() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.4, 2.0], [0.0, 0.1, 0.24, 0.3]], requires_grad=True)
    found = fake_quantize(x, bits=2)  # steps of 1 and 0.1, zero among the codes
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0.0, 1.0, 2.0], [0.0, 0.1, 0.2, 0.3]]))
    found.backward(torch.arange(8.0).reshape(2, 4))
    assert torch.equal(x.grad, torch.arange(8.0).reshape(2, 4)), "straight through"  # type: ignore[arg-type]
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    for sample, rounded in zip(x, fake_quantize(x), strict=True):
        low, high = min(float(sample.min()), 0.0), max(float(sample.max()), 0.0)
        scale = (high - low) / 255
        expected = torch.fake_quantize_per_tensor_affine(sample, scale, round(-low / scale), 0, 255)
        torch.testing.assert_close(rounded, expected, atol=1e-5, rtol=0)
    assert torch.equal(fake_quantize(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert fake_quantize(torch.ones(0, 3)).shape == (0, 3)


# ---- training -----------------------------------------------------------------------------------------------------------


def pair(**options: Any) -> tuple[MagnitudePruning, QuantizationAware]:
    return MagnitudePruning(0.8, start=0, end=0.3, every="1 step", allocation="uniform"), QuantizationAware(**options)


@pytest.mark.parametrize("turned", [False, True])
def test_the_model_is_on_the_grid_and_keeps_its_zeros(turned: bool) -> None:
    torch.manual_seed(0)
    module = toy("adamw")
    pruning, quantization = pair(bits=4)
    dense = {}

    def remember(*_: Any) -> None:
        dense.update({name: tensor.clone() for name, tensor in quantization.dense.items()})

    quantization.release = remember  # type: ignore[method-assign]
    fit(module, *([quantization, pruning] if turned else [pruning, quantization]))
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            codes = weight.detach().flatten(1) / (weight.detach().flatten(1).abs().amax(1, keepdim=True) / 7).clamp(min=1e-9)
            torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
            dropped = pruning.masks.dropped(name)
            assert bool(dropped.any())
            assert not weight[dropped].any()
            assert len(codes.round().unique()) <= 15
            assert not torch.equal(dense[name], weight), "the optimizer moves something finer"
    assert list(module.state_dict()) == list(toy("adamw").state_dict())


def test_the_optimizer_moves_dense_weights_by_the_gradient_of_rounded_ones() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    module = Toy("sgd", net)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    dense = net[1].weight.detach().clone()
    rounded = round_symmetric(dense)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = net[1].weight.register_hook(lambda grad: seen.append((net[1].weight.detach().clone(), grad.clone())))
    quantization = QuantizationAware(inputs=False)
    fit(module, quantization, max_steps=1)
    handle.remove()
    ((at, grad),) = seen
    assert torch.equal(at, rounded)
    torch.testing.assert_close(quantization.dense["net.1.weight"], dense - 0.1 * grad)
    assert torch.equal(net[1].weight.detach(), round_symmetric(quantization.dense["net.1.weight"]))


def test_layers_are_given_rounded_inputs_until_the_fit_ends() -> None:
    torch.manual_seed(0)
    module = toy("sgd")
    seen: list[torch.Tensor] = []
    module.net[6].register_forward_hook(lambda layer, args, out: seen.append(args[0].detach()))
    fit(module, QuantizationAware(), max_steps=1, limit_val_batches=0)
    (x,) = seen
    assert torch.equal(fake_quantize(x), x) or (fake_quantize(x) - x).abs().max() < 1e-6
    assert all(len(sample.unique()) <= 256 for sample in x)
    assert not module.net[6]._forward_pre_hooks


def test_codes_come_out_of_the_export_as_they_were_trained(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import numpy_helper

    from lightning_sparse.export import save_int8

    torch.manual_seed(0)
    module = toy("sgd")
    module.net[1] = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())  # a normalization that will be folded
    fit(module, *pair())
    x = torch.randn(16, 1, 8, 8)
    found = save_int8(module, x, tmp_path / "net.onnx", [x], network="net")
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(tmp_path / "net.onnx")).graph.initializer}
    for layer in (0, 2, 6, 8):
        weight = module.net[layer].weight.detach().flatten(1).double()
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = torch.where(scale > 0, weight / scale, 0).round()
        code = torch.from_numpy(stored[f"{layer}.weight"].astype("float64")).flatten(1)
        sign = torch.sign((codes * code).sum(1, keepdim=True))  # a normalization may turn signs
        assert torch.equal(code, codes * sign)
    assert found.rounded == 0, "what is zero in int8 is zero in the checkpoint"


def test_masks_that_are_read_off_a_sparse_model_are_its_zeros() -> None:
    torch.manual_seed(0)
    module = toy("sgd")
    weights = {name: weight for name, weight in module.named_parameters() if weight.ndim > 1}
    for weight in weights.values():
        weight.data[torch.rand_like(weight) < 0.5] = 0
        weight.data[weight.data.abs() < 0.1] *= 1e-3  # kept, and rounded to zero
    zeros = {name: weight == 0 for name, weight in weights.items()}
    share = sum(int(zero.sum()) for zero in zeros.values()) / sum(zero.numel() for zero in zeros.values())
    frozen = MagnitudePruning(share, start=0, end=0)
    fit(module, QuantizationAware(), frozen, max_steps=2)
    assert all(torch.equal(frozen.masks.dropped(name), zero) for name, zero in zeros.items())


# ---- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [STR, lambda: SCL(0.5)])
def test_methods_that_hold_weights_of_their_own_are_refused(other: Any) -> None:
    method = other()
    sentence = rf"{method.label} and QuantizationAware both keep a 'net.0.weight' that differs from the model's; train with"
    with pytest.raises(ValueError, match=sentence):
        fit(toy("sgd"), method, QuantizationAware())


def test_two_of_them_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both keep a 'net.0.weight' that differs from the model's"):
        fit(toy("sgd"), QuantizationAware(), QuantizationAware(bits=4, name="again"))


def test_zeros_that_nobody_holds_are_refused() -> None:
    def sparse() -> Toy:
        module = toy("sgd")
        weight = module.get_parameter("net.0.weight")
        weight.data[torch.rand_like(weight) < 0.5] = 0
        return module

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"% of 'net.0.weight' are zero, and QuantizationAware alone .* add KeepSparsity"):
        fit(sparse(), QuantizationAware())
    fit(sparse(), QuantizationAware(targets="!net.0"), max_steps=1)
    fit(sparse(), QuantizationAware(), KeepSparsity(), max_steps=1)
    again = toy("sgd")
    method = QuantizationAware(bits=3)
    fit(again, method, max_steps=2)
    assert float((again.get_parameter("net.0.weight") == 0).float().mean()) > 0.1
    fit(again, method, max_steps=1)  # what rounding has made zero is no mask
