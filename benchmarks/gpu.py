"""Everything that only a CUDA device can answer, in order of value, within a time limit.

    python -m benchmarks.gpu --out results --minutes 9 [--data DIR]     run what `results` does not hold yet
    python -m benchmarks.gpu --out results --device cpu --quick         see that it runs, without a GPU

Checks come first, one after the other; then trainings, several at once on the card. What is finished is a JSON file in
`--out`; run again with the files of an earlier run there, and only the rest is done. A table of all of them is printed last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks import accuracy, lpss
from benchmarks.accuracy import GROUPS, SETTINGS, SUITES, runs
from benchmarks.record import machine, timed
from lightning_sparse import MagnitudePruning
from lightning_sparse.functional import apply_bits_, kth_smallest, mask_bits

Numbers = dict[str, Any]


def contract(device: str, quick: bool) -> Numbers:
    """The points of the contract that need a GPU: 16-bit mixed precision with a planted infinity, fused or not."""
    command = [sys.executable, "-m", "pytest", "-q", "tests", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    return {"exit": done.returncode, "end": done.stdout.strip().splitlines()[-3:]}


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


def inductor(device: str, quick: bool) -> Numbers:
    """A compiled module whose masks change while it trains: the sparsity it ends with, and whether it recompiled."""
    data = torch.utils.data.TensorDataset(torch.rand(512, 3, 32, 32), torch.randint(0, 10, (512,)))
    module, method = Small(), MagnitudePruning(0.9)
    compiled = torch.compile(module, backend="eager" if quick else "inductor")
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
    )
    start = perf_counter()
    runner.fit(compiled, torch.utils.data.DataLoader(data, 64))  # type: ignore[arg-type]
    zeros = sum(int((p == 0).sum()) for p in module.parameters() if p.ndim > 1)
    return {"masks": method.masks.sparsity, "zeros": zeros / method.masks.total, "seconds": perf_counter() - start}


def overhead(device: str, quick: bool) -> Numbers:
    """Step time with masks beside the dense step and the peers."""
    from benchmarks.overhead import steps, updates

    size = "quick" if quick else "resnet18"
    precisions = ["32-true"] if device == "cpu" else ["32-true", "16-mixed"]
    table: Numbers = {precision: steps(size, 128, 12 if quick else 50, device, precision) for precision in precisions}
    for weights in [1_000_000] if quick else [1_000_000, 25_000_000, 100_000_000, 1_000_000_000]:
        try:
            table[f"mask update, {weights:,}"] = updates(weights, 3, device)
        except RuntimeError as error:  # out of memory, or more than an operator can index
            table[f"mask update, {weights:,}"] = str(error).splitlines()[0]
    return table


def methods(device: str, quick: bool) -> Numbers:
    """What every method adds to a step of ResNet-18, and to peak memory as a ratio to a plain training."""
    from benchmarks.methods import METHODS, measure, peak

    model, names = ("quick", ["RigL"]) if quick else ("resnet18", list(METHODS))
    plain = peak("dense", model, 128, 10, device)
    table: Numbers = {"plain, MiB": plain}
    for name in names:
        if name != "LayerSparsity":  # no chain of layers that could merge
            memory = peak(name, model, 128, 10, device) / plain
            table[name] = {"memory": memory, **measure(name, model, 128, 10, device)}
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
    from benchmarks.cka import Net, ours, turns

    numbers: Numbers = {}
    ways: Any = {"plain step": (None, None), "8 samples": (ours, 8), "all samples": (ours, None)}
    turns("step of ResNet-20", ways, Net(quick, 128, device), device, 3 if quick else 40, numbers)
    return numbers


CHECKS: dict[str, Callable[[str, bool], Numbers]] = {
    "contract": contract,
    "order_statistics": order_statistics,
    "inductor": inductor,
    "masking": masking,
    "overhead": overhead,
    "methods": methods,
    "hypersparse": hypersparse,
    "rewiring": rewiring,
    "cka": cka,
}

TRAININGS = {
    f"{suite.removeprefix('paper-')}_{method.replace(' ', '_')}_{sparsity}_seed{seed}": (suite, method, sparsity, seed)
    for wanted in range(5)
    for suite in sorted(GROUPS["paper"], key=lambda suite: SETTINGS[SUITES[suite].setting].epochs)
    for seed, method, sparsity in runs(SUITES[suite])
    if seed == wanted
}
"""Name -> suite, method, sparsity and seed of the papers' own recipes in `benchmarks.accuracy`: first seeds first, and short
trainings before long ones."""


def train(name: str, data: str, quick: bool, out: Path) -> Numbers:
    """One training of the list, in a process of its own; where an earlier one was killed, it goes on from its checkpoint."""
    suite, method, sparsity, seed = TRAININGS[name]
    setting = SETTINGS[SUITES[suite].setting]
    if quick:
        setting = lpss.RECIPES["quick"] if isinstance(setting, lpss.Recipe) else replace(SETTINGS["digits"], epochs=3)
    similarity = SUITES[suite].similarity
    return accuracy.train(setting, method, sparsity, seed, data, similarity=similarity, checkpoint=out / f"{name}.ckpt")


def write(out: Path, name: str, numbers: Numbers) -> None:
    (out / f"{name}.json").write_text(json.dumps({"machine": machine(), "numbers": numbers}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train", help="one training, by name")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.train:
        write(out, arguments.train, train(arguments.train, arguments.data, arguments.quick, out))
        return
    end = monotonic() + 60 * arguments.minutes
    for name, check in CHECKS.items():
        if not (out / f"{name}.json").exists() and monotonic() < end:
            try:
                write(out, name, check(arguments.device, arguments.quick))
            except Exception:
                print(f"{name} failed\n{traceback.format_exc()}", flush=True)
    waiting = [name for name in TRAININGS if not (out / f"{name}.json").exists()]
    waiting = waiting[:2] if arguments.quick else waiting
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--data", arguments.data]
    command += ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    running: list[subprocess.Popen[bytes]] = []
    while (waiting or running) and monotonic() < end:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < arguments.at_once:
            running.append(subprocess.Popen([*command, "--train", waiting.pop(0)]))
        if running:
            try:
                running[0].wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue
    for process in running:
        process.kill()
    print("\nresult" + " " * 44 + "numbers")
    for path in sorted(out.glob("*.json")):
        print(f"{path.stem:50s}{json.dumps(json.loads(path.read_text())['numbers'])[:400]}")


if __name__ == "__main__":
    main()
