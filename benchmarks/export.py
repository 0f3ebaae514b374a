"""Speed and size of the rungs of the export ladder on this machine. All rungs are timed interleaved with the dense model.

python -m benchmarks export-resnet --data DIR    ResNet-20 trained on CIFAR-10 with half of its channels masked
python -m benchmarks export-resnet --quick       the same on the digits of scikit-learn, for one epoch
python -m benchmarks export-mlp                  three linear layers, 2048 wide, 95% of the weights masked at random
python -m benchmarks export-heads                timm's ViT-tiny without half of its heads, random weights
python -m benchmarks export-carriers             the cost of dead channels that emit a constant, random weights
python -m benchmarks export-structures           the gain of each structure on each target, for the table of the guide
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.accuracy import have_data
from benchmarks.record import Options, Parts
from benchmarks.trainers import quiet, trained
from lightning_sparse import MagnitudePruning
from lightning_sparse.data import CIFAR10, Digits
from lightning_sparse.export import Quantization, export_ladder, fold_norms, remove_dead
from lightning_sparse.export.compare_models import interleaved
from lightning_sparse.models import MLP, Classifier, ResNet, VisionTransformer

BATCH = 64


def accuracy(module: nn.Module, data: Any) -> dict[str, float]:
    with torch.no_grad():
        right = [(module(x).argmax(1) == y).float().mean() * len(y) for x, y in data.test_dataloader()]
    return {"test accuracy": float(sum(right)) / len(data.parts["test"][1])}


def resnet(options: Options) -> Parts:
    """Export the network as trained, and with folded normalizations (int8 always folds them)."""

    @cache
    def made() -> tuple[nn.Module, Tensor, dict[str, Any]]:
        have_data(CIFAR10, options)
        data: Any = Digits() if options.quick else CIFAR10(root=options.data)
        L.seed_everything(0, verbose=False)
        module = Classifier(ResNet, data.num_classes, data.in_channels, data.image_size).to(
            memory_format=torch.channels_last
        )
        pruning = MagnitudePruning(0.5, structure="coupled", allocation="uniform")
        network = trained(module, data, [pruning], "export-resnet", options, epochs=4)
        data.setup("fit")
        batches = [x for (x, _), _ in zip(data.train_dataloader(), range(16), strict=False)]
        data.setup("test")
        inputs = next(iter(data.test_dataloader()))[0][:BATCH]
        both = {"evaluate": lambda made: accuracy(made, data), "quantization": Quantization(batches, tolerance=0.005)}
        return network.to(memory_format=torch.contiguous_format), inputs, both

    def climb(fold: bool) -> dict[str, Any]:
        network, inputs, both = made()
        return ladder(network, inputs, options, fold=fold, **both)

    yield ("as trained",), partial(climb, fold=False)
    yield ("normalization folded",), partial(climb, fold=True)


def mlp(options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    net = MLP(10, 1, 28, hidden=(2048, 2048, 2048), kaiming=True)
    for layer in net:
        if isinstance(layer, nn.Linear) and layer.out_features == 2048:
            layer.weight.data[torch.rand_like(layer.weight) < 0.95] = 0
            nn.init.normal_(layer.bias, std=0.1)
    inputs = torch.randn(BATCH, 1, 28, 28)
    return ladder(net, inputs, options, quantization=Quantization([inputs])) | {
        "trained": "not at all: random weights, 95 % of the wide layers masked at random, seed 0; times count"
    }


def ladder(module: nn.Module, inputs: Tensor, options: Options, **more: Any) -> dict[str, Any]:
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        more["compiled"] = not options.quick
        report = export_ladder(module, inputs, Path(folder) / "out", **{"rounds": options.times(50), **more})
    seconds = perf_counter() - start
    Console(width=200).print(report.table())
    for choice in report.choices:
        print(choice)
    dense = report.rungs["dense"].parameters or 1
    return report.to_json() | {
        "seconds": seconds,
        "outcome": {name: report.outcome(name) for name, rung in report.rungs.items() if rung.file},
        "gain": {name: {b: report.gain(name, b) for b in r.latency} for name, r in report.rungs.items() if r.latency},
        "bytes, of dense": {name: share for name in report.rungs if (share := report.share(name)) is not None},
        "speed": {name: {b: report.speed(name, b) for b in r.latency} for name, r in report.rungs.items() if r.latency},
        "parameters, of dense": {name: r.parameters / dense for name, r in report.rungs.items() if r.parameters},
    }


def structured(structure: str) -> nn.Module:
    """A perceptron with two hidden layers of 1024 and random weights, pruned to one structure."""
    torch.manual_seed(0)
    net = MLP(10, 1, 28, hidden=(1024, 1024), kaiming=True).eval()
    hidden: list[nn.Linear] = [layer for layer in net if isinstance(layer, nn.Linear) and layer.out_features == 1024]
    for layer in hidden:
        weight = layer.weight.data
        if structure == "unstructured, 95 %":
            weight[torch.rand_like(weight) < 0.95] = 0
        elif structure == "2:4":
            groups = weight.view(len(weight), -1, 4)
            groups.scatter_(-1, groups.abs().topk(2, largest=False).indices, 0)
        elif structure == "blocks of 16 x 16, 90 %":
            kept = (torch.rand(64, weight.shape[1] // 16) < 0.1).repeat_interleave(16, 0).repeat_interleave(16, 1)
            weight.mul_(kept)
        elif structure == "channels, half":
            weight[:512] = 0
            layer.bias.data[:512] = 0
    return net


STRUCTURES = ("dense", "unstructured, 95 %", "2:4", "blocks of 16 x 16, 90 %", "channels, half")
TARGETS = ("compact", "removed", "kernels", "onnx", "int8", "edge", "ethos_u85")


def structures(options: Options) -> Parts:
    """The gain of each structure on each target. `python -m benchmarks.tables` makes the table of the guide from it."""
    inputs = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for structure in STRUCTURES:
        judged = Quantization([inputs], error=1)  # random weights have no meaningful accuracy
        yield (structure,), partial(climbed, structure, inputs, options, quantization=judged)


def climbed(structure: str, inputs: Tensor, options: Options, **more: Any) -> dict[str, Any]:
    return ladder(structured(structure), inputs, options, **more)


def structure_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row per structure and one cell per target: the fraction of the dense bytes, and the speedup."""
    rows = [["structure", *(f"`{target}`" for target in TARGETS)]]
    for structure, numbers in found.items():
        rows.append([structure.replace(" %", "%"), *(_gained(numbers, target) for target in TARGETS)])
    return rows


def _gained(numbers: Mapping[str, Any], target: str) -> str:
    """The gain of a rung over the dense model in the same runtime, or the reason why there is none."""
    rung = numbers["rungs"][target]
    if not rung["file"]:
        nothing = {"removed": "nothing to remove", "kernels": "no faster"}.get(target, "not made")
        return "slower, no smaller" if rung["note"].startswith("left out") else nothing
    if estimates := rung["estimates"]:
        share = estimates["encoded weight bytes"] / estimates["encoded weight bytes if no weight were zero"]
        gain = estimates["cycles if no weight were zero"] / estimates["cycles"]
        return f"{share:.2f} of the encoded weights, {f'{gain:.1f} times' if gain > 1.05 else 'no faster'} (estimates)"
    share, outcome = numbers["bytes, of dense"][target], numbers["outcome"][target]
    if outcome.endswith(("no faster", "slower")):
        return f"{share:.2f}, {'no faster' if outcome.endswith('no faster') else 'slower'}"
    return f"{share:.2f}, {numbers['gain'][target][str(BATCH)]:.1f} times"


def heads(options: Options) -> dict[str, Any]:
    """A vision transformer whose heads are pruned at the first step.

    Its weights are random, so the results are times and the equality of outputs.
    """
    torch.manual_seed(0)
    if options.quick:
        net: nn.Module = VisionTransformer(10, 3, 32, depth=2)
    else:
        net = import_module("timm").create_model("vit_tiny_patch16_224", num_classes=10)
    size = 32 if options.quick else 224
    images, labels = torch.randn(BATCH, 3, size, size), torch.randint(0, 10, (BATCH,))
    pruning = MagnitudePruning(0.5, structure="heads", start=0, end=0)
    module = Classifier(lambda *_: net, 10, 3, size)
    loader = DataLoader(TensorDataset(images[:8], labels[:8]), batch_size=8)
    quiet([pruning], "cpu", max_steps=1).fit(module, loader)
    rungs: Any = ["removed", "onnx"]
    found = ladder(net.eval(), images, options, rounds=options.times(10), rungs=rungs)
    smaller, removal = remove_dead(net, images[:4])
    with torch.no_grad():
        change = float((smaller(images[:4]) - net(images[:4])).abs().max())
    return found | {"heads": pruning.left["attention heads"], "gone": removal.heads, "largest change of an output": change}


def carriers(options: Options) -> dict[str, Any]:
    """ResNet-20 with half of its channels dead. They emit 0.1 through their normalization, or nothing."""
    torch.manual_seed(0)
    net = ResNet(10, 3, 32).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data[layer.out_channels // 2 :] = 0
    x = torch.randn(BATCH, 3, 32, 32)
    models = {"dense": net}
    for name, emitted in (("with carriers", 0.1), ("without", 0.0)):
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.constant_(layer.bias, emitted)
        models[name] = remove_dead(net, x)[0]
        models[f"{name}, folded"] = remove_dead(fold_norms(net)[0], x)[0]
    with torch.no_grad():
        times = interleaved({name: partial(model, x) for name, model in models.items()}, options.times(50))
    speed = {name: times["dense"].median / timing.median for name, timing in times.items()}
    return {"batch": BATCH, "milliseconds": {name: asdict(t) for name, t in times.items()}, "speed": speed}
