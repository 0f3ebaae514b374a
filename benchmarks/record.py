"""A result is a file that says how it was made."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning
import torch

import lightning_sparse

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Versions and hardware, without names of hosts or folders."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_sparse": lightning_sparse.__version__,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def save(name: str, numbers: Any) -> None:
    """Write a result and print it."""
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"command": command, "machine": machine(), "numbers": numbers}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def resumed(name: str) -> dict[str, Any]:
    """The numbers of a result that is to be gone on with, if it is of the same versions and the same machine."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    for what in ("lightning_sparse", "torch", "cpu", "threads", "gpu"):
        if (theirs := found["machine"][what]) != (mine := machine()[what]):
            raise SystemExit(f"{path.name} is of {what} {theirs}, this is {mine}; remove it to begin anew.")
    return found["numbers"]  # type: ignore[no-any-return]


def ratios(rounds: list[dict[str, float]], base: str) -> dict[str, dict[str, float]]:
    """Each variant against the base of the same round: median, and the middle half of the rounds as spread."""
    return {
        name: {**middle([r[name] / r[base] for r in rounds]), "seconds": statistics.median(r[name] for r in rounds)}
        for name in rounds[0]
    }


def middle(ratios: Sequence[float]) -> dict[str, float]:
    """The median, and the middle half as spread."""
    values = sorted(ratios)
    quarter = len(values) // 4
    return {"ratio": statistics.median(values), "low": values[quarter], "high": values[-1 - quarter]}


def timed(function: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter() - start


def growth(function: Callable[[], Any], device: str = "cpu") -> float:
    """MiB by which what this process holds in memory grows at most while the function runs (of the host: on Linux)."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def resident(field: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    function()
    return (resident("VmHWM") - before) / 1024


def alone(module: str, *arguments: str) -> float:
    """The last number that a process of its own prints.

    It has one thread, and gives back to the system what it frees in blocks of a megabyte or more, so that its peak is of
    what it needs at once, not of what the allocator has kept.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def peaks(benchmark: str, places: Mapping[tuple[str, int], Sequence[str]], repeats: int, keep: bool) -> None:
    """Peak memory of all ways in turns, several times, each time in a process of its own; `dense` is the first of them.

    Args:
        benchmark: that prints it for one way, with `--peak`.
        places: the ways, by model and size of the batch.
        repeats: how often.
        keep: whether to write after each, and to go on where an earlier call was interrupted.
    """
    numbers: dict[str, Any] = resumed(f"{benchmark}_memory") if keep else {}
    for turn in range(repeats):
        for (model, batch), names in places.items():
            rows = numbers.setdefault(f"{model}, batch {batch}", {})
            print(f"\n{model}, batch {batch}: peak memory, times a plain training's ({turn + 1} of {repeats})")
            for name in names:
                sizes = rows.get(name, [])
                if len(sizes) <= turn:
                    try:
                        sizes = [
                            *sizes,
                            alone(f"benchmarks.{benchmark}", "--peak", name, "--models", model, "--batches", str(batch)),
                        ]
                    except subprocess.CalledProcessError:
                        continue  # it has said why
                    rows[name] = sizes
                    if keep:
                        save(f"{benchmark}_memory", numbers)
                print(f"  {name:34s} {sizes[turn] / rows['dense'][turn]:7.3f}  {sizes[turn]:9.0f} MiB", flush=True)


def show(title: str, table: dict[str, dict[str, float]]) -> None:
    """Print ratios as an aligned table."""
    print(f"\n{title}")
    for name, row in table.items():
        print(f"  {name:34s} {row['ratio']:7.3f}  ({row['low']:.3f} to {row['high']:.3f})  {row['seconds'] * 1e3:9.1f} ms")
