"""Accuracy against sparsity: the same recipe, data order and number of epochs for every method.

    python -m benchmarks.accuracy --suite desk --data DIR        all that two CPU cores can do; run what is not there yet
    python -m benchmarks.accuracy --suite paper --data DIR --at-once 6    the papers' own recipes, six at once on one GPU
    python -m benchmarks.accuracy --suite cka --data DIR         one suite of those
    python -m benchmarks.accuracy --suite cka --data DIR --part 1/2    one of two processes that share the work
    python -m benchmarks.accuracy --suite cka --table            print the table of what is there

Every run is one entry of the result: method, sparsity, seed, version of torch, test accuracy after the last epoch (none is
chosen by looking at the test set), kept weights counted as non-zeros. A suite that was interrupted goes on where it stopped,
a training from its last checkpoint.

Two numbers say what a run would cost if nothing were ever multiplied by zero, as ratios to the dense network: `inference`,
of the final weights, and `training`, the mean over the run of a forward pass and both parts of the backward pass. The
gradients of weights are counted sparse, or dense for methods that need them dense at every step; what a method reads now
and then (at its updates, or before the first step) is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

import lightning_sparse
from benchmarks import lpss
from benchmarks.checkpoints import resumable
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
from lightning_sparse.core import count_macs, effective_macs, find_targets
from lightning_sparse.data import CIFAR10, CIFAR100, Digits, FashionMNIST, ImageData
from lightning_sparse.loop import Sparsifier
from lightning_sparse.models import VGG, Classifier, LeNet5, LeNet300, ResNet
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
    val_fraction: float = 0.1


def resnet32x2(*shape: int) -> nn.Module:
    """The ResNet-32 of the pruning literature, of double width."""
    return ResNet(*shape, depth=32, width=2)


ART = {"epochs": 220, "batch_size": 64, "weight_decay": 1e-4, "milestones": (140, 180), "val_fraction": 1e-5}
"""The published recipe of HyperSparse: 60 epochs, regularization until the pruned copy is as good, 160 epochs of fine-tuning
(other methods: 60 + 160). All training images are used (the loader wants one for validation)."""

SETTINGS: dict[str, Setting | lpss.Recipe] = {
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
    "resnet32x2-cifar10-art": Setting(CIFAR10, resnet32x2, **ART),
    "resnet32x2-cifar100-art": Setting(CIFAR100, resnet32x2, **ART),
    "vgg19-cifar10-art": Setting(CIFAR10, VGG, **ART),
    "vgg19-cifar100-art": Setting(CIFAR100, VGG, **ART),
    # The recipe of GraSP, as others report it.
    "resnet32x2-cifar10-160": Setting(CIFAR10, resnet32x2, 160, weight_decay=1e-4, milestones=(80, 120)),
    # The recipe of GraNet's script; its code chooses the epoch by the test set.
    "vgg19-cifar10-160": Setting(CIFAR10, VGG, 160, milestones=(80, 120)),
    # The recipe of training on Lp spheres, with its own rates, augmentation and counting.
    "wrn18-fashion-50": lpss.RECIPES["full"],
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

OPEN_ENDED: dict[str, Callable[[float, Callable[[int], str]], list[L.Callback]]] = {
    "HyperSparse, as published": lambda s, epochs: [
        HyperSparse(s, strength=5e-6, growth=1.05, pretrain=epochs(60), regularize=epochs(200), finetune=epochs(160))
    ],
}
"""Methods that end the training themselves; the lengths of their phases go through a function that may shorten them."""

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
    published: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by method, in percent, for the first sparsities


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
PHASED = "HyperSparse, as published"

SUITES = {
    "hypersparse": Suite(
        "lenet300-fashion",
        ("dense", "one-shot + fine-tuning", "gradual", "L1-ART", "HyperSparse"),
        (0.9, 0.98, 0.995),
    ),
    "desk-lenet300": Suite("lenet300-fashion-15", WITH_TARGET, (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)),
    "desk-lenet5": Suite("lenet5-fashion-5", WITH_TARGET, (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)),
    "desk-resnet20": Suite(
        "resnet20-half-cifar10",
        ("dense", "random", "gradual", "RigL", "HyperSparse", "SET", "GraNet", "SCL"),
        (0.9, 0.98),
        shares=("cka",),
    ),
    "cka": Suite("resnet20-half-cifar10", ("random", "random + CKA-SR"), (0.9, 0.95, 0.98), similarity=True),
    # The rows of the HyperSparse repository's README: the best of all test epochs of phase 3, here the last one is taken.
    **{
        f"paper-hypersparse-{setting}": Suite(
            f"{setting}-art",
            ("dense", "gradual", PHASED),
            (0.9, 0.98, 0.995),
            published={"dense": rows[:1], PHASED: rows[1:]},
        )
        for setting, rows in {
            "resnet32x2-cifar10": (94.70, 94.22, 92.69, 89.35),
            "vgg19-cifar10": (93.84, 93.93, 93.75, 92.91),
            "resnet32x2-cifar100": (74.60, 74.08, 70.08, 59.58),
            "vgg19-cifar100": (72.88, 73.23, 71.83, 69.02),
        }.items()
    },
    # The README of the repository of LpSS.
    "paper-lpss-fashion": Suite(
        "wrn18-fashion-50", ("dense", "static", "LpSphere"), (0.5, 0.8, 0.9), published={"LpSphere": (94.43, 93.91, 93.29)}
    ),
    # The appendix of CKA-SR, tables 2 (the entries of these strengths) and 5, which does not say how many samples it takes.
    "paper-cka-cifar10": Suite(
        "resnet20-cifar10-160",
        ("random", *CKA),
        (0.95,),
        seeds=(0, 1, 2, 3, 4),
        similarity=True,
        published={"random": (84.16,), "random + CKA-SR": (84.97,), "random + CKA-SR, all samples": (85.03,)},
    ),
    "paper-cka-cifar100": Suite(
        "resnet20-cifar100-160",
        ("random", *CKA),
        (0.7, 0.85, 0.9, 0.95, 0.98, 0.998),
        similarity=True,
        published={
            "random": (65.42, 60.37, 56.96, 47.27, 33.74, 2.95),
            "random + CKA-SR, all samples": (65.60, 60.86, 57.25, 48.26, 34.44, 3.32),
            "random + AugCKA-SR": (65.85, 60.89, 57.02, 48.39, 34.60, 3.04),
        },
    ),
    # Networks, lengths and sparsities of the papers; their numbers were not at hand.
    "paper-initial-cifar10": Suite(
        "resnet32x2-cifar10-160", ("dense", "random", "SNIP", "GraSP", "SynFlow"), (0.9, 0.95, 0.98)
    ),
    "paper-dynamic-cifar10": Suite(
        "vgg19-cifar10-160", ("dense", "random", "gradual", "SET", "RigL", "GraNet"), (0.9, 0.95, 0.98)
    ),
}

GROUPS = {
    "desk": ("desk-lenet300", "desk-lenet5", "desk-resnet20"),
    "paper": tuple(name for name in SUITES if name.startswith("paper-")),
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

    def state_dict(self) -> dict[str, Any]:
        return {"readings": self.readings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.readings = list(state_dict["readings"])

    def training(self, dense_gradients: bool) -> float:
        """The mean of all readings, for a forward pass, the gradients of activations and those of weights."""
        mean = statistics.mean(self.readings)
        return (2 * mean + (1.0 if dense_gradients else mean)) / 3


def train(
    setting: Setting | lpss.Recipe,
    method: str,
    sparsity: float,
    seed: int,
    root: str,
    epochs: int | None = None,
    similarity: bool = False,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """One run; its numbers, with the mean similarity of layers on validation data before and after if asked for.

    With `checkpoint`, some twenty times on the way its state goes there, and it goes on from what is there.
    """
    if isinstance(setting, lpss.Recipe):
        recipe, device = replace(setting, epochs=epochs or setting.epochs), "cuda" if torch.cuda.is_available() else "cpu"
        return lpss.train(recipe, method, sparsity, seed, root, device, checkpoint)
    L.seed_everything(seed, verbose=False)
    data = setting.data(root=root, batch_size=setting.batch_size, val_fraction=setting.val_fraction, seed=seed)
    length = epochs or setting.epochs
    if method in OPEN_ENDED:
        callbacks = OPEN_ENDED[method](sparsity, lambda phase: f"{math.ceil(phase * length / setting.epochs)} epochs")
        length = -1
    else:
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
    quiet: dict[str, Any] = {"accelerator": "auto", "devices": 1, "logger": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    once = {**quiet, "enable_checkpointing": False}
    similarities = SimilarityMap(figure=False)
    if similarity:
        with isolate_rng():
            L.Trainer(**once, callbacks=[similarities]).validate(module, data, verbose=False)
    image = torch.zeros(1, data.in_channels, data.image_size, data.image_size)
    work = Work(count_macs(module, lambda: module(image)))
    saving, keeping, begun = resumable(checkpoint, epochs or setting.epochs)
    options = {**quiet, **keeping, "precision": setting.precision}
    trainer = L.Trainer(max_epochs=length, callbacks=[*callbacks, *saving, work], **options)
    start = perf_counter()
    trainer.fit(module, data, ckpt_path=begun)
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
        L.Trainer(**once, precision=setting.precision, callbacks=[similarities]).validate(module, data, verbose=False)
        numbers["similarity"] = [round(value, 4) for value in similarities.history]
    for callback in callbacks:
        if isinstance(callback, Sparsifier):
            numbers |= {key: value for key in ("stop_reason", "history") if (value := getattr(callback, key, None))}
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return numbers


def load(path: Path) -> dict[str, Any]:
    """What an earlier call has left."""
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def have_data(setting: Setting | lpss.Recipe, root: str, download: bool) -> None:
    """Fetch what is missing if that is wanted, and refuse to go on without it."""
    made = (FashionMNIST if isinstance(setting, lpss.Recipe) else setting.data)(root=root, download=download)
    try:
        made.prepare_data()
        made.load(train=False)
    except FileNotFoundError as error:
        raise SystemExit(f"{str(error).partition(' (')[0]}; give its folder with --data, or add --download.") from None


def prepare(name: str, root: str, epochs: int | None, out: Path, download: bool) -> dict[str, Any]:
    """The recipe of a suite, once it is sure that what is there is of the same and that the data are there."""
    setting = SETTINGS[SUITES[name].setting]
    plain = {key: value for key, value in asdict(setting).items() if key not in ("data", "network", "memory_format")}
    how: dict[str, Any] = {"setting": SUITES[name].setting, **plain, **({"epochs": epochs} if epochs else {})}
    how = json.loads(json.dumps(how))
    refuse_other_results(collect(name, out), how)
    have_data(setting, root, download)
    return how


def run(name: str, root: str, part: tuple[int, int], epochs: int | None, out: Path, download: bool = False) -> None:
    """Do what is missing in this part, and write after every run."""
    suite = SUITES[name]
    how = prepare(name, root, epochs, out, download)
    path = out / (f"accuracy_{name}.json" if part[1] == 1 else f"accuracy_{name}.{part[0]}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for index, (seed, method, sparsity) in enumerate(runs(suite)):
        done = {(r["seed"], r["method"], r["sparsity"]) for r in collect(name, out)["runs"]}
        if index % part[1] != part[0] - 1 or (seed, method, sparsity) in done:
            continue
        half = path.parent / f"accuracy_{name}.{how['epochs']}-epochs.{lightning_sparse.__version__}.{index}.ckpt"
        numbers = train(SETTINGS[suite.setting], method, sparsity, seed, root, epochs, suite.similarity, half)
        result = load(path)
        result |= {"command": f"python -m benchmarks.accuracy --suite {name} --data DIR", "machine": machine()}
        result |= {"recipe": how}
        result["runs"].append({"seed": seed, "method": method, "sparsity": sparsity, **numbers, "torch": torch.__version__})
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{method:28s} {sparsity:6} seed {seed}  test {numbers['test']:.4f}  {numbers['seconds']:7.1f} s", flush=True)


def run_at_once(names: Sequence[str], count: int, options: argparse.Namespace) -> None:
    """The same by several processes, each with its part of every suite; if one fails, the others end first."""
    for name in names:
        prepare(name, options.data, options.epochs, options.out, options.download)
    command = [sys.executable, "-m", "benchmarks.accuracy", "--suite", options.suite, "--data", options.data]
    command += ["--out", str(options.out), *(["--epochs", str(options.epochs)] if options.epochs else [])]
    workers = [subprocess.Popen([*command, "--part", f"{k + 1}/{count}"]) for k in range(count)]
    try:
        failed = [worker.args for worker in workers if worker.wait()]
    finally:
        for worker in workers:
            worker.kill()
    if failed:
        raise SystemExit(f"{len(failed)} of {count} processes failed, see above; what was finished is kept.")
    for name in names:
        merge(name, options.out)


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
        recipe = whole.get("recipe", {})
        if theirs["runs"] and all(recipe.get(key, value) == value for key, value in theirs["recipe"].items()):
            mine = [r for r in theirs["runs"] if (r["seed"], r["method"], r["sparsity"]) in runs(SUITES[name])]
            whole = {**theirs, **whole, "runs": whole["runs"] + mine}
    return whole


def merge(name: str, out: Path) -> None:
    """Put the parts into one file, in the order of the suite."""
    whole, order = collect(name, out, shared=False), runs(SUITES[name])
    found = {(r["seed"], r["method"], r["sparsity"]): r for r in whole["runs"]}  # once each, should a part be there twice
    whole["runs"] = [found[key] for key in order if key in found]
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
        rows = {method: cells}
        if method in suite.published:
            rows[f"{method}, published"] = [f"{value:.2f}" for value in suite.published[method]]
        for title, row in rows.items():
            lines.append(f"| {title} | " + " | ".join(row + [""] * (len(suite.sparsities) - len(row))) + " |")
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
    parser.add_argument("--suite", choices=[*SUITES, *GROUPS], required=True, help="one, or a group of them")
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--download", action="store_true", help="fetch the data if they are not in that folder")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="processes that share the work")
    parser.add_argument("--part", default="1/1", help="k/n: be the k-th of n processes that share the work")
    parser.add_argument("--epochs", type=int, help="instead of the setting's, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--merge", action="store_true", help="put the parts into one file")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", ".*does not have many workers|.*tensorboard|.*exists and is not empty")
    part, parts = map(int, options.part.split("/"))
    names = GROUPS.get(options.suite, (options.suite,))
    if options.at_once > 1 and not (options.merge or options.table):
        run_at_once(names, options.at_once, options)
    for name in names:
        if options.merge:
            merge(name, options.out)
        elif options.at_once == 1 and not options.table:
            run(name, options.data, (part, parts), options.epochs, options.out, options.download)
        print(f"\n{name}\n{table(name, options.out)}")


if __name__ == "__main__":
    main()
