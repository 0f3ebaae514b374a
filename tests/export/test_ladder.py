"""The ladder: verified before it is written, honest about what it gained, one sentence where it cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.export import (
    RUNGS,
    SparseLinear,
    choose_kernels,
    choose_semi_structured,
    export_ladder,
    load_model,
    onnx_runner,
    use_kernels,
)
from lightning_sparse.export.compare_models import Timing, interleaved
from lightning_sparse.export.rungs import Ladder
from lightning_sparse.export.semi_structured import why_not
from lightning_sparse.models import MLP, Classifier, ResNet
from lightning_sparse.testing import trainer

for package in ("torch_pruning", "safetensors", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

Digit = Callable[[], Classifier]


def perceptron() -> Classifier:
    return Classifier(lambda *a: MLP(*a, hidden=(256, 256)), 10, 1, 8)


def resnet() -> Classifier:
    return Classifier(lambda *a: ResNet(*a, depth=8), 10, 1, 8)


def trained(make: Digit, structure: str, sparsity: float, epochs: int) -> Classifier:
    """A network trained on digits with masks."""
    from lightning_sparse import MagnitudePruning
    from lightning_sparse.data import Digits

    torch.manual_seed(0)
    module = make()
    trainer(MagnitudePruning(sparsity, structure=structure, allocation="uniform"), max_epochs=epochs).fit(module, Digits())
    return module.eval()


def images(count: int = 32) -> Tensor:
    from lightning_sparse.data import Digits

    data = Digits(batch_size=count)
    data.setup("test")
    x: Tensor = next(iter(data.test_dataloader()))[0]
    return x


def accuracy(module: nn.Module) -> dict[str, float]:
    from lightning_sparse.data import Digits

    data = Digits()
    data.setup("test")
    with torch.no_grad():
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    return {"accuracy": right / len(data.parts["test"][1])}


def test_all_rungs_of_a_trained_perceptron(tmp_path: Path) -> None:
    module, x = trained(perceptron, "unstructured", 0.97, 15), images()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    names = ["plain", "compact", "removed", "onnx"]
    report = export_ladder(module, x, tmp_path / "out", rungs=names, rounds=3, compiled=False, evaluate=accuracy)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    expected = module(x)
    plain = perceptron().eval()
    plain.load_state_dict(torch.load(tmp_path / "out" / "plain.pt", weights_only=True), strict=True)
    assert torch.equal(plain(x), expected)
    assert torch.equal(load_model(perceptron().eval(), tmp_path / "out" / "compact.safetensors")(x), expected)
    small = load_model(perceptron().eval(), tmp_path / "out" / "removed.safetensors")
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(onnx_runner(tmp_path / "out" / "model.onnx")(x[:3]), expected[:3], rtol=1e-4, atol=1e-5)
    rungs = report.rungs
    assert list(rungs) == ["dense", "dense, onnxruntime", *names]
    assert (rungs["removed"].parameters or 0) < (rungs["dense"].parameters or 0)
    assert (rungs["compact"].bytes or 0) < 0.18 * (rungs["dense"].bytes or 0)
    assert rungs["dense"].metrics == rungs["plain"].metrics == rungs["compact"].metrics == rungs["removed"].metrics
    assert rungs["dense"].metrics["accuracy"] > 0.8
    assert "no faster" in rungs["plain"].note
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["rungs"]["removed"]["change"] <= 1e-5 * max(1, written["rungs"]["removed"]["largest"])
    assert set(written["rungs"]["dense"]["latency"]) == {"1", "32"}
    assert written["recommendation"] == report.recommendation
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", *(rungs[name].file for name in names)}


def test_a_residual_network_with_channel_masks_folded(tmp_path: Path) -> None:
    module, x = trained(resnet, "channel", 0.5, 3), images()
    report = export_ladder(module, x, tmp_path / "out", fold=True, rounds=1, compiled=False)
    assert "normalizations are folded" in report.rungs["plain"].note
    again = load_model(resnet().eval(), tmp_path / "out" / "compact.safetensors")
    torch.testing.assert_close(again(x), module(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in again.modules())
    removed = report.rungs["removed"]
    assert removed.change is not None
    assert (removed.parameters or 0) < (report.rungs["plain"].parameters or 0)
    assert (removed.macs or 0) < (report.rungs["plain"].macs or 0)
    for name in ("merged", "semi_structured"):
        assert report.rungs[name].file is None
        assert report.rungs[name].note


def test_merged_layers_are_a_program_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    net[2].weight.data.abs_()
    net[2].bias.data.abs_()
    x = torch.randn(6, 4)
    report = export_ladder(net, x, tmp_path / "out", rungs=["merged"], rounds=0)
    program = torch.export.load(tmp_path / "out" / "merged.pt2").module()
    torch.testing.assert_close(program(x[:1]), net(x[:1]))
    assert "3 layers became 2" in report.rungs["merged"].note


# ---- kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["csr", "bsr4", "bsr16"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)])
def test_sparse_kernels_compute_the_same(kernel: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(64, 32, bias=bias).double()
        layer.weight.data *= (torch.rand(8, 16) < 0.3).repeat_interleave(4, 0).repeat_interleave(4, 1)
        x = torch.randn(shape, dtype=torch.double)
        torch.testing.assert_close(SparseLinear(layer, kernel)(x), layer(x))


def test_each_linear_layer_is_measured_and_slower_ones_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    for index in (0, 2):
        net[index].weight.data[torch.rand(64, 64) < 0.9] = 0
    times = iter([{"dense": 1.0, "csr": 0.5, "bsr4": 0.7}, {"dense": 1.0, "csr": 0.97}])
    monkeypatch.setattr(
        "lightning_sparse.export.kernels.interleaved",
        lambda functions, rounds: {name: Timing(t, t, t) for name, t in next(times).items()},
    )
    first, second, last = choose_kernels(net, torch.randn(4, 64))
    assert (first.chosen, second.chosen, last.chosen) == ("csr", "dense", "dense")  # 3 % may be noise
    assert last.note == "less than half of it is zero"
    assert use_kernels(net, {"0": "csr"})[0].kernel == "csr"


def test_layers_without_a_sparse_kernel_say_why() -> None:
    half = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16))
    half[0].weight.data.zero_()
    (choice,) = choose_kernels(half, torch.randn(2, 8))
    assert choice.note == "no sparse kernel for bfloat16 on cpu; move the model to the CPU in float32"
    layer = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"kernel='bsr4' needs sizes that are multiples of 4, not \(6, 6\)"):
        SparseLinear(layer, "bsr4")
    with pytest.raises(ValueError, match=r"kernel='coo' is unknown; choose condensed, csr, bsr4, bsr8, bsr16, bsr32 or 2:4"):
        SparseLinear(layer, "coo")
    with pytest.raises(ValueError, match="'0' is a ReLU; only linear layers have sparse kernels"):
        use_kernels(nn.Sequential(nn.ReLU()), {"0": "csr"})


def test_kernels_are_chosen_again_when_the_file_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()
    net[0].weight.data[torch.rand(1024, 1024) < 0.99] = 0
    x = torch.randn(64, 1024)
    export_ladder(net, x, tmp_path / "out", rungs=["kernels"], rounds=1, compiled=False)
    again = load_model(
        nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)), tmp_path / "out/kernels.safetensors"
    )
    assert isinstance(again[0], SparseLinear)
    torch.testing.assert_close(again(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_layer_with_two_names_gets_its_kernel_under_both() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    layer.weight.data[:, 1:] = 0
    net = nn.ModuleDict({"first": layer, "calls": nn.Sequential(layer, nn.ReLU(), layer)})
    x = torch.randn(3, 8)
    before = net["calls"](x)
    assert type(use_kernels(net, {"first": "csr"})["calls"][2]) is SparseLinear
    assert net["first"] is net["calls"][0] is net["calls"][2]
    torch.testing.assert_close(net["calls"](x), before)


def test_a_transformer_calls_the_kernels_instead_of_reading_their_weights() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    for layer in (net.linear1, net.linear2):
        layer.weight.data[torch.rand_like(layer.weight) < 0.9] = 0
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = net(x)
        assert [choice.layer for choice in choose_kernels(net, x, rounds=1) if choice.milliseconds] == ["linear1", "linear2"]
        torch.testing.assert_close(use_kernels(net, {"linear1": "csr", "linear2": "bsr4"})(x), expected)


# ---- 2:4 ----------------------------------------------------------------------------------------------------------------


def two_of_four(rows: int, columns: int) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    layer.weight.data.view(rows, -1, 4)[:, :, :2] = 0
    return layer


def test_why_a_layer_is_not_two_of_four() -> None:
    dense = nn.Linear(64, 32)
    assert "train with structure='2:4'" in why_not(dense)
    dense.weight.data.view(32, -1, 4)[:, :, 0] = 0
    assert "train with structure='2:4'" in why_not(dense), "three of four"
    assert "float32 has no sparse kernel" in why_not(two_of_four(32, 64))
    assert "its size 16 x 64 is not a multiple of 32 x 64" in why_not(two_of_four(16, 64).to(torch.bfloat16))
    assert why_not(two_of_four(32, 64).to(torch.bfloat16), needs_gpu=False) == ""
    if not torch.cuda.is_available():
        assert "it needs a CUDA device of compute capability 8.0" in why_not(two_of_four(32, 64).to(torch.bfloat16))
        with pytest.raises(ValueError, match=r"size \(32, 64\) cannot be 2:4: it needs a CUDA device"):
            use_kernels(nn.Sequential(two_of_four(32, 64).to(torch.bfloat16)), {"0": "2:4"})


@pytest.mark.gpu
def test_two_of_four_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an Ampere GPU")
    torch.manual_seed(0)
    net = nn.Sequential(two_of_four(4096, 4096), nn.ReLU(), nn.Linear(4096, 8)).to("cuda", torch.bfloat16)
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    choices = choose_semi_structured(net, x)
    assert choices[0].milliseconds.keys() == {"dense", "2:4"}
    assert "train with structure='2:4'" in choices[1].note
    expected = net(x)
    change = (use_kernels(net, {"0": "2:4"})(x) - expected).abs().max()
    assert change <= 0.05 * expected.abs().max()


# ---- what cannot be -----------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def test_a_rung_that_fails_its_verification_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ladder: Ladder) -> Any:
        made = Ladder.plain(ladder)
        right = made.run
        made.run = lambda x: right(x) + 0.25
        return made

    monkeypatch.setitem(RUNGS, "onnx", wrong)
    with pytest.raises(ValueError, match="'onnx' fails its verification: outputs differ by 0.25 where 1e-05 is allowed"):
        export_ladder(small(), torch.randn(3, 4), tmp_path / "out", rungs=["plain", "compact", "onnx"], rounds=0)
    assert not (tmp_path / "out").exists()

    def broken(ladder: Ladder) -> Any:
        made = Ladder.plain(ladder)
        right = made.run
        made.run = lambda x: right(x) * float("nan")
        return made

    monkeypatch.setitem(RUNGS, "onnx", broken)
    with pytest.raises(ValueError, match="outputs differ by nan"):
        export_ladder(small(), torch.randn(3, 4), tmp_path / "out", rounds=0)
    assert not (tmp_path / "out").exists()


def test_a_rung_that_does_not_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(ladder: Ladder) -> Any:
        made = Ladder.plain(ladder)
        made.run = lambda x: torch.ones(2) @ torch.ones(3)
        return made

    monkeypatch.setitem(RUNGS, "onnx", failing)
    made = export_ladder(small(), torch.randn(3, 4), tmp_path / "out", rounds=0)
    assert made.rungs["onnx"].note.startswith("it does not run (inconsistent tensor size")
    assert made.rungs["onnx"].file is None
    with pytest.raises(ValueError, match=r"rung 'onnx': it does not run \(.*\). Nothing was written"):
        export_ladder(small(), torch.randn(3, 4), tmp_path / "other", rungs=["plain", "onnx"], rounds=0)
    assert not (tmp_path / "other").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rungs": []}, "rungs=[] is empty; choose from ['plain', 'compact', 'merged'"),
    ({"rounds": -1}, "rounds=-1 must be >= 0; 0 measures nothing."),
    ({"input_range": [1]}, "input_range=[1] must be the smallest and the largest input, such as [0, 1]."),
    ({"input_range": [1, 0]}, "input_range=[1, 0] must be the smallest and the largest input"),
    ({"inputs": torch.randn(0, 4)}, "inputs contains no sample; give a batch of real ones."),
    ({"rungs": ["plan"]}, "rung 'plan' is unknown; choose from ['plain', 'compact', 'merged'"),
    ({"tolerance": 0.0}, "tolerance=0.0 must be above 0"),
    (
        {"rungs": ["removed"]},
        "rung 'removed': nothing in Sequential can be removed: no neuron, filter or channel",
    ),
    (
        {"rungs": ["merged"]},
        "rung 'merged': no layer acts linearly for all inputs, so none is merged; train with L",
    ),
    ({"rungs": ["kernels"]}, "no linear layer is faster with a sparse kernel ('0': less than half of it is zero"),
    ({"rungs": ["semi_structured"]}, "rung 'semi_structured': 2:4 needs the model on a CUDA device"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_what_is_not_possible_is_one_sentence(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as said:  # noqa: PT011
        export_ladder(small(), **{"inputs": torch.randn(3, 4), **options}, to=tmp_path / "out")
    assert sentence in str(said.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="already exists; name a new folder, or set overwrite"):
        export_ladder(small(), torch.randn(3, 4), tmp_path)
    export_ladder(small(), torch.randn(3, 4), tmp_path, rungs=["plain"], rounds=0, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "plain.pt", "report.json"}


def test_without_the_extra_the_core_runs_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torch_pruning", "safetensors", "safetensors.torch", "onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    report = export_ladder(small(), torch.randn(3, 4), tmp_path / "out", rounds=0)
    assert [name for name, rung in report.rungs.items() if rung.file] == ["plain"]
    for name, package in (("compact", "safetensors"), ("removed", "torch-pruning"), ("onnx", "onnx")):
        note = f"this needs {package}; install it with: pip install 'lightning_sparse[export]'"
        assert report.rungs[name].note == note


# ---- what is written -----------------------------------------------------------------------------------------------------


def timed(**milliseconds: float) -> Callable[..., dict[str, Timing]]:
    """What `interleaved` would measure: a millisecond, but for these."""
    return lambda functions, *_: {name: Timing(*[milliseconds.get(name, 1.0)] * 3) for name in functions}


def test_what_is_slower_and_no_smaller_is_left_out_unless_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sparse.export.ladder.interleaved", timed(onnx=2.0))
    made = export_ladder(small(), torch.randn(3, 4), tmp_path / "all", compiled=False)
    assert made.rungs["onnx"].note.startswith("left out: slower than dense in onnxruntime and no smaller; ")
    assert not (tmp_path / "all" / "model.onnx").exists()
    made = export_ladder(small(), torch.randn(3, 4), tmp_path / "one", rungs=["onnx"], compiled=False)
    assert (tmp_path / "one" / "model.onnx").exists()
    assert made.outcome("onnx") == "no smaller and slower"
    assert made.recommendation.startswith("No rung is smaller or faster than dense")


def test_what_is_smaller_is_written_though_it_is_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sparse.export.ladder.interleaved", timed(removed=2.0, onnx=2.0))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2)).eval()
    net[0].weight.data[1:] = 0
    made = export_ladder(net, torch.randn(3, 64), tmp_path / "out", compiled=False)
    assert made.outcome("removed") == made.outcome("onnx") == "smaller, but slower"
    assert (tmp_path / "out" / "removed.safetensors").exists()
    assert (tmp_path / "out" / "model.onnx").exists()
    assert (made.rungs["dense, onnxruntime"].bytes or 0) > 4 * (made.rungs["onnx"].bytes or 0)
    assert not (tmp_path / "out" / "dense.onnx").exists()


def test_networks_are_measured_compiled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []

    def compile_(module: nn.Module) -> Callable[..., Any]:
        seen.append(module)
        if len(seen) == 2:
            raise RuntimeError("no compiler\nis installed")
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2)).eval()
    net[0].weight.data[1:] = 0
    made = export_ladder(net, torch.randn(3, 64), tmp_path / "out", rungs=["plain", "removed"], rounds=1)
    dense, removed = made.rungs["dense, torch.compile"], made.rungs["removed, torch.compile"]
    assert set(dense.latency) == {3}, "it was compiled for this batch size"
    assert dense.change == 0
    assert dense.bytes == made.rungs["dense"].bytes
    assert removed.note == "torch.compile cannot (no compiler)."
    assert len(seen) == 2, "what is stored in another way is the same network"


def test_functions_take_turns_and_each_comes_after_each() -> None:
    calls: list[str] = []
    found = interleaved({name: partial(calls.append, name) for name in "abc"}, rounds=38)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 40
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert all(timing.low <= timing.median <= timing.high for timing in found.values())
