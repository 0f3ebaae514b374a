"""From an exported program to a file for ExecuTorch, in this process or in a second one beside it."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from lightning_sparse.core import first_line, need, silenced, without_origins

__all__ = ["Compiler", "Job", "Lowered", "SecondProcess", "compiling", "ethos_u85", "need_compiler", "need_edge", "serve"]

Compiler = Literal["ExecuTorch", "Vela"]
"""XNNPACK's part of ExecuTorch, or Vela for the Ethos-U85-256."""

_ESTIMATES = {
    "encoded weight bytes": "total_npu_encoded_weights",
    "MACs": "nn_macs",
    "cycles": "cycles_total",
}
"""Entries read from Vela's summary."""


@dataclass
class Lowered:
    """What a compiler reports."""

    left: list[str]
    """Operators that it leaves to the CPU's portable kernels."""
    estimates: dict[str, float] = field(default_factory=dict)


@dataclass
class Job:
    """A program to lower, and the file it becomes."""

    program: ExportedProgram
    compiler: Compiler
    path: Path
    model: str
    """What messages call the model."""

    def run(self) -> Lowered:
        """Lower the program in this process.

        Raises:
            ValueError: if the compiler fails.
        """
        with compiling(self.model, self.compiler):
            return _lower(self.program, self.compiler, self.path)


class SecondProcess:
    """A process of this Python that lowers programs, one after another, while the caller goes on.

    What it cannot do, for whatever reason, is done in this process when the result is asked for, so errors are the same.
    """

    def __init__(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
        path = os.pathsep.join(folder for folder in sys.path if folder)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": path},
        )
        self._asked = 0
        self._answers: list[dict[str, Any] | None] = []

    def lower(self, job: Job) -> Callable[[], Lowered]:
        """Begin a job; returns a function that waits for its result."""
        program = job.path.with_suffix(".program.pt2")
        number = None
        with suppress(Exception):  # a program that cannot be stored is lowered here
            torch.export.save(job.program, program)
            number = self._ask({"program": str(program), "compiler": job.compiler, "path": str(job.path)})

        def result() -> Lowered:
            answer = None if number is None else self._answer(number)
            return job.run() if answer is None else Lowered(**answer)

        return result

    def warm_up(self) -> None:
        """Compile a trivial function, so that the headers of torch.compile are compiled when this process needs them."""
        with suppress(OSError):
            self._ask({})

    def close(self) -> None:
        """Stop the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, order: dict[str, str]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._asked += 1
        return self._asked - 1

    def _answer(self, number: int) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        while len(self._answers) <= number:
            line = self._process.stdout.readline()
            if not line:  # it is gone
                return None
            self._answers.append(json.loads(line))
        return self._answers[number]


def serve() -> None:
    """Do what a `SecondProcess` is asked for on standard input, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, in C too
    if hasattr(os, "nice"):
        os.nice(19)  # the other process may compute on all cores, and only what it leaves is free
    for line in sys.stdin:
        order, answer = json.loads(line), None
        with suppress(Exception), _muted(), without_origins():
            if order:
                need_compiler(order["compiler"])  # registers the operators of quantized programs
                program = torch.export.load(order["program"])
                answer = asdict(_lower(program, order["compiler"], Path(order["path"])))
            else:
                torch.compile(torch.relu)(torch.zeros(64))
        print(json.dumps(answer), file=answers, flush=True)


@contextmanager
def compiling(model: str, compiler: Compiler) -> Iterator[None]:
    """Keep libraries quiet, and turn their errors into one sentence."""
    with _muted(), without_origins(), redirect_stdout(StringIO()):
        try:
            yield
        except Exception as error:
            raise _said(model, compiler, error) from None


def _said(model: str, compiler: Compiler, error: Exception) -> ValueError:
    """Return a compiler's refusal, with the missing operators by name."""
    if isinstance(error, ValueError) and "would be lost" in str(error):
        return error
    lacking = sorted(set(re.findall(r"aten::[\w.]+", str(error))))
    what = f"it has no kernel for {', '.join(lacking)}" if "out variant" in str(error) else first_line(error)
    return ValueError(f"{compiler} cannot compile {model} ({what}).")


def need_edge(module: str, package: str = "executorch") -> Any:
    """Import a module of the extra `edge`, quietly."""
    with _muted():
        return need(module, package, "edge")


def need_compiler(compiler: Compiler) -> None:
    """Import what a compiler needs, its quantizer included."""
    if compiler == "Vela":
        need_edge("tosa_serializer", "executorch[ethos-u]")
        need_edge("ethosu.vela", "ethos-u-vela")
        need_edge("executorch.exir")
        need_edge("executorch.backends.arm.quantizer")
    else:
        need_edge("executorch.exir")
        need_edge("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        need_edge("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")


def _lower(program: ExportedProgram, compiler: Compiler, path: Path) -> Lowered:
    edge = need_edge("executorch.exir")
    if compiler == "ExecuTorch":
        partitioner = need_edge("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()
        lowered = edge.to_edge_transform_and_lower(program, partitioner=[partitioner])
        found = Lowered(_left(lowered))
        path.write_bytes(lowered.to_executorch().buffer)
        return found
    arm = need_edge("executorch.backends.arm.ethosu")
    with tempfile.TemporaryDirectory() as folder:
        spec = ethos_u85()
        spec.dump_intermediate_artifacts_to(folder)
        unchecked = edge.EdgeCompileConfig(_check_ir_validity=False)
        lowered = edge.to_edge_transform_and_lower(
            program, partitioner=[arm.EthosUPartitioner(spec)], compile_config=unchecked
        )
        found = Lowered(_left(lowered))
        path.write_bytes(lowered.to_executorch().buffer)
        summaries = [row for file in Path(folder).rglob("*summary*.csv") for row in csv.DictReader(file.open())]
    if not summaries:
        raise ValueError(f"no part of it runs on an Ethos-U85: {', '.join(found.left[:4])} stay on the CPU")
    found.estimates = {what: sum(float(row[column]) for row in summaries) for what, column in _ESTIMATES.items()}
    return found


def ethos_u85() -> Any:
    """The accelerator, as Arm's library describes it."""
    return need_edge("executorch.backends.arm.ethosu").EthosUCompileSpec("ethos-u85-256")


def _left(lowered: Any) -> list[str]:
    """Operators that no backend took."""
    names = {
        str(node.target.__name__)
        for node in lowered.exported_program().graph.nodes
        if node.op == "call_function" and callable(node.target)
    }
    ours = ("executorch_call_delegate", "getitem")
    return sorted(name for name in names if name not in ours and not name.startswith("quantized_decomposed."))


class _muted(warnings.catch_warnings):
    """Suppress everything below an error from libraries while active."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        self._loggers = silenced("", "torch")
        self._loggers.__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        self._loggers.__exit__(*error)
        super().__exit__(*error)
