"""Training on unit Lp spheres: what a step costs, and what accuracy it reaches.

    python -m benchmarks.lp_sphere                          time of a step of ResNet-20 at batch 128, beside SGD
    python -m benchmarks.lp_sphere --quick                  small, to see that it runs
    python -m benchmarks.lp_sphere --evidence half --data DIR    the comparison on Fashion-MNIST, reduced for one CPU core
    python -m benchmarks.lp_sphere --evidence full --data DIR    the published recipe, for a GPU
    python -m benchmarks.lp_sphere --evidence half --table       print what is there

Steps with and without the method take turns on one model in one run; ratios are of neighbors in time, and the median over
rounds is the number. Evidence is one JSON line per training, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.checkpoints import resumable
from benchmarks.record import RESULTS, machine, ratios, save, show, timed
from lightning_sparse import LpSphere, RandomSparsity
from lightning_sparse.data import Digits, FashionMNIST
from lightning_sparse.data.loader import Augmentation
from lightning_sparse.functional import hoyer_sparsity, piecewise_linear
from lightning_sparse.metrics import HoyerSparsity
from lightning_sparse.models import MLP, Classifier, ResNet, WideResNet
from lightning_sparse.optim import LpSGD, sphere_groups

# ---- what a step costs ----------------------------------------------------------------------------------------------


class Net(L.LightningModule):
    """A network on random images, SGD with momentum."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True)


class Start(L.Callback):
    """First of the callbacks: switches the method off for every other batch, and starts the clock."""

    def __init__(self, method: LpSphere) -> None:
        self.method, self.on, self.started = method, True, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # by turns, and every other round in the other order
            self.on = batch_idx % 4 in (0, 3)
            stations = self.method.stations
            for handle in stations._handles:
                handle.remove()
            stations._handles.clear()
            self.method._leads = lambda trainer: self.on  # type: ignore[method-assign]
            if self.on:
                stations._handles.append(trainer.optimizers[0].register_step_post_hook(stations._after_step))
        self.started = perf_counter()


class Stop(L.Callback):
    """Last of the callbacks: notes the time."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.times: dict[bool, list[float]] = {True: [], False: []}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 8:
            self.times[self.start.on].append(perf_counter() - self.start.started)


def network(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    return MLP(10, 3, 32, (64, 64), batch_norm=True) if quick else ResNet(depth=20)


def callback_step(quick: bool, rounds: int, every: str | None) -> dict[str, Any]:
    """A step with and without the callback; with `every`, connections fall and return so often."""
    topology = {"sparsity": 0.8, "start": 0, "every": every} if every else {}
    method = LpSphere(1.15, **topology)  # type: ignore[arg-type]
    start = Start(method)
    stop = Stop(start)
    data = [(torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,)))] * (2 * rounds + 9)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    runner = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[start, method, stop], **quiet)
    runner.fit(Net(network(quick)), torch.utils.data.DataLoader(data, batch_size=None))
    pairs = zip(stop.times[False], stop.times[True], strict=True)
    return ratios([{"SGD": without, "SGD + LpSphere": with_it} for without, with_it in pairs], "SGD")


def optimizer_step(quick: bool, rounds: int) -> dict[str, Any]:
    """Forward, backward and step with SGD and with LpSGD, on one model, without Lightning."""
    net = network(quick)
    images, labels = torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,))
    ways: dict[str, torch.optim.Optimizer] = {
        "SGD": torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True),
        "LpSGD": LpSGD(sphere_groups(net, 1.15, lr=0.01), lr=0.01),
    }

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    seen = []
    for number in range(rounds + 3):
        order = list(ways) if number % 2 else list(ways)[::-1]
        times = {name: timed(lambda name=name: step(ways[name])) for name in order}  # type: ignore[misc]
        if number >= 3:
            seen.append({name: times[name] for name in ways})
    return ratios(seen, "SGD")


# ---- what it reaches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A comparison on Fashion-MNIST with WRN-18-1.

    Args:
        epochs: of each training.
        batch_size: of each step.
        pooling: side of the squares of pixels that are averaged first.
        mixing: peak of eta.
        free_lr: peak of the rate of all that is not on a sphere.
        sgd_lr: peak of the rate of plain SGD.
        digits: take the digits of scikit-learn instead, to see that it runs.
    """

    epochs: int = 50
    batch_size: int = 256
    pooling: int = 1
    mixing: float = 2 / 256
    free_lr: float = 2.0
    sgd_lr: float = 0.4
    digits: bool = False


RECIPES = {
    # As published: 50 epochs, batch 256; the loss is the mean here, not the sum, hence two rates (2 and 2/256).
    "full": Recipe(),
    "quick": Recipe(epochs=1, digits=True),
    # For one CPU core: 4 epochs at half the resolution. Batches of half the size make up for few of the missing steps; the
    # rates of what is free go down with them, eta goes up, as published: 2 / batch size.
    "half": Recipe(epochs=4, batch_size=128, pooling=2, mixing=2 / 128, free_lr=1.0, sgd_lr=0.2),
}
PUBLISHED = {0.5: 0.9443, 0.8: 0.9391, 0.9: 0.9329}
"""Test accuracy in the README of the official repository."""
EXPONENTS = {0.5: (1.4, 1.3), 0.8: (1.3, 1.15), 0.9: (1.2, 1.07)}
"""p of the first four constrained layers, and of the others."""
RUNS = [(seed, method, s) for seed in (0, 1, 2) for s in (0.0, 0.5, 0.8, 0.9) for method in ("dense", "static", "LpSphere")]
RUNS = [(seed, method, s) for seed, method, s in RUNS if (s == 0) == (method == "dense")]


class Clothes(FashionMNIST):  # type: ignore[misc]
    """Fashion-MNIST as the published recipe has it, if need be at a lower resolution, all training images in use."""

    mean, std = (0.13,), (0.31,)
    pooling = 1

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = FashionMNIST(self.root).load(train)
        pooled = F.avg_pool2d(images.float(), self.pooling) if self.pooling > 1 else images
        return pooled.round().to(torch.uint8), labels


class Recipient(Classifier):
    """A classifier whose rates move along the published knots, step by step."""

    knots: tuple[tuple[float, float], ...] = ()

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())

        def factor(step: int) -> float:
            # As in the base class: asked at step 0, the length would load the data before the checkpoint.
            return piecewise_linear(step / self.trainer.estimated_stepping_batches if step else 0.0, self.knots)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


LP_KNOTS = ((0, 0.02), (1 / 6, 1), (1 / 3, 0.25), (0.94, 0.002), (1, 0.0001))
SGD_KNOTS = ((0, 0.025), (1 / 6, 1), (1 / 3, 0.5), (0.94, 0.005), (1, 0.00025))


def train(
    recipe: Recipe, method: str, sparsity: float, seed: int, root: str, device: str = "cpu", checkpoint: Path | None = None
) -> dict[str, Any]:
    """One training; its numbers. With `checkpoint`, it goes on from there if it was begun."""
    L.seed_everything(seed, verbose=False)
    pad, cutout = 4 // recipe.pooling, 6 // recipe.pooling
    augmentation = Augmentation(pad=pad, flip=True, cutout=cutout)
    options: dict[str, Any] = {"batch_size": recipe.batch_size, "val_fraction": 1e-5, "seed": seed}
    data = Digits(**options) if recipe.digits else Clothes(root, augmentation=augmentation, **options)
    data.pooling = recipe.pooling  # type: ignore[union-attr]
    constrained = method == "LpSphere"
    lr, decay = (recipe.free_lr, 0.0) if constrained else (recipe.sgd_lr, 4e-4 if method == "dense" else 0.0)
    module = Recipient(
        WideResNet,
        10,
        1,
        28 // recipe.pooling,
        lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=method != "dense", weight_decay=decay),
    )
    module.knots = LP_KNOTS if constrained else SGD_KNOTS
    callbacks: list[Any] = []
    if method == "static":
        callbacks = [RandomSparsity(sparsity, allocation="uniform")]
    if constrained:
        first, others = EXPONENTS[sparsity]
        p = [first] * 4 + [others] * 13
        callbacks = [LpSphere(p, sparsity=sparsity, mixing=recipe.mixing, of_all_parameters=True)]
    saving, keeping, begun = resumable(checkpoint, recipe.epochs)
    trainer = L.Trainer(
        max_epochs=recipe.epochs,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, *saving],
        **keeping,
    )
    start = perf_counter()
    trainer.fit(module, data, ckpt_path=begun)
    seconds = perf_counter() - start
    scores = trainer.test(module, data, verbose=False)[0]
    weights = [p for p in module.parameters() if p.ndim > 1]
    everything = sum(p.numel() for p in module.parameters())
    hoyer = HoyerSparsity().to(module.device)
    hoyer.update(module)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return {
        "test": scores["test/accuracy"],
        "masked of all parameters": sum(c.masks.total - c.masks.kept for c in callbacks) / everything,
        "zeros of all weights": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "hoyer": float(hoyer.compute()),
        "hoyer per layer": [round(float(hoyer_sparsity(w).mean()), 4) for w in weights],
        "seconds": round(seconds, 1),
    }


def evidence(name: str, root: str, out: Path, device: str) -> None:
    """Do what is missing, and write after every training."""
    path = out / f"lpss_{name}.json"
    for seed, method, sparsity in RUNS:
        result = load(path)
        if any((r["seed"], r["method"], r["sparsity"]) == (seed, method, sparsity) for r in result["runs"]):
            continue
        numbers = train(RECIPES[name], method, sparsity, seed, root, device)
        result["runs"].append({"seed": seed, "method": method, "sparsity": sparsity, **numbers})
        result |= {
            "command": f"python -m benchmarks.lp_sphere --evidence {name} --data DIR",
            "machine": machine(),
            "recipe": asdict(RECIPES[name]),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{method:10s} {sparsity:4} seed {seed}  {numbers}", flush=True)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"runs": []}  # type: ignore[no-any-return]


def table(name: str, out: Path) -> str:
    """Mean and standard deviation over seeds, as a Markdown table."""
    found = load(out / f"lpss_{name}.json")["runs"]
    lines = ["| test accuracy, % | dense | 50 % | 80 % | 90 % |", "| --- | --- | --- | --- | --- |"]
    for method in ("dense", "static", "LpSphere"):
        cells = []
        for sparsity in (0.0, 0.5, 0.8, 0.9):
            these = [r for r in found if (r["method"], r["sparsity"]) == (method, sparsity)]
            values = [100 * r["test"] for r in these]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f} ({len(values)})" if values else "")
            if method == "LpSphere" and these:
                cells[-1] += f", {100 * statistics.mean(r['masked of all parameters'] for r in these):.1f} % removed"
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    if RECIPES[name] == Recipe():
        lines.append(
            "| LpSphere, official README | | " + " | ".join(f"{100 * value:.2f}" for value in PUBLISHED.values()) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the times to benchmarks/results")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--evidence", choices=RECIPES)
    parser.add_argument("--data", default="data", help="folder that holds FashionMNIST in torchvision's layout")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if options.evidence:
        if not options.table:
            evidence(options.evidence, options.data, options.out, options.device)
        print(table(options.evidence, options.out))
        return
    rounds = 8 if options.quick else options.rounds
    numbers: dict[str, Any] = {
        "callback, no topology": callback_step(options.quick, rounds, None),
        "callback, topology every 40 steps": callback_step(options.quick, rounds, "40 steps"),
        "callback, topology every step": callback_step(options.quick, rounds, "1 step"),
        "optimizer": optimizer_step(options.quick, rounds),
    }
    for title, rows in numbers.items():
        show(f"{title}: step of {'a perceptron' if options.quick else 'ResNet-20'}, batch 128, ratio to SGD", rows)
    if options.save:
        save("lpss_cpu", numbers)


if __name__ == "__main__":
    main()
