"""Eight bits: no zero is lost, accuracy decides, and calibration data must reach every layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import Call
from lightning_sparse.export import Quantization, compressed_size, export_ladder, onnx_runner, save_int8, save_onnx
from lightning_sparse.export.int8 import check_zeros
from lightning_sparse.export.quantization import Elsewhere, relative_error

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 5)),
    )
    net(torch.randn(32, 3, 8, 8))  # running statistics
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data[torch.rand_like(layer.weight) < 0.8] = 0
    return net.eval()


def arrays(path: Path) -> dict[str, Any]:
    from onnx import numpy_helper

    return {t.name: numpy_helper.to_array(t).copy() for t in onnx.load(str(path)).graph.initializer}


def test_every_weight_is_rounded_to_the_nearest_code_of_its_output(tmp_path: Path) -> None:
    net, x = convolutional(), torch.randn(16, 3, 8, 8)
    found = save_int8(net, x, tmp_path / "net.onnx", [x, torch.randn(16, 3, 8, 8)])
    stored = arrays(tmp_path / "net.onnx")
    weights = [layer.weight.detach() for layer in net if isinstance(layer, nn.Conv2d | nn.Linear)]
    codes = [stored[f"{index}.weight"] for index in (0, 3, 6, 8)]
    assert all(code.dtype == "int8" for code in codes)
    zeros = 0
    for weight, code in zip(weights[1:], codes[1:], strict=True):  # the first has its normalization folded in
        rows = weight.double().flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        expected = torch.where(scale > 0, rows / scale, 0).round().reshape(weight.shape)
        assert (expected - torch.from_numpy(code).double()).abs().max() <= 1, "ties may go either way in float32"
        assert (expected != torch.from_numpy(code)).double().mean() < 0.01
    for weight in weights:
        zeros += int((weight == 0).sum())
    assert (found.weights, found.zeros, found.left) == (sum(w.numel() for w in weights), zeros, ())
    assert sum(int((code == 0).sum()) for code in codes) == zeros + found.rounded
    expected = net(x)
    assert relative_error(expected, onnx_runner(tmp_path / "net.onnx")(x)) < 0.03
    assert onnx_runner(tmp_path / "net.onnx")(x[:1]).shape == (1, 5)
    save_onnx(net, x, tmp_path / "float.onnx")
    assert compressed_size(tmp_path / "net.onnx") < 0.45 * compressed_size(tmp_path / "float.onnx")
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)


class Scaled(nn.Module):
    """Factors behind a layer, as in ConvNeXt, some of which are zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.factors, self.out = nn.Conv2d(3, 8, 3), nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5), nn.Linear(8, 4)
        self.conv.weight.data[:4] = 0
        self.factors.data[:, :4] = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out((self.conv(x) * self.factors).mean((2, 3)))
        return out


def test_factors_behind_a_layer_are_no_weights_and_keep_their_zeros_too(tmp_path: Path) -> None:
    net, x = Scaled().eval(), torch.randn(16, 3, 8, 8)
    found = save_int8(net, x, tmp_path / "net.onnx", [x])
    assert (found.weights, found.zeros) == (8 * 27 + 32, 4 * 27)
    assert relative_error(net(x), onnx_runner(tmp_path / "net.onnx")(x)) < 0.05


class Recurrent(nn.Module):
    """Recurrent layers stay float in onnxruntime, which stores their gates in another order; slopes are no weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.rnn, self.out = (
            nn.Conv1d(3, 8, 3),
            nn.PReLU(8),
            nn.GRU(8, 6, bidirectional=True),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(self.act(self.conv(x)).permute(2, 0, 1))[0][-1])
        return out


def test_weights_that_stay_float_have_the_names_of_the_model(tmp_path: Path) -> None:
    net, x = Recurrent().eval(), torch.randn(16, 3, 8)
    found = save_int8(net, x, tmp_path / "net.onnx", [x])
    assert found.weights == 8 * 9 + 48
    assert sorted(found.left) == sorted(name for name in dict(net.named_parameters()) if name.startswith("rnn.weight"))


def test_a_lost_zero_is_found(tmp_path: Path) -> None:
    from onnx import numpy_helper

    def file(name: str, **tensors: list[list[float]]) -> Path:
        model = onnx.ModelProto()
        kinds = {"w": "float32", "w_quantized": "int8", "w_zero_point": "int8"}
        for key, values in tensors.items():
            model.graph.initializer.append(numpy_helper.from_array(numpy.array(values, kinds[key]), key))
        onnx.save(model, str(tmp_path / name))
        return tmp_path / name

    whole = file("float.onnx", w=[[0, 0.001, 1], [0, 0, -2]])
    found = check_zeros(whole, file("good.onnx", w_quantized=[[0, 0, 127], [0, 0, -127]], w_zero_point=[[0, 0]]), {})
    assert (found.weights, found.zeros, found.rounded) == (6, 3, 1)
    with pytest.raises(ValueError, match=r"zeros of 'w' would be lost: 2 have a code other than 0"):
        check_zeros(whole, file("bad.onnx", w_quantized=[[1, 0, 127], [0, -1, -127]], w_zero_point=[[0, 0]]), {})
    with pytest.raises(ValueError, match=r"code 0 stands for another number in 1 outputs"):
        check_zeros(whole, file("off.onnx", w_quantized=[[0, 0, 127], [0, 0, -127]], w_zero_point=[[3, 0]]), {})
    with pytest.raises(ValueError, match=r"onnxruntime quantizes no weight of this model; it has"):
        check_zeros(whole, file("none.onnx"), {})


def test_calibration_must_reach_every_layer(tmp_path: Path) -> None:
    net, x = convolutional(), torch.rand(4, 3, 8, 8)
    net[0].weight.data.abs_()
    net[1].running_mean.zero_()
    with pytest.raises(ValueError, match=r"layer '3' is given nothing but zeros by the 1 batches of calibration data"):
        save_int8(net, x, tmp_path / "int8.onnx", [torch.full((4, 3, 8, 8), -100.0)])
    assert not (tmp_path / "int8.onnx").exists()


class Two(nn.Module):
    """An expert for positive inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out + self.second(x) if bool((x > 0).any()) else out


def test_a_layer_that_calibration_does_not_call_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer 'second' is not called with the 1 batches of calibration data"):
        save_int8(Two().eval(), torch.ones(3, 4), tmp_path / "int8.onnx", [-torch.ones(3, 4)])


# ---- as a rung ----------------------------------------------------------------------------------------------------------


def fixed(net: nn.Module, x: Tensor) -> Callable[[nn.Module], dict[str, float]]:
    """Agreement with a network's own classes."""
    classes = net(x).argmax(1)
    return lambda module: {"accuracy": float((module(x).argmax(1) == classes).float().mean()), "loss": 100.0 * len(x)}


def test_the_rung_is_judged_by_its_metrics(tmp_path: Path) -> None:
    net, x = convolutional(), torch.randn(16, 3, 8, 8)
    names = ["onnx", "int8"]
    quantization = Quantization((batch for batch in [x, x + 0.1]), tolerance=0.05)
    report = export_ladder(
        net, x, tmp_path / "out", rungs=names, rounds=1, compiled=False, evaluate=fixed(net, x), quantization=quantization
    )
    row = report.rungs["int8"]
    assert row.runtime == "onnxruntime"
    assert row.metrics["accuracy"] >= 0.95
    assert (row.bytes or 0) < 0.5 * (report.rungs["onnx"].bytes or 0)
    assert 0 < (row.change or 0) < 0.1 * (row.largest or 0)
    assert "weights are all kept" in row.note
    assert report.outcome("int8").startswith("smaller")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "model-int8.onnx", "report.json"}
    assert onnx_runner(tmp_path / "out" / "model-int8.onnx")(x[:2]).shape == (2, 5)


def test_what_loses_too_much_is_not_written(tmp_path: Path) -> None:
    net, x = convolutional(), torch.randn(16, 3, 8, 8)
    seen: list[nn.Module] = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        seen.append(module)
        module(x)
        return {"accuracy": 0.9 if len(seen) == 1 else 0.85, "loss": float(len(seen))}

    options: dict[str, Any] = {"quantization": Quantization([x]), "evaluate": evaluate, "rounds": 0}
    sentence = "rung 'int8': it changes accuracy from 0.9000 to 0.8500 where 0.01 is allowed; train it quantization-aware"
    with pytest.raises(ValueError, match=sentence):
        export_ladder(net, x, tmp_path / "named", rungs=["int8"], **options)
    assert not (tmp_path / "named").exists()
    options["evaluate"] = None
    options["quantization"] = Quantization([x], error=1e-4)
    made = export_ladder(net, x, tmp_path / "all", **options)
    assert made.rungs["int8"].file is None
    assert "(root mean square) where 0.0% is allowed" in made.rungs["int8"].note
    assert not (tmp_path / "all" / "model-int8.onnx").exists()
    assert (tmp_path / "all" / "model.onnx").exists()


def test_metrics_of_something_else_are_not_taken_for_those_of_the_rung(tmp_path: Path) -> None:
    net, x = convolutional(), torch.randn(4, 3, 8, 8)
    options: dict[str, Any] = {"rungs": ["int8"], "quantization": Quantization([x]), "rounds": 0}
    made = export_ladder(net, x, tmp_path / "out", evaluate=lambda module: {"accuracy": 0.5}, **options)
    assert made.rungs["int8"].metrics == {}
    assert "evaluate does not call its network, so it has no metrics" in made.rungs["int8"].note


def test_a_network_that_is_computed_elsewhere_returns_what_it_returned() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(x)}

    elsewhere = Elsewhere(Named(), Call.of(torch.ones(2, 3)), lambda call: call.tensors[0] + 1)
    found = elsewhere.module(torch.zeros(4, 3))
    assert torch.equal(found["logits"], torch.ones(4, 3))
    assert elsewhere.calls == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Quantization([]), "calibration contains no batch; give some from the training set."),
        (lambda: Quantization([torch.ones(1)], tolerance=0), "tolerance=0 must be above 0: int8 rounds."),
        (lambda: Quantization([torch.ones(1)], error=-1), "error=-1 must be above 0: int8 rounds."),
        (
            lambda: export_ladder(convolutional(), torch.ones(1, 3, 8, 8), "nowhere", rungs=["int8"]),
            "rung 'int8': int8 is calibrated on training batches; give quantization=Quantization(batches). Nothing was "
            "written.",
        ),
    ],
)
def test_what_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError) as said:  # noqa: PT011
        make()
    assert str(said.value) == sentence
