"""What the export ladder gains on this machine.

    python -m benchmarks.export resnet --data DIR    ResNet-20 trained on CIFAR-10 with half of its channels masked
    python -m benchmarks.export resnet               the same on the digits of scikit-learn
    python -m benchmarks.export mlp                  three linear layers, 2048 wide, 95 % of the weights masked at random
    python -m benchmarks.export carriers             what it costs that dead channels emit something, random weights
    python -m benchmarks.export vit                  2:4 linear layers of ViT-B in bfloat16, on a CUDA device
    python -m benchmarks.export resnet --epochs 1    as short as wanted

All rungs are timed in turns beside the dense model.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.record import save
from lightning_sparse import MagnitudePruning
from lightning_sparse.data import CIFAR10, Digits
from lightning_sparse.export import choose_semi_structured, export_ladder, fold_norms, remove_dead
from lightning_sparse.export.compare_models import interleaved
from lightning_sparse.models import MLP, Classifier, ResNet


def accuracy(module: nn.Module, data: Any) -> dict[str, float]:
    with torch.no_grad():
        right = [(module(x).argmax(1) == y).float().mean() * len(y) for x, y in data.test_dataloader()]
    return {"test accuracy": float(sum(right)) / len(data.parts["test"][1])}


def resnet(options: argparse.Namespace) -> dict[str, Any]:
    data: Any = CIFAR10(root=options.data) if options.data else Digits()
    L.seed_everything(options.seed, verbose=False)
    module = Classifier(ResNet, data.num_classes, data.in_channels, data.image_size).to(memory_format=torch.channels_last)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        precision="bf16-mixed",
        callbacks=[MagnitudePruning(0.5, structure="coupled", allocation="uniform")],
    )
    trainer.fit(module, data)
    module = module.to(memory_format=torch.contiguous_format)
    data.setup("test")
    inputs = next(iter(data.test_dataloader()))[0][: options.batch]
    both = {"evaluate": lambda made: accuracy(made, data)}
    return {
        "as trained": ladder(module, inputs, options, **both),
        "normalization folded": ladder(module, inputs, options, fold=True, **both),
        "trained": f"{options.epochs} epochs of {type(data).__name__}, seed {options.seed}; MagnitudePruning(0.5, "
        "structure='coupled', allocation='uniform')",
    }


def mlp(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    net = MLP(10, 1, 28, hidden=(2048, 2048, 2048), kaiming=True)
    for layer in net:
        if isinstance(layer, nn.Linear) and layer.out_features == 2048:
            layer.weight.data[torch.rand_like(layer.weight) < 0.95] = 0
            nn.init.normal_(layer.bias, std=0.1)
    return ladder(net, torch.randn(options.batch, 1, 28, 28), options) | {
        "trained": f"not at all: random weights, 95 % of the wide layers masked at random, seed {options.seed}; times count"
    }


def ladder(module: nn.Module, inputs: Tensor, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = export_ladder(module, inputs, Path(folder) / "out", rounds=options.rounds, **more)
    Console(width=200).print(report.table())
    for choice in report.choices:
        print(choice)
    shares = {
        name: r.parameters / (report.rungs["dense"].parameters or 1) for name, r in report.rungs.items() if r.parameters
    }
    return report.to_json() | {
        "speed": {name: {b: report.speed(name, b) for b in r.latency} for name, r in report.rungs.items() if r.latency},
        "parameters, of dense": shares,
    }


def carriers(options: argparse.Namespace) -> dict[str, Any]:
    """ResNet-20 with half of its channels dead, which emit 0.1 through their normalization, or nothing."""
    torch.manual_seed(options.seed)
    net = ResNet(10, 3, 32).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data[layer.out_channels // 2 :] = 0
    x = torch.randn(options.batch, 3, 32, 32)
    models = {"dense": net}
    for name, emitted in (("with carriers", 0.1), ("without", 0.0)):
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.constant_(layer.bias, emitted)
        models[name] = remove_dead(net, x)[0]
        models[f"{name}, folded"] = remove_dead(fold_norms(net)[0], x)[0]
    with torch.no_grad():
        times = interleaved({name: partial(model, x) for name, model in models.items()}, options.rounds)
    speed = {name: times["dense"].median / timing.median for name, timing in times.items()}
    print(speed)
    return {"batch": options.batch, "milliseconds": {name: asdict(t) for name, t in times.items()}, "speed": speed}


def vit(options: argparse.Namespace) -> dict[str, Any]:
    """Each shape of linear layer in ViT-B with 197 tokens per image."""
    found = {}
    for rows, columns in ((768, 768), (2304, 768), (3072, 768), (768, 3072)):
        layer = nn.Linear(columns, rows).cuda().bfloat16()
        layer.weight.data.view(rows, -1, 4)[:, :, ::2] = 0
        x = torch.randn(options.batch * 197, columns, device="cuda", dtype=torch.bfloat16)
        (choice,) = choose_semi_structured(copy.deepcopy(nn.Sequential(layer)), x, rounds=options.rounds)
        found[f"{columns} -> {rows}"] = choice.milliseconds | {"kept": choice.chosen}
        print(f"{columns} -> {rows}: {choice}")
    return {"batch": options.batch, "milliseconds": found}


SUITES = {"resnet": resnet, "mlp": mlp, "carriers": carriers, "vit": vit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--data", help="folder of CIFAR-10, in torchvision's layout; digits without it")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers|.*tensorboard|.*LeafSpec")
    sys.argv = ["DIR" if argument == options.data else argument for argument in sys.argv]  # no folders in results
    save(f"export_{options.suite}_{'cuda' if options.suite == 'vit' else 'cpu'}", SUITES[options.suite](options))


if __name__ == "__main__":
    main()
