"""What masks cost: time of a training step, time of a global mask update, memory; beside the ways people use now.

    python -m benchmarks.overhead                     ResNet-18, batch 128, all variants interleaved
    python -m benchmarks.overhead --quick             small, to see that it runs

All ways of masking take turns, step by step, on one and the same model in one and the same run: two models, or two runs of
one, differ by more than what is measured here, through where their memory happens to lie. Each step is compared with
the dense step of its round; the median over rounds is the number. Lightning's ModelPruning masks by torch.nn.utils.prune.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import warnings
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from benchmarks.record import ratios, save, show, timed
from lightning_sparse import MagnitudePruning
from lightning_sparse.core import Budget, MaskSet, find_targets
from lightning_sparse.functional import magnitude

SPARSITY = 0.9


class Net(L.LightningModule):
    """ResNet-18 for images of 32 pixels, SGD with momentum."""

    def __init__(self, size: str) -> None:
        super().__init__()
        if size == "quick":
            self.net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 10))
        else:
            self.net = torchvision.models.resnet18(num_classes=10)
            self.net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.net.maxpool = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


class Masking(nn.Module):
    """A parametrization by a fixed mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


WAYS = ["dense", "MagnitudePruning", "torch.nn.utils.prune", "parametrize"]


class Switch(L.Callback):
    """First of the callbacks: before each step, masks the model in another way, by the masks of our method."""

    def __init__(self, method: MagnitudePruning) -> None:
        self.method = method
        self.way = "MagnitudePruning"
        self.started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx >= len(WAYS):
            order = WAYS if (batch_idx // len(WAYS)) % 2 else WAYS[::-1]
            self.change(trainer, pl_module, order[batch_idx % len(WAYS)])
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.started = perf_counter()

    def change(self, trainer: L.Trainer, module: L.LightningModule, way: str) -> None:
        for name, layer in named_layers(module):
            if self.way == "torch.nn.utils.prune":
                prune.remove(layer, "weight")
            elif self.way == "parametrize":
                parametrize.remove_parametrizations(layer, "weight")
            mask = self.method.masks[f"{name}.weight"]
            if way == "torch.nn.utils.prune":
                prune.custom_from_mask(layer, "weight", mask.float())
            elif way == "parametrize":
                parametrize.register_parametrization(layer, "weight", Masking(mask.float()))
        stations = self.method.stations
        for handle in stations._handles:
            handle.remove()
        stations._handles.clear()
        self.method._leads = lambda trainer: way == "MagnitudePruning"  # type: ignore[method-assign]
        if way == "MagnitudePruning":
            stations._handles.append(trainer.optimizers[0].register_step_post_hook(stations._after_step))
            stations.batch_start(0)
        self.way = way


class Stop(L.Callback):
    """Last of the callbacks: notes the time."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.times: dict[str, list[float]] = {way: [] for way in WAYS}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        if batch_idx == 0:
            self.inside = Inside(self.switch.method.stations)
        elif batch_idx >= 3 * len(WAYS):  # three rounds warm up
            self.times[self.switch.way].append(perf_counter() - self.switch.started)
            if self.switch.way == "MagnitudePruning":
                self.inside.per_step.append(self.inside.seconds)
            self.inside.seconds = 0.0


class Inside:
    """Adds up the time that a step spends in the stations of our methods."""

    def __init__(self, stations: Any) -> None:
        self.seconds = 0.0
        self.per_step: list[float] = []
        for name in ("before_step", "_after_step", "batch_start", "batch_end"):
            setattr(stations, name, self.watched(getattr(stations, name)))

    def watched(self, function: Any) -> Any:
        def run(*args: Any) -> Any:
            start = perf_counter()
            result = function(*args)
            self.seconds += perf_counter() - start
            return result

        return run


def named_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def steps(size: str, batch: int, rounds: int, device: str, precision: Any) -> dict[str, Any]:
    """Step time of every way of masking, taking turns on one model."""
    torch.manual_seed(0)
    method = MagnitudePruning(SPARSITY, start=0, end=0)
    switch = Switch(method)
    stop = Stop(switch)
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * (len(WAYS) * (rounds + 3))
    runner = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[switch, method, stop],
    )
    runner.fit(Net(size), torch.utils.data.DataLoader(data, batch_size=None))
    seen = [dict(zip(WAYS, times, strict=True)) for times in zip(*(stop.times[way] for way in WAYS), strict=True)]
    inside = sorted(stop.inside.per_step)
    dense = sorted(stop.times["dense"])
    share = inside[len(inside) // 2] / dense[len(dense) // 2]
    quarters = [inside[len(inside) // 4] / dense[len(dense) // 2], inside[-1 - len(inside) // 4] / dense[len(dense) // 2]]
    table = ratios(seen, "dense")
    row = {"ratio": share, "low": quarters[0], "high": quarters[1], "seconds": inside[len(inside) // 2]}
    table["inside MagnitudePruning's stations"] = row
    return table


def updates(weights: int, rounds: int, device: str) -> dict[str, Any]:
    """A global mask update over many weights."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(1000, weights // 5000, bias=False) for _ in range(5)]).to(device)
    targets = find_targets(net)
    budget = Budget(SPARSITY)
    masks = MaskSet({target.name: target.weight for target in targets})

    def ours() -> None:
        made = budget.masks(targets, [magnitude(target.weight) for target in targets])
        masks.replace({target.name: mask for target, mask in zip(targets, made, strict=True)})

    def theirs(module: nn.Module) -> None:
        prune.global_unstructured([(layer, "weight") for layer in layers(module)], prune.L1Unstructured, amount=SPARSITY)

    def by_kthvalue() -> None:
        flat = torch.cat([target.weight.detach().abs().flatten() for target in targets])
        threshold = flat.kthvalue(round(SPARSITY * flat.numel())).values
        for target in targets:
            _ = target.weight.detach().abs() > threshold

    seen = []
    for number in range(rounds + 1):
        fresh = nn.Sequential(*[nn.Linear(1000, weights // 5000, bias=False) for _ in range(5)]).to(device)
        times = {
            "MagnitudePruning": timed(ours, device),
            "prune.global_unstructured": timed(lambda module=fresh: theirs(module), device),
            "cat, kthvalue, compare": timed(by_kthvalue, device),
        }
        if number:
            seen.append(times)
    return ratios(seen, "MagnitudePruning")


def memory() -> dict[str, float]:
    """Bytes per targeted weight, in memory while training and in the checkpoint."""
    net = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    masks = MaskSet(dict(net.named_parameters()))
    kept = torch.rand(1000, 1000) > SPARSITY
    masks.replace({"0.weight": kept})
    ours = sum(bits.numel() * bits.element_size() for bits in masks._bits.values())
    saved = sum(entry["kept"].numel() for entry in masks.state_dict().values())
    pruned = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    prune.l1_unstructured(pruned[0], "weight", SPARSITY)
    extra = pruned[0].weight_mask.numel() * pruned[0].weight_mask.element_size()
    return {
        "ours in memory": ours / 1e6,
        "ours in the checkpoint": saved / 1e6,
        "torch.nn.utils.prune, mask alone": extra / 1e6,
        "torch.nn.utils.prune in the checkpoint": len(pickle.dumps(pruned[0].weight_mask)) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--weights", type=int, nargs="*", default=[1_000_000, 25_000_000])
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size, rounds = ("quick", 12) if arguments.quick else ("resnet18", arguments.rounds)
    numbers: dict[str, Any] = {"memory, bytes per weight": memory()}
    for weights in arguments.weights:
        numbers[f"mask update, {weights:,} weights"] = updates(weights, 5, arguments.device)
        show(f"mask update over {weights:,} weights, ratio to ours", numbers[f"mask update, {weights:,} weights"])
    title = f"step, {size}, batch {arguments.batch}, {arguments.precision}, {arguments.device}"
    numbers[title] = steps(size, arguments.batch, rounds, arguments.device, arguments.precision)
    show(f"{title}, ratio to dense", numbers[title])
    for name, value in numbers["memory, bytes per weight"].items():
        print(f"  {name:40s} {value:.3f} bytes per weight")
    if arguments.save:
        save(f"overhead_{arguments.device}", numbers)


if __name__ == "__main__":
    main()
