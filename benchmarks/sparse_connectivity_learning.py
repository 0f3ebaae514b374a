"""Sparse connectivity learning: what a step costs, what is held in memory, and accuracy against sparsity.

    python -m benchmarks.sparse_connectivity_learning cost --save   ResNet-20, batch 128: time and memory
    python -m benchmarks.sparse_connectivity_learning evidence --data DIR   LeNet-300-100; goes on where it stopped
    python -m benchmarks.sparse_connectivity_learning table   print the evidence that is there

Time: steps with and without the callback take turns on one model in one run, each compared with its neighbor; the
median over rounds is the number. Evidence: a price sweep beside gradual magnitude pruning at the sparsities it led to,
same seeds; and gradients normalized or not, each with the mask rate that is best on validation data, at equal sparsity.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import accuracy
from benchmarks.hypersparse import peak_memory
from benchmarks.overhead import Inside
from benchmarks.record import RESULTS, machine, ratios, save, show
from lightning_sparse import MagnitudePruning, SparseConnectivityLearning
from lightning_sparse.data import FashionMNIST
from lightning_sparse.models import LeNet300, ResNet

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# ---- time and memory ------------------------------------------------------------------------------------------------

WAYS = ["dense", "SparseConnectivityLearning"]


class Net(L.LightningModule):
    """A ResNet for images of 32 pixels, SGD with momentum."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.net = ResNet(depth=depth)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class Turns(L.Callback):
    """First of the callbacks: lets the method take part in every other step, in changing order."""

    def __init__(self, method: SparseConnectivityLearning) -> None:
        self.method, self.way, self.started = method, WAYS[1], 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx >= 2:
            self.way = (WAYS if batch_idx // 2 % 2 else WAYS[::-1])[batch_idx % 2]
            active, stations = self.way == WAYS[1], self.method.stations
            self.method._leads = lambda trainer: active  # type: ignore[method-assign]
            for handle in stations._handles:
                handle.remove()
            stations._handles.clear()
            if active:
                stations._handles.append(trainer.optimizers[0].register_step_post_hook(stations._after_step))
        self.started = perf_counter()


class Stop(L.Callback):
    """Last of the callbacks: notes the time."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.times: dict[str, list[float]] = {way: [] for way in WAYS}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.inside = Inside(self.turns.method.stations)
        elif batch_idx >= 6:  # three rounds warm up
            self.times[self.turns.way].append(perf_counter() - self.turns.started)
            if self.turns.way == WAYS[1]:
                self.inside.per_step.append(self.inside.seconds)
        self.inside.seconds = 0.0


def step_time(depth: int, batch: int, rounds: int) -> dict[str, Any]:
    """Step time with and without the callback, and the time inside its stations."""
    torch.manual_seed(0)
    method = SparseConnectivityLearning(0.05)
    turns = Turns(method)
    stop = Stop(turns)
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * (2 * rounds + 6)
    runner = L.Trainer(max_epochs=1, callbacks=[turns, method, stop], **QUIET)
    runner.fit(Net(depth), torch.utils.data.DataLoader(data, batch_size=None))
    table = ratios([dict(zip(WAYS, pair, strict=True)) for pair in zip(*stop.times.values(), strict=True)], WAYS[0])
    inside, dense = sorted(stop.inside.per_step), table[WAYS[0]]["seconds"]
    middle, quarter = inside[len(inside) // 2], len(inside) // 4
    row = {"ratio": middle / dense, "low": inside[quarter] / dense, "high": inside[-1 - quarter] / dense, "seconds": middle}
    return {**table, "inside the callback's stations": row}


def memory(depth: int) -> dict[str, float]:
    """Bytes per weight that the callback holds while training and in the checkpoint, and at most for a moment in a step."""
    numbers: dict[str, float] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            weights = sum(weight.numel() for weight in method.weights.values())
            held = [t for group in (method.hidden, method.variables, method.velocity) for t in group.values()]
            every = [value for group in method.memorize().values() if isinstance(group, dict) for value in group.values()]
            saved = [value for value in every if isinstance(value, Tensor)]
            numbers["while training"] = sum(t.untyped_storage().nbytes() for t in held) / weights
            numbers["in the checkpoint"] = sum(t.untyped_storage().nbytes() for t in saved) / weights

    method = SparseConnectivityLearning(0.05)
    data = [(torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,)))] * 2
    stations: list[Any] = []

    class Peak(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            lead, stations[:] = method.stations, [method.stations]
            weights = sum(weight.numel() for weight in method.weights.values())
            during = peak_memory(lambda: lead.before_step(optimizer))
            lead._undo(optimizer)
            numbers["for a moment, before the step"] = during / weights

    runner = L.Trainer(max_epochs=1, callbacks=[Peak(), method, Look()], **QUIET)
    runner.fit(Net(depth), torch.utils.data.DataLoader(data, batch_size=None))
    return numbers


def cost(arguments: argparse.Namespace) -> None:
    depth, rounds = (8, 6) if arguments.quick else (20, arguments.rounds)
    title = f"step, ResNet-{depth}, batch {arguments.batch}, {torch.get_num_threads()} threads"
    numbers = {title: step_time(depth, arguments.batch, rounds), "memory, bytes per weight": memory(depth)}
    show(f"{title}, ratio to dense", numbers[title])
    for name, value in numbers["memory, bytes per weight"].items():
        print(f"  {name:40s} {value:.3f} bytes per weight")
    if arguments.save:
        save("scl_cpu", numbers)


# ---- evidence -------------------------------------------------------------------------------------------------------

SETTING = accuracy.Setting(FashionMNIST, LeNet300, epochs=10, batch_size=256, lr=0.05)
COSTS = (0.02, 0.05, 0.1, 0.2, 0.5)
SEEDS = (0, 1, 2)
RATES = {"rms": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), "none": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)}
UNIT = {"rms": 0.01, "none": 3e-7}
"""Where the controller starts: a hundredth of the rms of the first layer's gradients, normalized and as they are (3e-5)."""

SPARSITIES = (0.95, 0.98)
FIXED = (1e-6, 3e-6, 1e-5, 3e-5)
"""Prices without normalization."""


class Evidence:
    """A list of runs in a file, each made once."""

    def __init__(self, path: Path, root: str, epochs: int | None) -> None:
        self.path, self.root, self.epochs = path, root, epochs
        self.runs: list[dict[str, Any]] = json.loads(path.read_text())["numbers"] if path.exists() else []

    def run(self, study: str, seed: int, make: Callable[[], list[L.Callback]], **what: Any) -> dict[str, Any]:
        """The numbers of one training, from the file if it is there."""
        key = {"study": study, "seed": seed, **what}
        for entry in self.runs:
            if all(entry.get(name) == value for name, value in key.items()):
                return entry
        start = process_time()
        accuracy.METHODS["evidence"] = lambda _: make()
        numbers = accuracy.train(SETTING, "evidence", 0.0, seed, self.root, self.epochs)
        sparsity = 1 - numbers["kept"] / numbers["total"]
        entry = {**key, "sparsity": sparsity, "test": numbers["test"], "val": numbers["val"], "kept": numbers["kept"]}
        self.runs.append({**entry, "cpu_seconds": round(process_time() - start, 1)})
        command = "python -m benchmarks.sparse_connectivity_learning evidence --data DIR"
        result = {"command": command, "machine": machine(), "recipe": recipe(), "numbers": self.runs}
        self.path.write_text(json.dumps(result, indent=1) + "\n")
        print(key, f"sparsity {sparsity:.4f} test {numbers['test']:.4f}", flush=True)
        return self.runs[-1]

    def curve(self) -> None:
        """Five prices, and gradual magnitude pruning at the sparsity that each led to, seed by seed."""
        for seed in SEEDS:
            self.run("dense", seed, list)
            for price in COSTS:
                found = self.run("price", seed, lambda price=price: [SparseConnectivityLearning(price)], price=price)
                self.run("gradual", seed, lambda s=found["sparsity"]: [MagnitudePruning(s)], price=price)

    def ablation(self) -> None:
        """Normalized or not: the mask rate is chosen by validation accuracy of one seed, then judged on others."""
        for norm, rates in RATES.items():
            for sparsity in SPARSITIES:
                tuned = [self.target("rate", 10, norm, sparsity, rate) for rate in rates]
                best = max(tuned, key=lambda entry: entry["val"])["rate"]
                for seed in SEEDS:
                    self.target("tuned", seed, norm, sparsity, best)
        best = max((r for r in self.runs if r["study"] == "rate" and r["norm"] == "none"), key=lambda entry: entry["val"])
        for price in FIXED:
            make = lambda p=price: [SparseConnectivityLearning(p, norm="none", mask_lr=best["rate"])]  # noqa: E731
            self.run("price without norm", SEEDS[0], make, price=price, rate=best["rate"])

    def target(self, study: str, seed: int, norm: str, sparsity: float, rate: float) -> dict[str, Any]:
        def make() -> list[L.Callback]:
            return [SparseConnectivityLearning(UNIT[norm], sparsity=sparsity, norm=norm, mask_lr=rate)]

        return self.run(study, seed, make, norm=norm, target=sparsity, rate=rate)


def recipe() -> dict[str, Any]:
    return {
        "data": "Fashion-MNIST",
        "network": "LeNet-300-100",
        "epochs": SETTING.epochs,
        "batch_size": SETTING.batch_size,
        "lr": f"{SETTING.lr}, cosine, SGD with momentum 0.9",
        "weight_decay": SETTING.weight_decay,
        "reading": "rms per filter, count, strict step, initial 0.1, SGD on masks, all layers; sparsity of all weights",
    }


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f} ({len(values)})"


def table(path: Path) -> None:
    """The evidence as two Markdown tables; mean and standard deviation over seeds, in per cent."""
    runs = json.loads(path.read_text())["numbers"]

    def pick(value: str, **what: Any) -> list[float]:
        return [run[value] for run in runs if all(run.get(name) == wanted for name, wanted in what.items())]

    print(f"\ndense: {spread(pick('test', study='dense'))}\n\n| price | sparsity | SCL | gradual |\n|---|---|---|---|")
    for price in COSTS:
        cells = [
            spread(pick(key, study=study, price=price)) for study, key in COLUMNS if pick(key, study=study, price=price)
        ]
        print(f"| {price} | " + " | ".join(cells) + " |")
    print("\n| target | norm | validation at mask rates | test at the best |\n|---|---|---|---|")
    for sparsity in SPARSITIES:
        for norm in RATES:
            what = {"norm": norm, "target": sparsity}
            tried = dict(zip(pick("rate", study="rate", **what), pick("val", study="rate", **what), strict=True))
            if tried and (found := pick("test", study="tuned", rate=max(tried, key=lambda rate: tried[rate]), **what)):
                shown = ", ".join(f"{rate:g}: {100 * tried[rate]:.2f}" for rate in sorted(tried))
                print(f"| {sparsity} | {norm} | {shown} | {spread(found)} |")
    print("\n| price, no norm | sparsity | SCL |\n|---|---|---|")
    for price in FIXED:
        if found := pick("test", study="price without norm", price=price):
            print(f"| {price} | {spread(pick('sparsity', study='price without norm', price=price))} | {spread(found)} |")
    print(f"\n{len(runs)} runs, {sum(run['cpu_seconds'] for run in runs) / 60:.1f} CPU minutes")


COLUMNS = [("price", "sparsity"), ("price", "test"), ("gradual", "test")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "evidence", "table"])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--save", action="store_true", help="write time and memory to benchmarks/results")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--data", default="data", help="folder of Fashion-MNIST, in torchvision's layout")
    parser.add_argument("--out", type=Path, default=RESULTS / "scl_evidence.json")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments.what == "cost":
        cost(arguments)
        return
    if arguments.what == "evidence":
        evidence = Evidence(arguments.out, arguments.data, 1 if arguments.quick else None)
        evidence.curve()
        evidence.ablation()
    table(arguments.out)


if __name__ == "__main__":
    main()
