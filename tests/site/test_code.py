"""Every block of code on the site and in the README runs, and every command in them exists."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_sparse
from benchmarks.suites import GROUPS, SUITES
from lightning_sparse.cli.configs import config_names
from lightning_sparse.cli.entry import OTHERS, RUN
from lightning_sparse.core import layers
from lightning_sparse.export import Quantization, export_ladder
from lightning_sparse.testing import MethodContract, Toy, fit, loader, network
from tests.helpers.overlays import ROOT, Sparsened

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if "generated" not in page.parts)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


class QuickTrainer(L.Trainer):
    """A Trainer on the CPU that stops after three epochs where nobody says how many."""

    def __init__(self, **options: Any) -> None:
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        super().__init__(**{"max_epochs": 3, "enable_checkpointing": False} | quiet | options)


class Chain(Toy):
    """A perceptron that can be called."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(nn.Flatten(), *self.layers(64, 16, 16, 4)))

    @staticmethod
    def layers(*sizes: int) -> list[nn.Module]:
        pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        return [layer for pair in pairs for layer in pair][:-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Layers that adapters are asked for by name."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.head = nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.query(x.flatten(1)) * self.value(x.flatten(1))).relu())  # type: ignore[no-any-return]


@torch.no_grad()
def sparse(module: nn.Module) -> Any:
    """Half of the weights of a module at zero."""
    for weight in module.parameters():
        if weight.ndim > 1:
            weight[torch.rand_like(weight) < 0.5] = 0
    return module


def to_export() -> dict[str, Any]:
    """A network with channels that are gone."""
    model = network(dropout=0).eval()
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "inputs": torch.rand(8, 1, 8, 8), "MyModel": lambda: network(dropout=0), "optimizer": optimizer}


def to_quantize() -> dict[str, Any]:
    """A checkpoint of a sparse model, and what judges it."""
    model = Chain()
    fit(model, lightning_sparse.MagnitudePruning(0.9))
    torch.save({"state_dict": model.state_dict()}, "sparse.ckpt")
    images = torch.rand(8, 1, 8, 8)
    given = {"Trainer": QuickTrainer, "data": loader(), "inputs": images, "accuracy": lambda _: {"accuracy": 1.0}}
    return {
        "model": model,
        "export_ladder": export_ladder,
        "Quantization": Quantization,
        "training_batches": [images],
    } | given


def whole() -> dict[str, Any]:
    """A checkpoint where the page says that it is."""
    model = Chain()
    Path("runs/large_model").mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, "runs/large_model/last.ckpt")
    return {"model": model, "inputs": torch.rand(8, 1, 8, 8)}


def adapted() -> dict[str, Any]:
    """A module whose network gets adapters."""
    pytest.importorskip("peft")
    net = sparse(Attention())
    return {"module": Toy(net=net), "sparse_net": net, "data": loader()}


def shards() -> dict[str, Any]:
    """What the large models are cut with."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    return {"fully_shard": fully_shard, "ModelParallelStrategy": ModelParallelStrategy}


GIVEN: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
    ("fine-tuning", 0): lambda: {"model": sparse(Toy())},
    ("export", 0): to_export,
    ("export", 1): to_quantize,
    ("export", 2): lambda: {
        "model": Chain(),
        "trainer": QuickTrainer(callbacks=[lightning_sparse.LayerSparsity(strength=0.3)]),
        "loader": loader(),
    },
    ("your-own-method", 2): lambda: {"MethodContract": MethodContract},
    ("adapters", 0): adapted,
    ("large-models", 0): shards,
    ("large-models", 2): whole,
}
"""What a block is given beside the names that all have."""


def names() -> dict[str, Any]:
    """What a reader has at hand: the public names, a model, data and a Trainer."""
    public = {name: getattr(lightning_sparse, name) for name in lightning_sparse.__all__}
    return public | {"L": L, "torch": torch, "lightning_sparse": lightning_sparse, "model": Toy(), "datamodule": loader()}


RUNS = [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), RUNS, ids=[f"{page.stem}-{number}" for page, number in RUNS])
@pytest.mark.filterwarnings("ignore:.*")
def test_a_block_runs(page: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", QuickTrainer)
    monkeypatch.setattr(layers, "LAYER_KINDS", [*layers.LAYER_KINDS])
    block = blocks(page, "python")[number]
    given = GIVEN.get((page.stem, number), dict)()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names() | {"__name__": "page"} | given)
    for expected in re.findall(r"print\(.*\)  # ([\d,.]+)$", block, flags=re.M):
        assert expected in out.getvalue()


class Named(Toy):
    """A module with the layers that the tables of `coming-from.md` name."""

    def __init__(self) -> None:
        super().__init__(net=nn.Identity())
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 64, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.fc(self.conv(self.first(x)).relu().flatten(1)).relu())  # type: ignore[no-any-return]

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


NEW = [
    line
    for row in (ROOT / "docs" / "coming-from.md").read_text().splitlines()
    if row.startswith("| `")
    for line in re.findall(r"\| `([^|]+)` \|$", row)
    if line != "lightning_sparse"
]


def test_every_row_has_a_new_line() -> None:
    rows = [row for row in (ROOT / "docs" / "coming-from.md").read_text().splitlines() if row.startswith("| `")]
    rest = [row for row in rows if not row.endswith("| `lightning_sparse` |")]
    assert len(rest) == len(NEW) + sum(row.endswith("| nothing to do |") for row in rest)
    assert len(NEW) > 30


@pytest.mark.parametrize("line", sorted(set(NEW)))
@pytest.mark.filterwarnings("ignore:.*")
def test_a_new_line_trains(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = Named()
    torch.save({"fc.weight": torch.rand(16, 8 * 64) > 0.5}, "masks.pt")
    callback = eval(line, names() | {"teacher": Named()})
    assert isinstance(callback, L.Callback)
    needs_zeros = [Sparsened()] if line == "KeepSparsity()" else []
    beside = [lightning_sparse.MagnitudePruning(0.5)] if isinstance(callback, lightning_sparse.SparsityMonitor) else []
    fit(module, *needs_zeros, *beside, callback, max_epochs=20)
    zeros = sum(int((weight == 0).sum()) for weight in module.parameters() if weight.ndim > 1)
    removes = not isinstance(callback, lightning_sparse.Distillation | lightning_sparse.QuantizationAware)
    assert bool(zeros) or not removes


def words(block: str) -> list[list[str]]:
    """The commands of a block, with lines that go on put together."""
    lines = block.replace("\\\n", " ").splitlines()
    commands = [part for line in lines for part in re.split(r"\s&&\s", line)]
    return [found for command in commands if (found := shlex.split(command, comments=True))]


def check_own(args: list[str]) -> None:
    command, *rest = args
    assert command in {**RUN, **OTHERS}, command
    for name, value in itertools.pairwise(rest):
        if name == "--config" and value != "...":
            assert value in config_names(), value


def check_python(args: list[str]) -> None:
    if args[:1] == ["-m"]:
        module, rest = args[1], args[2:]
        assert module in ("venv", "pytest", "sphinx") or importlib.util.find_spec(module), module
        if module == "benchmarks":
            suites = itertools.takewhile(lambda word: not word.startswith("--"), rest)
            assert all(name in SUITES or name in GROUPS for name in suites), rest
    elif args[0].endswith(".py"):
        source = (ROOT / args[0]).read_text()
        assert all(f'"{option}"' in source for option in args if option.startswith("--")), args


def check_pip(args: list[str]) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(args)):
        assert all(f"\n{extra} = [" in pyproject for extra in extras.split(",")), extras


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "lightning-sparse": check_own,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "make": lambda args: [f"\n{target}:" in (ROOT / "Makefile").read_text() for target in args].index(True),  # type: ignore
    "pre-commit": lambda args: None,
}
SHELLS = [(page, number) for page in PAGES for number in range(len(blocks(page, "bash")))]


@pytest.mark.parametrize(("page", "number"), SHELLS, ids=[f"{page.stem}-{number}" for page, number in SHELLS])
def test_commands_exist(page: Path, number: int) -> None:
    for program, *args in words(blocks(page, "bash")[number]):
        name = program.rpartition("/")[2]
        assert name in CHECKS, program
        CHECKS[name](args)
