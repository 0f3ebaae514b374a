"""Programs for ExecuTorch: int8 on a CPU is run and compared; what Vela expects is read and called an estimate."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import Call
from lightning_sparse.export import Quantization, RungName, export_ladder


def small() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    net(torch.randn(32, 1, 8, 8))
    for layer in (net[0], net[4]):
        layer.weight.data[torch.rand_like(layer.weight) < 0.9] = 0
    return net.eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_without_the_extra_the_rungs_are_left_out_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("executorch.exir", "tosa_serializer"):
        monkeypatch.setitem(sys.modules, package, None)
    options: dict[str, Any] = {"quantization": Quantization([images()]), "rounds": 0}
    made = export_ladder(small(), images(), tmp_path / "out", **options)
    for name, package in (("edge", "executorch"), ("ethos_u85", r"executorch\[ethos-u\]")):
        note = f"this needs {package}; install it with: pip install 'lightning_sparse[edge]'".replace("\\", "")
        assert made.rungs[name].note == note
        with pytest.raises(ValueError, match=rf"rung '{name}': this needs {package}"):
            export_ladder(small(), images(), tmp_path / "named", rungs=[name], **options)
    assert not (tmp_path / "named").exists()


def test_the_rung_on_a_cpu_is_verified_in_its_own_runtime(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from lightning_sparse.export.edge import executorch_runner

    net, x = small(), images()
    classes = net(x).argmax(1)

    def evaluate(module: nn.Module) -> dict[str, float]:
        return {"accuracy": float((module(x).argmax(1) == classes).float().mean())}

    options: dict[str, Any] = {"quantization": Quantization([x]), "evaluate": evaluate}
    made = export_ladder(net, x, tmp_path / "out", rungs=["edge"], rounds=1, compiled=False, **options)
    row, dense = made.rungs["edge"], made.rungs["dense, executorch"]
    assert (row.runtime, dense.runtime) == ("executorch", "executorch")
    assert (row.bytes or 0) < 0.6 * (dense.bytes or 0)
    assert row.metrics == {"accuracy": 1.0}
    assert set(row.latency) == {1, 4}
    assert 0 < (row.change or 0) < 0.1 * (row.largest or 0)
    found = executorch_runner(tmp_path / "out" / "model.pte")(x[:3])
    torch.testing.assert_close(found, net(x[:3]), atol=0.05, rtol=0.05)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pte", "report.json"}


class Scaled(nn.Module):
    """Factors behind a layer, as in ConvNeXt, and a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.factors, self.out = nn.Conv2d(1, 8, 3), nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5), nn.Linear(8, 10)
        self.conv.weight.data[torch.rand_like(self.conv.weight) < 0.9] = 0
        self.out.weight.data[torch.rand_like(self.out.weight) < 0.9] = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out((self.conv(x) * self.factors).mean((2, 3)))
        return out


def test_factors_and_means_are_compiled_too(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    net, x = Scaled().eval(), images()
    rungs: list[RungName] = ["edge"]
    if all(find_spec(module) for module in ("ethosu", "tosa_serializer")):
        rungs.append("ethos_u85")
    made = export_ladder(net, x, tmp_path / "out", rungs=rungs, rounds=0, quantization=Quantization([x], error=1))
    assert all(made.rungs[name].file for name in rungs)


@pytest.mark.parametrize("alive", [True, False])
def test_what_the_second_process_cannot_do_is_done_here(
    tmp_path: Path, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_sparse.export import lowering

    if not alive:
        monkeypatch.setattr(sys, "executable", shutil.which("false") or pytest.skip("there is no command that fails"))
    monkeypatch.setattr(lowering, "_lower", lambda program, compiler, path: lowering.Lowered([compiler, path.name]))
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    paths = [tmp_path / "a folder.pte", tmp_path / "no folder" / "net.pte"]  # the second program cannot even be handed over
    paths[0].mkdir()
    second = lowering.SecondProcess()
    try:
        results = [second.lower(lowering.Job(program, "ExecuTorch", path, "Linear")) for path in paths]
        assert [result().left for result in results] == [["ExecuTorch", "a folder.pte"], ["ExecuTorch", "net.pte"]]
    finally:
        second.close()


def test_the_second_process_writes_what_this_one_would(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from lightning_sparse.export.edge import executorch_job
    from lightning_sparse.export.lowering import SecondProcess

    second = SecondProcess()
    try:
        jobs = [executorch_job(small(), images(), tmp_path / name, [images()]) for name in ("there.pte", "here.pte")]
        there = second.lower(jobs[0])
        here = jobs[1].run()
        jobs[0].run = lambda: pytest.fail("it was lowered here")  # type: ignore[method-assign]
        assert there() == here
    finally:
        second.close()
    assert (tmp_path / "there.pte").read_bytes() == (tmp_path / "here.pte").read_bytes()


def test_the_accelerator_is_estimated_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    pytest.importorskip("ethosu")
    pytest.importorskip("tosa_serializer")
    net, x = small(), images()
    made = export_ladder(net, x, tmp_path / "out", rungs=["ethos_u85"], rounds=0, quantization=Quantization([x]))
    row = made.rungs["ethos_u85"]
    numbers = row.estimates
    assert numbers["encoded weight bytes"] < 0.4 * numbers["encoded weight bytes if no weight were zero"]
    assert numbers["MACs"] > 0
    assert numbers["cycles"] > 0
    assert row.change is None
    assert "cannot be checked without Arm's simulator" in row.note
    said = " ".join(cell for line in made.rows() for cell in line)
    assert "estimates, not measured: encoded weight bytes " in said
    assert (tmp_path / "out" / "model-ethos-u85.pte").exists()


def test_a_lost_zero_is_found() -> None:
    from lightning_sparse.export.edge import check_codes

    weight = torch.tensor([[0.0, 1.0, -0.5], [0.2, 0.0, 0.0]])
    good = torch.tensor([[0, 127, -64], [127, 0, 0]], dtype=torch.int8)
    check_codes([weight], [good, torch.zeros(3, dtype=torch.int8), torch.ones(2, 3)])
    lost = good.clone()
    lost[1, 1] = 1
    with pytest.raises(ValueError, match=r"zeros of a weight of shape \(2, 3\) would be lost: their"):
        check_codes([weight], [lost])


# ---- without the extra: what is around the libraries, with stand-ins for them ------------------------------------------


def test_an_operator_that_the_runtime_lacks_is_named() -> None:
    from lightning_sparse.export.lowering import _said

    lacking = RuntimeError("Missing out variants: {'aten::fft_rfft', 'aten::linalg_qr'}\nin a graph")
    sentence = str(_said("Sequential", "ExecuTorch", lacking))
    assert sentence == "ExecuTorch cannot compile Sequential (it has no kernel for aten::fft_rfft, aten::linalg_qr)."
    other = _said("Sequential", "Vela", RuntimeError("no such shape\nat line 3"))
    assert str(other) == "Vela cannot compile Sequential (no such shape)."
    lost = ValueError("zeros of a weight of shape (2, 3) would be lost: their code is not 0.")
    assert _said("Sequential", "Vela", lost) is lost


def test_operators_that_stay_on_the_cpu_are_listed() -> None:
    from lightning_sparse.export.lowering import _left

    class Called:
        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __call__(self) -> None: ...

    names = (
        "executorch_call_delegate",
        "getitem",
        "aten.sort.default",
        "quantized_decomposed.dequantize",
        "aten.cumsum.default",
    )
    nodes = [SimpleNamespace(op="call_function", target=Called(name)) for name in names]
    nodes += [SimpleNamespace(op="placeholder", target="x")]
    lowered = SimpleNamespace(exported_program=lambda: SimpleNamespace(graph=SimpleNamespace(nodes=nodes)))
    assert _left(lowered) == ["aten.cumsum.default", "aten.sort.default"]


def test_samples_go_one_at_a_time_and_what_is_no_batch_goes_with_each() -> None:
    from lightning_sparse.export.edge import samples_of

    scale = torch.tensor([2.0])
    calls = list(samples_of(Call((torch.arange(6.0).reshape(3, 2), scale))))
    assert [call.args[0].tolist() for call in calls] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(call.args[1] is scale for call in calls)


def test_calibration_must_reach_every_layer_of_a_program() -> None:
    from lightning_sparse.export.edge import _prepared

    with pytest.raises(ValueError, match="layer '0' is given nothing but zeros by the 1 batches of calibration data"):
        _prepared(small(), Call.of(images()), [torch.zeros(2, 1, 8, 8)])


def test_a_program_is_run_sample_by_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime writes every result into the same memory."""
    from lightning_sparse.export.edge import executorch_runner

    memory = torch.zeros(1, 2)

    class Method:
        def execute(self, given: list[Tensor]) -> list[Tensor]:
            assert given[0].is_contiguous()
            return [memory.copy_(given[0] * 2)]

    program = SimpleNamespace(load_method=lambda name: Method())
    runtime = SimpleNamespace(load_program=lambda data: program if data == b"program" else None)
    stand_in: Any = ModuleType("executorch.runtime")
    stand_in.Runtime = SimpleNamespace(get=lambda: runtime)
    monkeypatch.setitem(sys.modules, "executorch", ModuleType("executorch"))
    monkeypatch.setitem(sys.modules, "executorch.runtime", stand_in)
    (tmp_path / "net.pte").write_bytes(b"program")
    x = torch.randn(2, 3).t()
    assert torch.equal(executorch_runner(tmp_path / "net.pte")(x), x * 2)
