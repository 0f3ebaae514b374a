"""Run everything that needs a CUDA device within a time limit, most important first.

    python -m benchmarks.gpu --out results --minutes 9 [--data DIR]     run what is missing in `results`
    python -m benchmarks.gpu --out results --device cpu --quick         check that it runs, without a GPU

Checks come first, one after the other. The papers' own recipes follow, several at once on the GPU, if their data is
available. Finished results are JSON files in `--out`. If that folder has the files of an earlier run, only the rest is run,
and training runs resume from their last checkpoint. A table of all results is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks import cka_regularization, hypersparse, masking, methods, overhead, rewiring, sharded, updates
from benchmarks.accuracy import Comparison
from benchmarks.record import Measurements, Options, Suite, at_once, whole
from benchmarks.suites import PAPER
from benchmarks.trainers import Net, quiet
from benchmarks.turns import timed
from lightning_sparse import SNIP, MagnitudePruning, RigL
from lightning_sparse.export import choose_semi_structured
from lightning_sparse.functional import kth_smallest
from lightning_sparse.loop import Sparsifier


def contract(options: Options) -> dict[str, Any]:
    """Run the contract tests that need a GPU: 16-bit mixed precision with a planted infinity, fused optimizer or not."""
    command = "-m pytest -q tests -m gpu -n 8 -p no:cacheprovider -o addopts="
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, timeout=400)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print("\n".join(lines[-200:]), flush=True)
    return {"exit": done.returncode, "end": lines[-1:], "failed": [line for line in lines if line.startswith("FAILED")]}


def order_statistics(options: Options) -> dict[str, Any]:
    """Time the k-th smallest value against torch's functions, and check that all of them agree."""
    table: dict[str, Any] = {}
    for n in [100_000] if options.quick else [1_000_000, 25_000_000, 100_000_000, 1_000_000_000]:
        values, k, found = torch.rand(n, device=options.device), int(0.9 * n), set()
        for name, way in {
            "kth_smallest": lambda v=values, k=k: kth_smallest([v], k),
            "torch.kthvalue": lambda v=values, k=k: v.kthvalue(k + 1).values,
            "torch.sort": lambda v=values, k=k: v.sort().values[k],
        }.items():
            try:
                found.add(float(way()))
                table[f"{name}, {n:,}, seconds"] = min(timed(way, options.device) for _ in range(5))
            except RuntimeError as error:
                table[f"{name}, {n:,}"] = str(error).splitlines()[0]
        table[f"same value, {n:,}"] = len(found) == 1
    return table


def fit(method: Sparsifier, device: str, wrap: Callable[[Any], Any] = lambda module: module, **more: Any) -> dict[str, Any]:
    """Train for three epochs on random images; return the final sparsity of masks and weights, and the time."""
    module = Net("convolutions")
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), fused=device == "cuda")
    data = torch.utils.data.TensorDataset(torch.rand(512, 3, 32, 32), torch.randint(0, 10, (512,)))
    trainer = quiet([method], device, max_epochs=3, precision="16-mixed" if device == "cuda" else "bf16-mixed", **more)
    start = perf_counter()
    trainer.fit(wrap(module), torch.utils.data.DataLoader(data, 64))
    zeros = sum(int((p == 0).sum()) for p in module.parameters() if p.ndim > 1)
    return {"masks": method.masks.sparsity, "zeros": zeros / method.masks.total, "seconds": perf_counter() - start}


def inductor(options: Options) -> dict[str, Any]:
    """Train a compiled module while its masks change, and return its final sparsity."""
    compiled = partial(torch.compile, backend="eager" if options.quick else "inductor")
    return fit(MagnitudePruning(0.9), options.device, compiled)


def collectives(options: Options) -> dict[str, Any]:
    """Distributed training with a single process: whatever methods reduce and compare goes through NCCL."""
    methods = [MagnitudePruning(0.9), RigL(0.9), SNIP(0.9, batches=2)]
    numbers: dict[str, Any] = {type(m).__name__: fit(m, options.device, strategy="ddp") for m in methods}
    if torch.distributed.is_initialized():
        numbers["backend"] = torch.distributed.get_backend()
        torch.distributed.destroy_process_group()
    return numbers


def two_of_four(options: Options) -> dict[str, Any]:
    """Time the sparse kernel of a 2:4 linear layer in bfloat16 against the dense product."""
    numbers = {}
    for size in [256] if options.quick else [1024, 4096, 8192]:
        net = nn.Sequential(nn.Linear(size, size))
        net[0].weight.data.view(size, -1, 4)[:, :, :2] = 0
        net = net.to(options.device, torch.bfloat16)
        chosen = choose_semi_structured(net, torch.randn(size, size, device=options.device, dtype=torch.bfloat16))[0]
        numbers[f"{size} x {size}, batch {size}"] = {"milliseconds": chosen.milliseconds, "note": chosen.note}
    return numbers


CHECKS = {
    name: Measurements(f"gpu_{name}", parts)
    for name, parts in {
        "contract": whole(contract),
        "updates": updates.parts,
        "overhead": overhead.parts,
        "methods": methods.parts,
        "collectives": whole(collectives),
        "shards": whole(sharded.on_one_device),
        "inductor": whole(inductor),
        "two_of_four": whole(two_of_four),
        "order_statistics": whole(order_statistics),
        "masking": masking.parts,
        "hypersparse": hypersparse.parts,
        "rewiring": rewiring.parts,
        "cka": cka_regularization.parts,
    }.items()
}


def trainings(options: Options, suites: Sequence[Comparison] = PAPER) -> list[tuple[Suite, int]]:
    """The unfinished runs of the papers' own recipes whose data is available, by seed and then from short to long."""
    work = []
    for suite in sorted(suites, key=lambda suite: suite.setting.epochs):
        try:
            suite.prepare(options)
            seeds = [key["seed"] for key, _ in suite.parts(options)]
            work += [(seeds[place], suite, place) for place in suite.missing(options)]
        except SystemExit as error:
            print(f"{suite.name} is left out. {error}", flush=True)
    return [(suite, place) for _, suite, place in sorted(work, key=itemgetter(0))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="data", help="folder with the data, in torchvision's layout")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--at-once", type=int, default=6, help="number of training runs at once")
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--epochs", type=int, help="epochs per training run, for a test")
    parser.add_argument("--quick", action="store_true", help="run small checks and no training runs")
    given = parser.parse_args()
    options = Options(data=given.data, out=given.out, device=given.device, quick=given.quick, epochs=given.epochs)
    end = monotonic() + 60 * given.minutes
    for name in given.checks:
        start = monotonic()
        try:
            if CHECKS[name].missing(options):
                CHECKS[name].run(options, end)
        except (Exception, SystemExit):
            print(f"{name} failed\n{traceback.format_exc()}", flush=True)
        print(f"{name}: {monotonic() - start:.0f} s", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    at_once([] if given.quick else trainings(options), given.at_once, options, end)
    print("\ncheck" + " " * 16 + "numbers")
    for path in sorted(given.out.glob("gpu_*.json")):
        print(f"{path.stem.removeprefix('gpu_'):21s}{json.dumps(json.loads(path.read_text())['numbers'])[:600]}")
    for suite in PAPER:
        if suite.content(given.out):
            print(f"\n{suite.name}\n{suite.table(given.out)}")


if __name__ == "__main__":
    main()
