"""Exports of networks that take more than one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import Call, callee, exchange, tensors_in
from lightning_sparse.export import (
    choose_kernels,
    coupled_outputs,
    export_ladder,
    merge_layers,
    onnx_runner,
    recalibrate,
    remove_dead,
    save_onnx,
)
from tests.helpers.structured import MODULES, Dictionary, HuggingFace, batch_of, encoded

INPUTS: dict[str, Any] = {
    "diffusion": (batch_of()[0], torch.tensor([0, 3, 5, 9])),
    "tokens": batch_of()[1],
    "dictionary": ({"image": batch_of()[0], "scale": 2},),
    "hugging face": {name: tensor for name, tensor in encoded().items() if name != "labels"},
}
WIDE = {"diffusion": "wide", "tokens": "wide", "dictionary": "layers.1", "hugging face": "encoder.wide"}


def half_dead(name: str) -> Any:
    """With every other neuron of a hidden layer dead."""
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    layer: Any = module.net.get_submodule(WIDE[name])
    with torch.no_grad():
        layer.weight[::2] = 0
        layer.bias[::2] = 0
    return module


@pytest.mark.parametrize("name", MODULES)
def test_dead_neurons_leave_networks_that_take_anything(name: str) -> None:
    pytest.importorskip("torch_pruning")
    module = half_dead(name)
    smaller, removal = remove_dead(module, INPUTS[name])
    size = len(module.net.get_submodule(WIDE[name]).weight)
    assert removal.removed == {f"net.{WIDE[name]}": size // 2}
    call = Call.of(INPUTS[name])
    for expected, found in zip(tensors_in(call(module)), tensors_in(call(smaller)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MODULES)
def test_the_ladder_of_networks_that_take_anything(name: str, tmp_path: Path) -> None:
    for library in ("torch_pruning", "safetensors", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    rungs: Any = ["plain", "compact", "removed", "onnx"]
    report = export_ladder(half_dead(name), INPUTS[name], tmp_path / "out", rungs=rungs, rounds=1, compiled=False)
    dense, removed = report.rungs["dense"], report.rungs["removed"]
    assert removed.macs is not None
    assert dense.macs is not None
    assert removed.macs < dense.macs
    assert report.batch_size == 4
    assert all((tmp_path / "out" / str(report.rungs[rung].file)).is_file() for rung in rungs)


def test_onnx_of_named_inputs_takes_batches_of_any_size(tmp_path: Path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    module = HuggingFace().eval()
    save_onnx(module, INPUTS["hugging face"], tmp_path / "model.onnx", network="net")
    inputs = {name: tensor.repeat(3, 1) for name, tensor in INPUTS["hugging face"].items()}
    inputs["attention_mask"][1:, 4:] = 0
    with torch.no_grad():
        expected = module.net(**inputs).logits
    run = onnx_runner(tmp_path / "model.onnx")
    torch.testing.assert_close(run(inputs), expected, rtol=1e-4, atol=1e-5)
    turned = {"attention_mask": inputs["attention_mask"], "input_ids": inputs["input_ids"]}
    torch.testing.assert_close(run(turned), expected, rtol=1e-4, atol=1e-5)


def test_merging_with_a_dictionary_as_input() -> None:
    module = Dictionary().eval()
    with torch.no_grad():
        module.net.layers[3].weight.abs_()  # type: ignore[union-attr, operator, index]
        module.net.layers[3].bias.abs_()  # type: ignore[union-attr, operator, index]
    smaller, report = merge_layers(module, INPUTS["dictionary"], rounds=0)
    assert report.merged == ["net.layers.3"]
    assert report.change is not None
    assert report.change[0] < 1e-5 < report.change[1]
    assert report.macs is not None
    assert report.macs[0] > report.macs[1]
    assert Call.of(INPUTS["dictionary"])(smaller)["logits"].shape == (4, 4)


class Two(L.LightningModule):
    """Two networks, and nothing says which one is called."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        self.teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_a_network_is_named_where_there_are_several() -> None:
    module, x = Two().eval(), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"Two has no forward and holds the networks \['student', 'teacher'\].* as network"):
        coupled_outputs(module, x)
    with pytest.raises(ValueError, match=r"network='net' is not a submodule of Two; it has \['student', 'teacher'\]"):
        choose_kernels(module, x, network="net")
    pytest.importorskip("torch_pruning")
    assert coupled_outputs(module, x, network="student") == [["student.0"]]
    assert coupled_outputs(module, (x,), network="teacher") == [["teacher.0"]]
    choices = {choice.layer: choice.note for choice in choose_kernels(module, {"input": x}, network="student")}
    assert choices["teacher.0"] == "not called in a forward pass"
    assert choices["student.0"] == "less than half of it is zero"
    assert recalibrate(module, [x, (x,)], network="student") == 1
    with torch.no_grad():
        module.student[3].weight[:, 1] = 0
    assert remove_dead(module, x, network="student")[1].removed == {"student.0": 1}


def test_a_single_network_is_found_even_if_it_cannot_be_traced() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    untraceable = Dictionary()
    untraceable.net = Branching(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert callee(untraceable) == ("net", untraceable.net)
    module = Dictionary()
    assert callee(module) == ("net", module.net)
    assert callee(module, "net.layers") == ("net.layers", module.net.layers)


@dataclass
class Record:
    x: Tensor
    name: str


def test_structures_are_kept() -> None:
    batch = encoded()
    made = exchange(batch, lambda tensor: tensor[:1])
    assert type(made) is type(batch)
    assert made.input_ids.shape == (1, 6)
    assert batch.input_ids.shape == (4, 6), "the original stays"
    record = Record(torch.ones(2), "a")
    assert exchange([record, 3], lambda tensor: tensor * 2)[0].x.tolist() == [2, 2]
    assert record.x.tolist() == [1, 1]
    call = Call.of((torch.ones(4, 2), {"steps": torch.arange(4), "scale": torch.ones(3)}))
    half = call.first(2)
    assert [len(tensor) for tensor in half.tensors] == [2, 2, 3]
    assert [tensor.dtype for tensor in half.fit(nn.Linear(1, 1).half()).tensors] == [
        torch.float16,
        torch.int64,
        torch.float16,
    ]
    listed = Call.of(([torch.ones(3, 8, 8), torch.ones(3, 6, 6)],))
    assert listed.first(1) is listed, "samples of a detector are items, not rows"
