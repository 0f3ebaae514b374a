"""What masks cost: time of a training step, time of a global mask update, memory; beside the ways people use now.

    python -m benchmarks.overhead                     ResNet-18, batch 128, all variants interleaved
    python -m benchmarks.overhead --quick             small, to see that it runs

Every round trains each variant for a few steps through a real Trainer, one after the other, and compares with the dense
step of the same round; the median over rounds is the number.
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
from lightning.pytorch.callbacks import ModelPruning
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

    def __init__(self, size: str, batch: int, count: int) -> None:
        super().__init__()
        self.batch = batch
        images, labels = torch.rand(count, 3, 32, 32), torch.randint(0, 10, (count,))
        self.data = torch.utils.data.TensorDataset(images, labels)
        if size == "quick":
            self.net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 10))
        else:
            self.net = torchvision.models.resnet18(num_classes=10)
            self.net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.net.maxpool = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        # One batch in the first epoch, at whose end ModelPruning prunes; the second epoch is measured.
        first = torch.utils.data.Subset(self.data, range(self.batch))
        return torch.utils.data.DataLoader(first if self.trainer.current_epoch == 0 else self.data, self.batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


class Stopwatch(L.Callback):
    """From the start of one batch to the start of the next, in the second epoch, after its first step."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.starts.append(perf_counter())

    @property
    def seconds(self) -> float:
        gaps = sorted(b - a for a, b in zip(self.starts[1:], self.starts[2:], strict=False))
        return gaps[len(gaps) // 2]


class Masking(nn.Module):
    """A parametrization by a fixed mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def variant(name: str, size: str, batch: int, count: int) -> tuple[Net, list[L.Callback]]:
    torch.manual_seed(0)
    model = Net(size, batch, count)
    if name == "MagnitudePruning":
        return model, [MagnitudePruning(SPARSITY, start=0, end=0)]
    if name == "Lightning ModelPruning":
        pairs = [(layer, "weight") for layer in layers(model.net)]
        return model, [ModelPruning("l1_unstructured", pairs, amount=SPARSITY, apply_pruning=lambda epoch: epoch == 0)]
    if name == "torch.nn.utils.prune":
        for layer in layers(model.net):
            prune.l1_unstructured(layer, "weight", SPARSITY)
    if name == "parametrize":
        for layer in layers(model.net):
            mask = (torch.rand_like(layer.weight) > SPARSITY).float()
            parametrize.register_parametrization(layer, "weight", Masking(mask))
    return model, []


VARIANTS = ["dense", "MagnitudePruning", "torch.nn.utils.prune", "Lightning ModelPruning", "parametrize"]


def steps(size: str, batch: int, rounds: int, each: int, device: str, precision: Any) -> dict[str, Any]:
    """Step time of every variant, in rounds."""
    seen = []
    for number in range(rounds + 1):
        order = VARIANTS if number % 2 else VARIANTS[::-1]
        times = {}
        for name in order:
            model, callbacks = variant(name, size, batch, batch * (each + 2))
            watch = Stopwatch()
            runner = L.Trainer(
                max_epochs=2,
                accelerator="gpu" if device == "cuda" else "cpu",
                devices=1,
                precision=precision,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                reload_dataloaders_every_n_epochs=1,
                callbacks=[watch, *callbacks],
            )
            runner.fit(model)
            times[name] = watch.seconds
        if number:  # the first round warms up
            seen.append({name: times[name] for name in VARIANTS})
            print("round", number, {name: round(value, 4) for name, value in seen[-1].items()}, flush=True)
    return ratios(seen, "dense")


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--weights", type=int, nargs="*", default=[1_000_000, 25_000_000])
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size, rounds = ("quick", 3) if arguments.quick else ("resnet18", arguments.rounds)
    numbers: dict[str, Any] = {"memory, bytes per weight": memory()}
    for weights in arguments.weights:
        numbers[f"mask update, {weights:,} weights"] = updates(weights, rounds, arguments.device)
        show(f"mask update over {weights:,} weights, ratio to ours", numbers[f"mask update, {weights:,} weights"])
    title = f"step, {size}, batch {arguments.batch}, {arguments.precision}, {arguments.device}"
    numbers[title] = steps(size, arguments.batch, rounds, arguments.steps, arguments.device, arguments.precision)
    show(f"{title}, ratio to dense", numbers[title])
    for name, value in numbers["memory, bytes per weight"].items():
        print(f"  {name:40s} {value:.3f} bytes per weight")
    if not arguments.quick:
        save(f"overhead_{arguments.device}", numbers)


if __name__ == "__main__":
    main()
