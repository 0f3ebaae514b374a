"""Interleaved timing of functions, or of variants of training one model, in one run; and memory in a separate process.

Two runs of the same code differ by more than the effects measured here, because of memory placement and other load on the
machine. Variants are therefore interleaved step by step, and every other round goes in reverse order. Each step is compared
with one of its own round. The result is the median over rounds, with the middle half as spread.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from benchmarks import loop
from benchmarks.record import LeftOut
from benchmarks.trainers import quiet, random_images
from lightning_sparse.loop import Sparsifier

WARM_UP = 3
"""Number of rounds that are not counted."""

Numbers = dict[str, float]

# ---- times -------------------------------------------------------------------------------------------------------------


def now(device: str = "cpu") -> float:
    """The time once the device has finished all its work."""
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter()


def timed(function: Callable[[], Any], device: str = "cpu") -> float:
    """Time one call, in seconds."""
    start = now(device)
    function()
    return now(device) - start


def in_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm_up: int = WARM_UP
) -> list[Numbers]:
    """Time all functions in every round, in seconds. A function that returns a float has measured its own time."""
    seen = []
    for number in range(warm_up + rounds):
        times = {}
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            start = now(device)
            own = ways[name]()
            times[name] = own if isinstance(own, float) else now(device) - start
        seen.append({name: times[name] for name in ways})
    return seen[warm_up:]


def middle(values: Sequence[float]) -> Numbers:
    """The median, and the middle half as spread."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return {"ratio": statistics.median(ordered), "low": ordered[quarter], "high": ordered[-1 - quarter]}


def ratios(rounds: Sequence[Numbers], base: str) -> dict[str, Numbers]:
    """Ratios of each variant to the baseline in the same round."""
    return {
        name: {**middle([r[name] / r[base] for r in rounds]), "seconds": statistics.median(r[name] for r in rounds)}
        for name in rounds[0]
    }


def share(seconds: Sequence[float], of: float) -> Numbers:
    """Times as fractions of the time `of`."""
    return {**middle([value / of for value in seconds]), "seconds": statistics.median(seconds)}


# ---- variants of training ----------------------------------------------------------------------------------------------


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, eq=False)
class Way:
    """A variant of training one model: the active methods of this package, and functions to call at certain moments."""

    methods: Sequence[Sparsifier] = ()
    enter: Callable[[], Any] = nothing
    before_step: Callable[[], Any] = nothing
    after_step: Callable[[], Any] = nothing
    leave: Callable[[], Any] = nothing


class Step(NamedTuple):
    """One step: its variant, its seconds, those inside stations of methods, whether masks changed, and whether it counts."""

    way: str
    seconds: float
    inside: float = 0.0
    changed: bool = False
    counts: bool = True


class Turns(L.Callback):
    """Switch the model to another variant before each step, and time all steps. Must be listed first.

    All methods begin in the first step, and all are active at the start of every epoch.

    Args:
        methods: methods of this package that any of the variants needs.
        make: function that makes the variants from the module, called after the first step.
        swing: whether every other round goes in reverse order.
        device: device that must finish its work before the time is read.
        in_a_row: number of steps that a variant makes in a row. Only the last one is timed. In the first, the caches hold
            what the previous variant used, and taking over has just written to weights and moments.
    """

    def __init__(
        self,
        methods: Sequence[Sparsifier],
        make: Callable[[Any], dict[str, Way]],
        swing: bool = True,
        device: str = "cpu",
        in_a_row: int = 1,
    ) -> None:
        self.methods, self.make, self.swing, self.device, self.in_a_row = methods, make, swing, device, in_a_row
        self.untimed = 0
        self.ways: dict[str, Way] = {}
        self.way, self.current = "", Way(methods)
        self.steps: list[Step] = []
        self.started, self.inside, self.depth, self.changed = 0.0, 0.0, 0, False

    def fit(self, module: L.LightningModule, batch: int, steps: int, epochs: int = 1, **options: Any) -> None:
        """Train on random images, with `steps` timed steps per epoch."""
        callbacks = [self, *self.methods, *options.pop("callbacks", ()), _Last(self)]
        with loop.watched(self.timing, self.noting):
            quiet(callbacks, self.device, max_epochs=epochs, **options).fit(
                module, random_images(batch, steps * self.in_a_row)
            )

    def table(self, base: str) -> dict[str, Any]:
        """Step times of all variants as ratios to one of them."""
        count = len(self.ways)
        whole = range(WARM_UP * count, len(self.steps) - count + 1, count)
        rounds = [{step.way: step.seconds for step in self.steps[start : start + count]} for start in whole]
        return ratios([{name: times[name] for name in self.ways} for times in rounds], base)

    def inside_of(self, way: str, of: float) -> Numbers:
        """Seconds inside stations as fractions of the time `of`."""
        return share([step.inside for step in self.steps[WARM_UP * len(self.ways) :] if step.way == way], of)

    def hand_over(self, way: Way) -> None:
        self.current.leave()
        if self.methods:
            loop.hand_over(self.methods[0], way.methods)
        way.enter()
        self.current = way

    def counts(self) -> bool:
        """Whether the step that ends now is included in the results."""
        return True

    def timing(self, function: Any) -> Any:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:  # one station may call another
                    self.inside += perf_counter() - start

        return run

    def noting(self, function: Any) -> Any:
        def run(*args: Any) -> Any:
            self.changed = True
            return function(*args)

        return run

    def on_train_epoch_start(self, *args: Any) -> None:
        self.hand_over(Way(self.methods))

    on_train_end = on_train_epoch_start

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.module = pl_module
        if len(self.steps) == 1 and not self.ways:
            self.ways = self.make(pl_module)
        if self.steps:
            turn, place = divmod(len(self.steps), len(self.ways))
            self.way = list(self.ways)[:: -1 if self.swing and turn % 2 == 0 else 1][place]
            if self.current is not self.ways[self.way]:
                self.hand_over(self.ways[self.way])
        self.inside, self.changed, self.started = 0.0, False, now(self.device)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.current.before_step()

    def on_train_batch_end(self, *args: Any) -> None:
        self.current.after_step()

    def end(self) -> None:
        """Record the step that has ended, if it is the last one of its variant for now."""
        self.untimed = (self.untimed + 1) % self.in_a_row
        if self.untimed:
            return
        seconds = now(self.device) - self.started
        self.steps.append(Step(self.way, seconds, self.inside, self.changed, self.counts()))


class _Last(L.Callback):
    """End the step. Listed last."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_end(self, *args: Any) -> None:
        self.turns.end()


# ---- memory ------------------------------------------------------------------------------------------------------------


def growth(function: Callable[[], Any], device: str = "cpu") -> float:
    """Peak growth of the memory of this process in MiB while the function runs; host memory is measured on Linux only."""
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
    """Run a module in a separate process and return the last number that it prints.

    The process has one thread and returns freed blocks of a megabyte or more to the system. Its peak is therefore the memory
    that it needs at one time, not what the allocator keeps.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise LeftOut("its process failed, see above")
    return float(done.stdout.split()[-1])


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes of tensors that are alive at the same time, beyond those before, as recorded by the profiler."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def held(keeper: Any, module: torch.nn.Module | None = None) -> int:
    """Bytes of all tensors that an object of the package keeps.

    Each storage counts once. Parameters and gradients of `module` do not count.
    """
    parameters = [] if module is None else list(module.parameters())
    own = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    seen: set[int] = {tensor.untyped_storage().data_ptr() for tensor in own}
    total = 0
    values = [vars(keeper)]
    while values:
        value = values.pop()
        storage = value.untyped_storage() if isinstance(value, Tensor) else None
        key = id(value) if storage is None else storage.data_ptr()
        if key in seen:
            continue
        seen.add(key)
        if storage is not None:
            total += storage.nbytes()
        elif isinstance(value, dict):  # other mappings may compute their values
            values.extend(value.values())
        elif isinstance(value, list | tuple):
            values.extend(value)
        elif type(value).__module__.startswith(("lightning_sparse.core", "lightning_sparse.methods")):
            values.append(vars(value))
    return total
