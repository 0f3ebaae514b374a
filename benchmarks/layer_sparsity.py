"""Layer sparsity: deep networks that become shallow, and what they lose or win.

    python -m benchmarks.layer_sparsity simulation               the simulation of the note, E1: five seeds, every fit
    python -m benchmarks.layer_sparsity fashion --data DIR       ten-layer perceptrons on Fashion-MNIST
    python -m benchmarks.layer_sparsity conv --data DIR          a plain convolutional net without batch normalization
    python -m benchmarks.layer_sparsity simulation --quick       small, to see that it runs
    python -m benchmarks.layer_sparsity simulation --table       print the table of what is there

Every fit is one line of the result: plain, weight decay, with layer penalty (before and after merging), and the refits of
the merged network, warm and fresh. Errors are test errors after the last step; strengths are listed, none is chosen by
looking at the test set. Latency is measured in one run, both networks taking turns. A suite goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import RESULTS, machine
from lightning_sparse import LayerSparsity, merge_layers
from lightning_sparse.data import FashionMNIST, Teacher
from lightning_sparse.export import MergeReport, fresh_start, pad_in_front
from lightning_sparse.models import MLP, Classifier, Regressor

DECAY = 1e-3
"""Times the sum of squared weights: of all fits but the plain ones."""


def adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def plain_convolutions(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Eight convolutions, four per resolution, padding in front of each chain; no normalization."""
    layers: list[nn.Module] = []
    channels = in_channels
    for width in (8, 16):
        for _ in range(4):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias) if layer.bias is not None else None
    return pad_in_front(net)


@dataclass(frozen=True)
class Setting:
    """What is fitted, and how long.

    Args:
        data: made from the seed and the folder of the data.
        model: made for the data.
        epochs: of every fit.
        strengths: r, a fit each.
        input_range: of the data, where the first layer may merge too.
        allow_growth: of merges; kernels of convolutions grow.
    """

    data: Callable[[int, str], L.LightningDataModule]
    model: Callable[[Any], L.LightningModule]
    epochs: int
    strengths: Sequence[float]
    input_range: tuple[float, float] | None = None
    allow_growth: bool = False


def teacher(share: float = 1 / 3, depth: int = 8, width: int = 20) -> Setting:
    return Setting(
        lambda seed, root: Teacher(signed=share, depth=depth, width=width, passes=150, seed=seed),
        lambda data: Regressor(
            lambda *shape: MLP(*shape, hidden=[width] * (depth - 1), kaiming=True),
            data.num_classes,
            data.in_channels,
            data.image_size,
            adam(3e-3),
        ),
        10,
        (0.1, 0.3, 1.0),
    )


def classifier(network: Callable[..., nn.Module], rate: float) -> Callable[[Any], L.LightningModule]:
    return lambda data: Classifier(network, data.num_classes, data.in_channels, data.image_size, adam(rate))


SUITES: dict[str, dict[str, Setting]] = {
    "simulation": {
        "1/3 of inner layers signed": teacher(),
        "none signed": teacher(0.0),
        "all signed": teacher(1.0),
        "twelve layers": teacher(depth=12),
        "width 40": teacher(width=40),
    },
    "fashion": {
        "ten layers of 100": Setting(
            lambda seed, root: FashionMNIST(root=root, seed=seed),
            classifier(lambda *shape: MLP(*shape, hidden=[100] * 9, kaiming=True), 1e-3),
            12,
            (0.1, 0.3),
        ),
    },
    "conv": {
        "eight convolutions": Setting(
            lambda seed, root: FashionMNIST(root=root, seed=seed),
            classifier(plain_convolutions, 1e-3),
            3,
            (0.03, 0.1, 0.3, 1.0),
            allow_growth=True,
        ),
    },
}


def fit(
    module: L.LightningModule, data: L.LightningDataModule, epochs: int, method: LayerSparsity | None, quick: bool
) -> float:
    """Seconds of a fit."""
    trainer = L.Trainer(
        max_epochs=1 if quick else epochs,
        limit_train_batches=3 if quick else 1.0,
        limit_val_batches=0,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if method is None else [method],
    )
    start = perf_counter()
    trainer.fit(module, data)
    return perf_counter() - start


def test_error(module: L.LightningModule, data: L.LightningDataModule) -> float:
    """Mean squared error, or the share of wrong labels."""
    total, count = 0.0, 0
    module.eval()
    with torch.no_grad():
        for x, y in data.test_dataloader():
            out: Tensor = module(x.to(module.device)).cpu()
            wrong = (out.argmax(1) != y).sum() if y.dtype == torch.long else F.mse_loss(out, y, reduction="sum")
            total, count = total + float(wrong), count + y.numel()
    return total / count


def numbers(report: MergeReport) -> dict[str, Any]:
    """What a report says, as plain values."""
    ratios = {v.layer: v.ratio for v in report.layers if v.ratio is not None}
    levels = {level: sum(v.level == level and v.merged for v in report.layers) for level in ("certified", "near")}
    return {
        "depth": report.depth,
        "parameters": report.parameters,
        "macs": report.macs,
        "milliseconds": report.milliseconds,
        "change": report.change,
        "merged": levels,
        "collapsed": report.collapsed,
        "ratios": ratios,
    }


def runs(setting: Setting, seed: int, root: str, quick: bool) -> Iterator[dict[str, Any]]:
    """All fits of one seed."""
    data = setting.data(seed, root)
    data.prepare_data()
    data.setup("fit")
    rows: list[tuple[str, float | None]] = [("plain", None), ("weight decay", 0.0)]
    rows += [("layer penalty", strength) for strength in setting.strengths]
    for name, strength in rows[: 3 if quick else None]:
        L.seed_everything(seed, verbose=False)
        module = setting.model(data)
        decay = LayerSparsity(0.0, scale_decay=DECAY)
        method = None if strength is None else LayerSparsity(strength, scale_decay=DECAY, input_range=setting.input_range)
        seconds = fit(module, data, setting.epochs, method, quick)
        row: dict[str, Any] = {"fit": name, "strength": strength, "seed": seed, "seconds": round(seconds, 1)}
        if name != "layer penalty":
            yield row | {"error": test_error(module, data), "depth": None}
            continue
        x = next(iter(data.test_dataloader()))[0][:128]
        merged, report = merge_layers(module.cpu(), x, input_range=setting.input_range, allow_growth=setting.allow_growth)
        assert isinstance(merged, L.LightningModule)
        before, after = test_error(module, data), test_error(merged, data)
        yield row | {"error": before, "merged error": after, **numbers(report)}
        for start in ("warm", "fresh"):
            L.seed_everything(seed + 1000, verbose=False)
            refit = copy.deepcopy(merged) if start == "warm" else fresh_start(copy.deepcopy(merged))
            assert isinstance(refit, L.LightningModule)
            seconds = fit(refit.train(), data, setting.epochs, copy.deepcopy(decay), quick)
            error = test_error(refit, data)
            yield {**row, "fit": f"refit, {start}", "seconds": round(seconds, 1), "error": error, "depth": report.depth}


def run(name: str, seeds: int, root: str, quick: bool, out: Path) -> None:
    """Do what is missing, and write after every seed of a setting."""
    path = out / f"layers_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    command = f"python -m benchmarks.layer_sparsity {name} --data DIR"
    result |= {"command": command, "machine": machine(), "weight decay": DECAY}
    for setting, how in SUITES[name].items():
        for seed in range(1 if quick else seeds):
            if any((r["setting"], r["seed"]) == (setting, seed) for r in result["runs"]):
                continue
            for row in runs(how, seed, root, quick):
                result["runs"].append({"setting": setting, **row})
                print(f"{setting:28s} seed {seed}  {row['fit']:14s} {row['strength']}  error {row['error']:.4f}", flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")


def table(name: str, out: Path) -> str:
    """Mean and standard deviation over seeds, as a Markdown table."""
    path = out / f"layers_{name}.json"
    found = json.loads(path.read_text())["runs"] if path.exists() else []
    lines = ["| setting | fit | r | test error | depth | seeds |", "| --- | --- | --- | --- | --- | --- |"]
    for key in dict.fromkeys((r["setting"], r["fit"], r["strength"]) for r in found):
        rows = [r for r in found if (r["setting"], r["fit"], r["strength"]) == key]
        errors = [r["error"] for r in rows]
        depths = " ".join(str(r["depth"][1]) for r in rows if r["depth"])
        spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
        strength = "" if key[2] is None else key[2]
        lines.append(
            f"| {key[0]} | {key[1]} | {strength} | {statistics.mean(errors):.4f} ± {spread:.4f} | {depths} | {len(rows)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", default="data", help="folder of the data, in torchvision's layout")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        warnings.filterwarnings("ignore", ".*does not have many workers|.*tensorboard")
        run(options.suite, options.seeds, options.data, options.quick, options.out)
    print(table(options.suite, options.out))


if __name__ == "__main__":
    main()
