"""Accuracy against sparsity: the same recipe, data order and number of epochs for every method.

    python -m benchmarks.accuracy hypersparse --data DIR           run what is not in results/accuracy_hypersparse.json yet
    python -m benchmarks.accuracy hypersparse --data DIR --part 1/2    one of two processes that share the work
    python -m benchmarks.accuracy hypersparse --table              print the table of what is there
    python -m benchmarks.accuracy desk --data DIR                  a group of suites: all that two CPU cores can do

Every run is one line of the result: method, sparsity, seed, test accuracy after the last epoch (none is chosen by looking
at the test set), kept weights counted as non-zeros. A suite that was interrupted goes on where it stopped.

Two numbers say what a run would cost if nothing were ever multiplied by zero, as ratios to the dense network: `inference`,
of the final weights, and `training`, the mean over the run of a forward pass and both parts of the backward pass. The
gradients of weights are counted sparse, or dense for methods that need them dense at every step; what a method reads now
and then (at its updates, or before the first step) is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from benchmarks.record import RESULTS, machine
from lightning_sparse import (
    SET,
    SNIP,
    CKARegularization,
    GraNet,
    GraSP,
    HyperSparse,
    LotteryTicket,
    MagnitudePruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SynFlow,
    WeightPenalty,
)
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.core import count_macs, effective_macs, find_targets
from lightning_sparse.data import CIFAR10, CIFAR100, Digits, FashionMNIST, ImageData
from lightning_sparse.models import Classifier, LeNet5, LeNet300, ResNet
from lightning_sparse.observe import SimilarityMap


@dataclass(frozen=True)
class Setting:
    """How a network is trained; cosine to zero, or a tenth at each milestone, unless a method sets its own rates."""

    data: type[ImageData]
    network: Callable[[int, int, int], nn.Module]
    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    nesterov: bool = False
    milestones: Sequence[int] = ()
    precision: Any = "32-true"
    memory_format: torch.memory_format = torch.contiguous_format


SETTINGS = {
    "digits": Setting(Digits, LeNet300, 12, 64, 0.05),
    "lenet300-fashion": Setting(FashionMNIST, LeNet300, 30, 128, 0.05),
    "lenet300-fashion-15": Setting(FashionMNIST, LeNet300, 15, 128, 0.05),
    "lenet5-fashion": Setting(FashionMNIST, LeNet5, 30, 128, 0.05),
    "lenet5-fashion-5": Setting(
        FashionMNIST, LeNet5, 5, 128, 0.05, precision="bf16-mixed", memory_format=torch.channels_last
    ),
    "resnet8-fashion": Setting(FashionMNIST, lambda *shape: ResNet(*shape, depth=8), 30),
    "resnet20-cifar10": Setting(CIFAR10, ResNet, 40),
    "resnet20-half-cifar10": Setting(
        CIFAR10, lambda *shape: ResNet(*shape, width=0.5), 6, precision="bf16-mixed", memory_format=torch.channels_last
    ),
    # The recipe of random static masks and CKA-SR; the published one reads the test set at the best validation epoch.
    "resnet20-cifar10-160": Setting(CIFAR10, ResNet, 160, nesterov=True, milestones=(80, 120)),
    "resnet20-cifar100-160": Setting(CIFAR100, ResNet, 160, nesterov=True, milestones=(80, 120)),
    "resnet32x2-cifar10": Setting(CIFAR10, lambda *shape: ResNet(*shape, depth=32, width=2), 60, weight_decay=1e-4),
}

METHODS: dict[str, Callable[[float], list[L.Callback]]] = {
    "dense": lambda s: [],
    "random": lambda s: [RandomSparsity(s)],
    "random + CKA-SR": lambda s: [RandomSparsity(s), CKARegularization(1e-4)],
    "random + CKA-SR, all samples": lambda s: [
        RandomSparsity(s),
        CKARegularization(8e-4, samples=None, every_n_batches=1),
    ],
    "random + AugCKA-SR": lambda s: [
        RandomSparsity(s),
        CKARegularization(0.1, samples=None, every_n_batches=1, pairs="all", reduction="mean", unbiased=False),
    ],
    "SNIP": lambda s: [SNIP(s, batches=10)],
    "GraSP": lambda s: [GraSP(s, batches=10)],
    "SynFlow": lambda s: [SynFlow(s)],
    "L1, then one-shot": lambda s: [WeightPenalty(s)],
    "lottery ticket": lambda s: [LotteryTicket(s, rounds=3)],
    "lottery ticket, learning rate": lambda s: [LotteryTicket(s, rounds=3, rewind="learning rate")],
    "one-shot + fine-tuning": lambda s: [MagnitudePruning(s, start=0.5, end=0.5)],
    "gradual": lambda s: [MagnitudePruning(s)],
    "SET": lambda s: [SET(s)],
    "RigL": lambda s: [RigL(s)],
    "GraNet": lambda s: [GraNet(s)],
    "L1-ART": lambda s: [HyperSparse(s, penalty="l1")],
    "HyperSparse": lambda s: [HyperSparse(s)],
    "SCL": lambda s: [SparseConnectivityLearning(sparsity=s)],
}

DENSE_GRADIENTS = ("SCL",)
"""Methods that need the gradients of all weights at every step, of dropped ones too."""


@dataclass(frozen=True)
class Suite:
    """What is compared."""

    setting: str
    methods: Sequence[str]
    sparsities: Sequence[float]
    seeds: Sequence[int] = (0, 1, 2)
    similarity: bool = False
    shares: Sequence[str] = ()  # suites of the same setting, whose runs of the same methods count here too


CKA = ("random + CKA-SR", "random + CKA-SR, all samples", "random + AugCKA-SR")
WITH_TARGET = (
    "dense",
    "random",
    "SNIP",
    "GraSP",
    "SynFlow",
    "L1, then one-shot",
    "lottery ticket",
    "one-shot + fine-tuning",
    "gradual",
    "SET",
    "RigL",
    "GraNet",
    "L1-ART",
    "HyperSparse",
    "SCL",
)
SUITES = {
    "hypersparse": Suite(
        "lenet300-fashion",
        ("dense", "one-shot + fine-tuning", "gradual", "L1-ART", "HyperSparse"),
        (0.9, 0.98, 0.995),
    ),
    "desk-lenet300": Suite("lenet300-fashion-15", WITH_TARGET, (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)),
    "desk-lenet5": Suite("lenet5-fashion-5", WITH_TARGET, (0.9, 0.98, 0.995)),
    "desk-resnet20": Suite(
        "resnet20-half-cifar10", ("dense", "random", "gradual", "RigL", "HyperSparse"), (0.9, 0.98), shares=("cka",)
    ),
    "cka": Suite("resnet20-half-cifar10", ("random", "random + CKA-SR"), (0.9, 0.95, 0.98), similarity=True),
    "cka-cifar10": Suite("resnet20-cifar10-160", ("random", *CKA), (0.95,), seeds=(0, 1, 2, 3, 4), similarity=True),
    "cka-cifar100": Suite("resnet20-cifar100-160", ("random", *CKA), (0.7, 0.85, 0.9, 0.95, 0.98, 0.998), similarity=True),
}

GROUPS = {
    "desk": ("desk-lenet300", "desk-lenet5", "desk-resnet20"),
    "paper": ("cka-cifar10", "cka-cifar100"),
}


def runs(suite: Suite) -> list[tuple[int, str, float]]:
    """Seed, method and sparsity of every run; whole seeds first."""
    return [
        (seed, method, sparsity)
        for seed in suite.seeds
        for method in suite.methods
        for sparsity in ((0.0,) if method == "dense" else suite.sparsities)
    ]


class Work(L.Callback):
    """What forward passes would cost without multiplications by zero, in the course of a training."""

    def __init__(self, macs: dict[str, int], every: int = 50) -> None:
        self.macs, self.every, self.readings = macs, every, list[float]()

    def read(self, module: nn.Module) -> float:
        """Now, as a ratio to the dense network."""
        weights = {target.name: target.weight.detach() for target in find_targets(module)}
        return sum(effective_macs(self.macs, weights).values()) / sum(self.macs.values())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.every == 0:
            self.readings.append(self.read(pl_module))

    def training(self, dense_gradients: bool) -> float:
        """The mean of all readings, for a forward pass, the gradients of activations and those of weights."""
        mean = statistics.mean(self.readings)
        return (2 * mean + (1.0 if dense_gradients else mean)) / 3


def train(
    setting: Setting,
    method: str,
    sparsity: float,
    seed: int,
    root: str,
    epochs: int | None = None,
    similarity: bool = False,
) -> dict[str, Any]:
    """One run; its numbers, with the mean similarity of layers on validation data before and after if asked for."""
    L.seed_everything(seed, verbose=False)
    data = setting.data(root=root, batch_size=setting.batch_size, seed=seed)
    callbacks = METHODS[method](sparsity)
    rounds = [callback.plan.count + 1 for callback in callbacks if isinstance(callback, LotteryTicket)]
    module = Classifier(
        setting.network,
        data.num_classes,
        data.in_channels,
        data.image_size,
        lambda p: torch.optim.SGD(
            p, lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay, nesterov=setting.nesterov
        ),
        (lambda o: torch.optim.lr_scheduler.MultiStepLR(o, list(setting.milestones))) if setting.milestones else None,
        annealing=1 / max([1, *rounds]),  # the schedule is that of one round
    ).to(memory_format=setting.memory_format)
    quiet: dict[str, Any] = {"accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    similarities = SimilarityMap(figure=False)
    if similarity:
        with isolate_rng():
            L.Trainer(**quiet, callbacks=[similarities]).validate(module, data, verbose=False)
    image = torch.zeros(1, data.in_channels, data.image_size, data.image_size)
    work = Work(count_macs(module, lambda: module(image)))
    quiet["precision"] = setting.precision
    trainer = L.Trainer(max_epochs=epochs or setting.epochs, callbacks=[*callbacks, work], **quiet)
    start = perf_counter()
    trainer.fit(module, data)
    seconds = perf_counter() - start
    scores = trainer.validate(module, data, verbose=False) + trainer.test(module, data, verbose=False)
    weights = [target.weight for target in find_targets(module)]
    numbers = {
        "test": scores[1]["test/accuracy"],
        "val": scores[0]["val/accuracy"],
        "test_loss": scores[1]["test/loss"],
        "kept": sum(int(weight.count_nonzero()) for weight in weights),
        "total": sum(weight.numel() for weight in weights),
        "inference": round(work.read(module), 5),
        "training": round(work.training(dense_gradients=method in DENSE_GRADIENTS), 5),
        "epochs": trainer.current_epoch,
        "seconds": round(seconds, 1),
    }
    if similarity:
        L.Trainer(**quiet, callbacks=[similarities]).validate(module, data, verbose=False)
        numbers["similarity"] = [round(value, 4) for value in similarities.history]
    for callback in callbacks:
        if isinstance(callback, Sparsifier):
            numbers |= {key: value for key in ("stop_reason", "history") if (value := getattr(callback, key, None))}
    return numbers


def load(path: Path) -> dict[str, Any]:
    """What an earlier call has left."""
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def have_data(data: type[ImageData], root: str, download: bool) -> None:
    """Fetch what is missing if that is wanted, and refuse to go on without it."""
    made = data(root=root, download=download)
    try:
        made.prepare_data()
        made.load(train=False)
    except FileNotFoundError as error:
        raise SystemExit(f"{str(error).partition(' (')[0]}; give its folder with --data, or add --download.") from None


def run(name: str, root: str, part: tuple[int, int], epochs: int | None, out: Path, download: bool = False) -> None:
    """Do what is missing in this part, and write after every run."""
    suite = SUITES[name]
    setting = SETTINGS[suite.setting]
    path = out / (f"accuracy_{name}.json" if part[1] == 1 else f"accuracy_{name}.{part[0]}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in asdict(setting).items() if key not in ("data", "network", "memory_format")}
    how = json.loads(json.dumps({"setting": suite.setting, **plain, **({"epochs": epochs} if epochs else {})}))
    refuse_other_results(collect(name, out), how)
    have_data(setting.data, root, download)
    for index, (seed, method, sparsity) in enumerate(runs(suite)):
        done = {(r["seed"], r["method"], r["sparsity"]) for r in collect(name, out)["runs"]}
        if index % part[1] != part[0] - 1 or (seed, method, sparsity) in done:
            continue
        numbers = train(setting, method, sparsity, seed, root, epochs, suite.similarity)
        result = load(path)
        result |= {"command": f"python -m benchmarks.accuracy {name} --data DIR", "machine": machine(), "recipe": how}
        result["runs"].append({"seed": seed, "method": method, "sparsity": sparsity, **numbers})
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{method:28s} {sparsity:6} seed {seed}  test {numbers['test']:.4f}  {numbers['seconds']:7.1f} s", flush=True)


def refuse_other_results(found: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Runs of another recipe, or of another version of the package, are not gone on with."""
    theirs, mine = found.get("machine", {}).get("lightning_sparse"), machine()["lightning_sparse"]
    if found["runs"] and theirs != mine:
        raise SystemExit(f"These results are of lightning_sparse {theirs}, this is {mine}; begin anew with another --out.")
    for key, value in found.get("recipe", recipe).items():
        if value != recipe.get(key, value):
            raise SystemExit(
                f"These results were made with {key}={value!r}, the recipe now says {recipe[key]!r}; begin anew with "
                "another --out."
            )


def collect(name: str, out: Path, shared: bool = True) -> dict[str, Any]:
    """The result with all its parts, and the runs that it shares with other suites."""
    whole: dict[str, Any] = {"runs": []}
    for path in [out / f"accuracy_{name}.json", *sorted(out.glob(f"accuracy_{name}.*.json"))]:
        result = load(path)
        whole = {**whole, **result, "runs": whole["runs"] + result["runs"]}
    for other in SUITES[name].shares if shared else ():
        theirs = collect(other, out, shared=False)
        if theirs.get("recipe") == whole.get("recipe", theirs.get("recipe")):
            mine = [r for r in theirs["runs"] if (r["seed"], r["method"], r["sparsity"]) in runs(SUITES[name])]
            whole = {
                "recipe": theirs.get("recipe"),
                "machine": theirs.get("machine", {}),
                **whole,
                "runs": whole["runs"] + mine,
            }
    return whole


def merge(name: str, out: Path) -> None:
    """Put the parts into one file, in the order of the suite."""
    whole, order = collect(name, out, shared=False), runs(SUITES[name])
    whole["runs"].sort(key=lambda r: order.index((r["seed"], r["method"], r["sparsity"])))
    (out / f"accuracy_{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    for path in out.glob(f"accuracy_{name}.*.json"):
        path.unlink()


def table(name: str, out: Path = RESULTS) -> str:
    """Mean and standard deviation over seeds, and the two costs, as a Markdown table."""
    suite, found = SUITES[name], collect(name, out)["runs"]
    lines = ["| test accuracy, %; inference, training | " + " | ".join(f"{100 * s:g} %" for s in suite.sparsities) + " |"]
    lines.append("| --- |" + " --- |" * len(suite.sparsities))
    for method in suite.methods:
        columns = (0.0,) if method == "dense" else suite.sparsities
        chosen = [[r for r in found if (r["method"], r["sparsity"]) == (method, s)] for s in columns]
        cells = [_cell(rows) for rows in chosen]
        lines.append(f"| {method} | " + " | ".join(cells + [""] * (len(suite.sparsities) - len(cells))) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    values = [100 * row["test"] for row in rows]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"{statistics.mean(values):.2f} ± {spread:.2f} ({len(values)})"
    costs = [statistics.mean(row[key] for row in rows) for key in ("inference", "training") if key in rows[0]]
    return "; ".join([text, ", ".join(f"{cost:.3f}" for cost in costs)] if costs else [text])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, *GROUPS], help="one, or a group of them")
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch the data if they are not in that folder")
    parser.add_argument("--part", default="1/1", help="k/n: the k-th of n processes")
    parser.add_argument("--epochs", type=int, help="instead of the setting's, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--merge", action="store_true", help="put the parts into one file")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", ".*does not have many workers|.*tensorboard")
    part, parts = map(int, options.part.split("/"))
    for suite in GROUPS.get(options.suite, (options.suite,)):
        if options.merge:
            merge(suite, options.out)
        elif not options.table:
            run(suite, options.data, (part, parts), options.epochs, options.out, options.download)
        print(table(suite, options.out))


if __name__ == "__main__":
    main()
