"""Everything that only a CUDA device can answer, in order of value, within a time limit.

    python -m benchmarks.gpu --out results --minutes 9 [--data DIR]     run what `results` does not hold yet
    python -m benchmarks.gpu --out results --device cpu --quick         see that it runs, without a GPU

Checks come first, one after the other; then the papers' own recipes of `benchmarks.accuracy`, several at once on the card,
as far as their data are there. What is finished is a JSON file in `--out`; run again with the files of an earlier run there,
and only the rest is done, a training from its last checkpoint. A table of all of them is printed last. `python -m
benchmarks.accuracy --suite paper --merge --out results` puts the trainings of a suite into one file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks import accuracy
from benchmarks.accuracy import GROUPS, SETTINGS, SUITES, collect, have_data, runs
from benchmarks.record import machine, timed
from lightning_sparse import SNIP, MagnitudePruning, RigL
from lightning_sparse.functional import apply_bits_, kth_smallest, mask_bits
from lightning_sparse.loop import Sparsifier

Numbers = dict[str, Any]


def contract(device: str, quick: bool) -> Numbers:
    """The points of the contract that need a GPU: 16-bit mixed precision with a planted infinity, fused or not."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests",
        "-m",
        "gpu",
        "-n",
        "8",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print("\n".join(lines[-200:]), flush=True)
    return {"exit": done.returncode, "end": lines[-1:], "failed": [line for line in lines if line.startswith("FAILED")]}


def order_statistics(device: str, quick: bool) -> Numbers:
    """The k-th smallest value, beside what torch offers; and whether all give the same value."""
    table: Numbers = {}
    for n in [100_000] if quick else [1_000_000, 25_000_000, 100_000_000, 1_000_000_000]:
        values, k = torch.rand(n, device=device), int(0.9 * n)
        ways: dict[str, Callable[[], Tensor]] = {
            "kth_smallest": lambda v=values, k=k: kth_smallest([v], k),  # type: ignore[misc]
            "torch.kthvalue": lambda v=values, k=k: v.kthvalue(k + 1).values,  # type: ignore[misc]
            "torch.sort": lambda v=values, k=k: v.sort().values[k],  # type: ignore[misc]
        }
        found = {}
        for name, way in ways.items():
            try:
                found[name] = float(way())
                table[f"{name}, {n:,}, seconds"] = min(timed(way, device) for _ in range(5))
            except RuntimeError as error:
                table[f"{name}, {n:,}"] = str(error).splitlines()[0]
        table[f"same value, {n:,}"] = len(set(found.values())) == 1
    return table


def masking(device: str, quick: bool) -> Numbers:
    """Applying a mask: bits, masked_fill, and a float mask of four times the size."""
    n = 100_000 if quick else 100_000_000
    weight, mask = torch.randn(n, device=device), torch.rand(n, device=device) > 0.9
    bits, dropped, floats = mask_bits(mask), ~mask, mask.float()
    ways: dict[str, Callable[[], Any]] = {
        "apply_bits_": lambda: apply_bits_(weight, bits),
        "masked_fill_": lambda: weight.masked_fill_(dropped, 0),
        "mul_ by a float mask": lambda: weight.mul_(floats),
        "mul_ by a boolean mask": lambda: weight.mul_(mask),
    }
    return {name: min(timed(way, device) for _ in range(10)) for name, way in ways.items()}


class Small(L.LightningModule):
    """Convolutions on random images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=self.device.type == "cuda")


def fit(module: nn.Module, method: Sparsifier, device: str, **options: Any) -> Numbers:
    """Three epochs; the sparsity of the masks and of the weights in the end, and how long it took."""
    data = torch.utils.data.TensorDataset(torch.rand(512, 3, 32, 32), torch.randint(0, 10, (512,)))
    runner = L.Trainer(
        max_epochs=3,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="16-mixed" if device == "cuda" else "bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[method],
        **options,
    )
    start = perf_counter()
    runner.fit(module, torch.utils.data.DataLoader(data, 64))  # type: ignore[arg-type]
    zeros = sum(int((p == 0).sum()) for p in module.parameters() if p.ndim > 1)
    return {"masks": method.masks.sparsity, "zeros": zeros / method.masks.total, "seconds": perf_counter() - start}


def inductor(device: str, quick: bool) -> Numbers:
    """A compiled module whose masks change while it trains: the sparsity it ends with."""
    compiled = torch.compile(Small(), backend="eager" if quick else "inductor")
    return fit(compiled, MagnitudePruning(0.9), device)  # type: ignore[arg-type]


def collectives(device: str, quick: bool) -> Numbers:
    """Distributed training, of one process: what methods reduce and compare goes through NCCL."""
    methods: list[Sparsifier] = [MagnitudePruning(0.9), RigL(0.9), SNIP(0.9, batches=2)]
    numbers = {type(method).__name__: fit(Small(), method, device, strategy="ddp") for method in methods}
    numbers["backend"] = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return numbers


def two_of_four(device: str, quick: bool) -> Numbers:
    """A linear layer with two zeros in every four weights, in bfloat16: its sparse kernel beside the dense product."""
    from lightning_sparse.export import choose_semi_structured

    numbers: Numbers = {}
    for size in [256] if quick else [1024, 4096, 8192]:
        layer = nn.Linear(size, size)
        layer.weight.data.view(size, -1, 4)[:, :, :2] = 0
        net = nn.Sequential(layer).to(device, torch.bfloat16)
        chosen = choose_semi_structured(net, torch.randn(size, size, device=device, dtype=torch.bfloat16))[0]
        numbers[f"{size} x {size}, batch {size}"] = {"milliseconds": chosen.milliseconds, "note": chosen.note}
    return numbers


def overhead(device: str, quick: bool) -> Numbers:
    """Step time with masks beside the dense step and the peers."""
    from benchmarks.overhead import steps

    precisions = ["32-true"] if device == "cpu" else ["32-true", "16-mixed"]
    models = ["quick"] if quick else ["resnet18", "vit"]
    return {
        f"step, {model}, batch 128, {precision}, {device}": steps(model, 128, 12 if quick else 40, device, precision)
        for model in models
        for precision in precisions
    }


def updates(device: str, quick: bool) -> Numbers:
    """A global mask update beside the peers."""
    from benchmarks.updates import updates

    table: Numbers = {}
    for weights in [1_000_000] if quick else [1_000_000, 10_000_000, 25_000_000, 100_000_000, 1_000_000_000]:
        table[f"mask update, {weights:,} weights"] = updates(weights, 5, device)
    return table


def methods(device: str, quick: bool) -> Numbers:
    """What every method adds to a step, and to peak memory as a ratio to a plain training."""
    from benchmarks.methods import METHODS, measure, peak, takes

    table: Numbers = {}
    for model in ["quick"] if quick else ["resnet18", "vit"]:
        plain = peak("dense", model, 128, device)
        rows = table[f"{model}, batch 128"] = {}
        for name in ["RigL"] if quick else METHODS:
            if takes(name, model):
                rows[name] = {**measure(name, model, 128, 12, device), "memory": peak(name, model, 128, device) / plain}
    return table


def hypersparse(device: str, quick: bool) -> Numbers:
    """The penalty of HyperSparse beside the published way, and beside a step of ResNet-32."""
    from benchmarks.hypersparse import penalty, step

    rounds = 3 if quick else 15
    steps = {f"ResNet-32, width {width}": step(quick, rounds, width, device) for width in (1, 2)}
    return {"VGG-19": penalty(quick, rounds, device)[0], **steps}


def rewiring(device: str, quick: bool) -> Numbers:
    """Steps between updates of dynamic sparse training, and updates beside a step of ResNet-50."""
    from benchmarks.rewiring import steps, updates

    between = steps("quick" if quick else "resnet18", 128, 3 if quick else 30, device, "32-true" if quick else "16-mixed")
    return {"between updates": between, "updates": updates(quick, 3 if quick else 10, device)}


def cka(device: str, quick: bool) -> Numbers:
    """The penalty on similar layers in a step of ResNet-20."""
    from benchmarks.cka_regularization import Net, ours, turns

    numbers: Numbers = {}
    ways: Any = {"plain step": (None, None), "8 samples": (ours, 8), "all samples": (ours, None)}
    turns("step of ResNet-20", ways, Net(quick, 128, device), device, 3 if quick else 40, numbers)
    return numbers


CHECKS: dict[str, Callable[[str, bool], Numbers]] = {
    "contract": contract,
    "updates": updates,
    "overhead": overhead,
    "methods": methods,
    "collectives": collectives,
    "inductor": inductor,
    "two_of_four": two_of_four,
    "order_statistics": order_statistics,
    "masking": masking,
    "hypersparse": hypersparse,
    "rewiring": rewiring,
    "cka": cka,
}


def trainings(out: Path, data: str) -> Iterator[tuple[str, int]]:
    """The runs of the papers' own recipes that are not done and have their data; first seeds first, short before long."""
    suites = sorted(GROUPS["paper"], key=lambda suite: SETTINGS[SUITES[suite].setting].epochs)
    missing = set()
    for suite in suites:
        try:
            have_data(SETTINGS[SUITES[suite].setting], data, download=False)
        except SystemExit as error:
            print(f"{suite} is left out. {error}", flush=True)
            missing.add(suite)
    for seed in range(5):
        for suite in suites:
            done = {(r["seed"], r["method"], r["sparsity"]) for r in collect(suite, out)["runs"]}
            for number, run in enumerate(runs(SUITES[suite])):
                if run[0] == seed and run not in done and suite not in missing:
                    yield suite, number


def write(out: Path, name: str, numbers: Numbers) -> None:
    command = "python -m benchmarks.gpu --out results"
    (out / f"gpu_{name}.json").write_text(
        json.dumps({"command": command, "machine": machine(), "numbers": numbers}, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--at-once", type=int, default=6, help="trainings")
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--epochs", type=int, help="of trainings, to see that they run")
    parser.add_argument("--quick", action="store_true", help="small checks and no trainings")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    end = monotonic() + 60 * arguments.minutes
    for name in arguments.checks:
        if not (out / f"gpu_{name}.json").exists() and monotonic() < end:
            start = monotonic()
            try:
                write(out, name, CHECKS[name](arguments.device, arguments.quick))
            except Exception:
                print(f"{name} failed\n{traceback.format_exc()}", flush=True)
            print(f"{name}: {monotonic() - start:.0f} s", flush=True)
    waiting = [] if arguments.quick else list(trainings(out, arguments.data))
    running: list[subprocess.Popen[bytes]] = []
    while (waiting or running) and monotonic() < end:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < arguments.at_once:
            suite, number = waiting.pop(0)
            command = [
                sys.executable,
                "-m",
                "benchmarks.accuracy",
                "--suite",
                suite,
                "--data",
                arguments.data,
                "--out",
                str(out),
            ]
            command += ["--part", f"{number + 1}/{len(runs(SUITES[suite]))}"]
            command += ["--epochs", str(arguments.epochs)] if arguments.epochs else []
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        sleep(0.5)
    for process in running:
        process.kill()
    print("\ncheck" + " " * 16 + "numbers")
    for path in sorted(out.glob("gpu_*.json")):
        print(f"{path.stem.removeprefix('gpu_'):21s}{json.dumps(json.loads(path.read_text())['numbers'])[:600]}")
    for suite in GROUPS["paper"]:
        if collect(suite, out)["runs"]:
            print(f"\n{suite}\n{accuracy.table(suite, out)}")


if __name__ == "__main__":
    main()
