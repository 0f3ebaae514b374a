"""Suites of benchmarks. Each part is measured or trained once, and the result file records how it was made."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any, ClassVar

import lightning
import torch

import lightning_sparse

RESULTS = Path(__file__).parent / "results"

Runs = list[dict[str, Any]]
Row = list[str]
Parts = Iterator[tuple[Any, Callable[[], Any]]]
"""Keys of parts, and the functions that run them."""


class LeftOut(Exception):
    """Raised if a part cannot run on this machine; the message states the reason."""


@dataclass(frozen=True)
class Options:
    """Options of a benchmark run; see `python -m benchmarks --help`."""

    data: str = "data"
    download: bool = False
    out: Path = RESULTS
    device: str = "cpu"
    quick: bool = False
    rounds: int | None = None
    epochs: int | None = None
    only: Sequence[str] = ()
    part: tuple[int, int] = (1, 1)
    work: Path | None = None
    stop: Path | None = None

    def times(self, usual: int, quick: int = 3) -> int:
        """The number of measurements."""
        return self.rounds or (quick if self.quick else usual)


@dataclass(frozen=True)
class Suite(ABC):
    """A benchmark suite: its parts, and the file for their results.

    Args:
        name: name of the suite and its result file.
    """

    name: str

    @abstractmethod
    def parts(self, options: Options) -> Parts:
        """All parts, in order."""

    @abstractmethod
    def has(self, content: Mapping[str, Any], key: Any) -> bool:
        """Whether the content of a result file includes a part."""

    @abstractmethod
    def put(self, content: dict[str, Any], key: Any, value: Any) -> None:
        """Add the result of a part to the content of a result file."""

    def recipe(self, options: Options) -> dict[str, Any]:
        """The settings of the parts, if the result file has to record them."""
        return {}

    def content(self, out: Path) -> dict[str, Any]:
        """The content of the result file, or an empty dictionary if there is none."""
        path = out / f"{self.name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def missing(self, options: Options) -> list[int]:
        """The indices of the parts that have no result yet."""
        content = self.content(options.out)
        return [place for place, (key, _) in enumerate(self.parts(options)) if not self.has(content, key)]

    def prepare(self, options: Options) -> None:
        """Refuse to continue results from another machine, version or recipe."""
        found, recipe = self.content(options.out), self.recipe(options)
        theirs = {what: found.get("machine", {}).get(what) for what in self.same} | found.get("recipe", {})
        mine = machine() | recipe
        for what, value in theirs.items() if found else ():
            if what in mine and value != mine[what]:
                raise SystemExit(
                    f"{self.name}.json is of {what} {value!r}, this is {mine[what]!r}; begin anew with another --out."
                )

    def run(self, options: Options, until: float = math.inf) -> None:
        """Run the missing parts, or the share of this process, and write the result of each part as soon as it is done.

        No part is started after the deadline `until`.
        """
        self.prepare(options)
        number, count = options.part
        for place, (key, make) in enumerate(self.parts(options)):
            words = [f"{n} {v}" for n, v in key.items()] if isinstance(key, dict) else [str(step) for step in key]
            chosen = not options.only or any(fnmatch(word, pattern) for word in words for pattern in options.only)
            if place % count != number - 1 or not chosen or self.has(self.content(options.out), key):
                continue
            if monotonic() > until:
                return
            try:
                value = make()
            except LeftOut as reason:
                print(f"{', '.join(words)} is left out: {reason}", flush=True)
                continue
            self.write(options, key, value)
            show(", ".join(words) or self.name, f"{len(value)} rows" if isinstance(value, list) else value)

    def write(self, options: Options, key: Any, value: Any) -> None:
        """Add the result of a part to the result file, to which other processes may write too."""
        given = {" --data DIR": options.data != Options.data, f" --rounds {options.rounds}": options.rounds}
        command = f"python -m benchmarks {self.name}" + "".join(text for text, holds in given.items() if holds)
        made = {"command": command, "machine": machine(), "recipe": self.recipe(options)}
        options.out.mkdir(parents=True, exist_ok=True)
        lock = os.open(options.out, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.content(options.out) | {name: value for name, value in made.items() if value}
            self.put(content, key, value)
            whole = options.out / f"{self.name}.part"
            whole.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(whole, options.out / f"{self.name}.json")
        finally:
            os.close(lock)

    def table(self, out: Path) -> str:
        """The results so far, as text."""
        return json.dumps(self.content(out).get("numbers", {}), indent=1)


@dataclass(frozen=True)
class Measurements(Suite):
    """A suite of measurements. The key of a part is the path to its number in the result file.

    Args:
        name: name of the suite and its result file.
        make: function that makes the parts.
        same: machine properties that must match to continue a result file; times and sizes are valid for one machine only.
    """

    make: Callable[[Options], Parts]
    same: Sequence[str] = ("lightning_sparse", "torch", "cpu", "threads", "gpu")

    def parts(self, options: Options) -> Parts:
        return self.make(options)

    def has(self, content: Mapping[str, Any], key: Any) -> bool:
        found = content.get("numbers", {})
        for step in key:
            if (step not in found) if isinstance(found, dict) else (step >= len(found)):
                return False
            found = found[step]
        return bool(key or found)

    def put(self, content: dict[str, Any], key: Any, value: Any) -> None:
        if not key:
            content["numbers"] = value
            return
        found = content.setdefault("numbers", {})
        for step, following in pairwise(key):
            found = found.setdefault(step, [] if isinstance(following, int) else {})
        found.append(value) if isinstance(found, list) else found.update({key[-1]: value})


@dataclass(frozen=True)
class Trainings(Suite):
    """A suite of training runs, with one or more rows of results each. The key of a part identifies its run."""

    same: ClassVar[Sequence[str]] = ("lightning_sparse",)
    by: ClassVar[Sequence[str]] = ()
    """Columns by which the table groups runs: everything except seeds."""
    values: ClassVar[Sequence[str]] = ()
    """Columns of results that the table shows."""

    def checkpoint(self, options: Options, key: Mapping[str, Any]) -> Path:
        """The checkpoint file of a run, which is specific to the part, its number of epochs and the version."""
        words = [self.name, *key.values(), f"{self.recipe(options).get('epochs')} epochs", lightning_sparse.__version__]
        return (options.work or options.out) / f"{re.sub(r'[^0-9A-Za-z.]+', '-', '-'.join(map(str, words)))}.ckpt"

    def has(self, content: Mapping[str, Any], key: Any) -> bool:
        return bool(pick(content.get("runs", []), **key))

    def put(self, content: dict[str, Any], key: Any, value: Any) -> None:
        rows = value if isinstance(value, list) else [value]
        content["runs"] = [*content.get("runs", []), *({**key, **row, "torch": torch.__version__} for row in rows)]

    def table(self, out: Path) -> str:
        """Mean and standard deviation over seeds, as a table."""
        groups: dict[tuple[Any, ...], Runs] = {}
        for run in self.content(out).get("runs", []):
            groups.setdefault(tuple(run.get(name) for name in self.by), []).append(run)
        rows = [[*self.by, *self.values, "seeds", "published"]]
        for key, runs in groups.items():
            found = [[run[name] for run in runs if run.get(name) is not None] for name in self.values]
            cells = [" ".join(map(str, v)) if v and isinstance(v[0], list) else spread(v, 4, 1) for v in found]
            rows.append([*("" if part is None else str(part) for part in key), *cells, str(len(runs)), self.reference(*key)])
        return markdown(rows)

    def reference(self, *key: Any) -> str:
        """The result that the authors report."""
        return ""


def whole(measure: Callable[[Options], Any]) -> Callable[[Options], Parts]:
    """Make the parts of a suite that has only one."""
    return lambda options: iter([((), partial(measure, options))])


def at_once(work: Sequence[tuple[Suite, int]], count: int, options: Options, until: float = math.inf) -> int:
    """Run parts of suites in up to `count` processes at a time and return the number of failures.

    Processes that are still running at the deadline `until` are killed.
    """
    waiting, running, failed = list(work), list[Any](), 0
    command = [sys.executable, "-m", "benchmarks", "--data", options.data, "--out", str(options.out)]
    command += [f"--epochs={options.epochs}"] if options.epochs else []
    try:
        while (waiting or running) and monotonic() < until:
            failed += sum(process.poll() not in (None, 0) for process in running)
            running = [process for process in running if process.poll() is None]
            for suite, place in waiting[: count - len(running)]:
                part = f"--part={place + 1}/{len(list(suite.parts(options)))}"
                running.append(subprocess.Popen([*command, suite.name, part], stdout=subprocess.DEVNULL))
                waiting.pop(0)
            sleep(0.2)
    finally:
        for process in running:
            process.kill()
    return failed


def machine() -> dict[str, Any]:
    """Versions and hardware, without host names or paths."""
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


def show(title: str, value: Any, indent: int = 0) -> None:
    """Print nested numbers; ratios are shown with their middle half."""
    if isinstance(value, dict) and "ratio" not in value:
        print(f"{'':{indent}}{title}", flush=True)
        for key, inner in value.items():
            show(key, inner, indent + 2)
        return
    if isinstance(value, float):
        value = f"{value:.5g}"
    elif isinstance(value, dict):
        rest = ", ".join(f"{key} {number:.4g}" for key, number in value.items() if key not in ("ratio", "low", "high"))
        value = f"{value['ratio']:7.3f} ({value['low']:.3f} to {value['high']:.3f})  {rest}"
    print(f"{'':{indent}}{title!s:{40 - indent}s} {value}", flush=True)


def pick(runs: Runs, **what: Any) -> Runs:
    """The runs with these values."""
    return [run for run in runs if all(name in run and run[name] == value for name, value in what.items())]


def spread(values: Sequence[float], digits: int = 2, factor: float = 100) -> str:
    """Mean and standard deviation."""
    scaled = [factor * value for value in values]
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{deviation}" if scaled else ""


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table whose first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
