"""What masks and penalties cost: time of a training step, of a global mask update, memory; beside the ways people use now.

    python -m benchmarks.overhead                     a perceptron, ResNet-18 and a small ViT, batches of 32 and 128
    python -m benchmarks.overhead --models resnet18 --batches 128 --rounds 60
    python -m benchmarks.overhead --models --weights 1000000 1000000000    mask updates alone, up to a billion weights
    python -m benchmarks.overhead --memory --batches 128    peak memory instead of times
    python -m benchmarks.overhead --quick             small, to see that it runs

All ways take turns, step by step, on one and the same model in one and the same run: two models, or two runs of one, differ
by more than what is measured here, through where their memory happens to lie. Each step is compared with the dense step of
its round; the median over rounds is the number. Lightning's ModelPruning masks by torch.nn.utils.prune, and costs the same.

Of fasterai, which brings a trainer of its own, `Sparsifier` (masks, multiplied after each step) and the term that its
`RegularizeCallback` adds to the loss take part, without fastai: `pip install --no-deps fasterai fastcore einops`. Of
Torch-Pruning its sparse training takes part: `GroupNormPruner.regularize`. What is not installed is left out.

Peak memory is the largest resident size of a process of its own that makes a few steps in one way (on Linux).
"""

from __future__ import annotations

import argparse
import logging
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from benchmarks.record import ratios, save, show, timed
from lightning_sparse import MagnitudePruning, WeightPenalty
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.core import Budget, MaskSet, find_targets
from lightning_sparse.functional import magnitude

SPARSITY = 0.9


class Net(L.LightningModule):
    """A network for images of 32 pixels, SGD with momentum."""

    def __init__(self, size: str) -> None:
        super().__init__()
        if size == "quick":
            self.net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 10))
        elif size == "mlp":
            sizes = [3072, 512, 512, 512, 10]
            parts = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
            self.net = nn.Sequential(nn.Flatten(), *parts[:-1])
        elif size == "vit":
            self.net = torchvision.models.VisionTransformer(32, 4, 6, 3, 192, 768, num_classes=10)
            nn.init.normal_(self.net.heads.head.weight, std=0.02)  # zeros as it is made, at which no score says anything
        else:
            self.net = torchvision.models.resnet18(num_classes=10)
            self.net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.net.maxpool = nn.Identity()
        self.term: Callable[[], Tensor] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss if self.term is None else loss + self.term()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


# ---- the ways ----------------------------------------------------------------------------------------------------------


class Way:
    """One way of masking or penalising: what is done before it takes its turn, in a step, and after its turn."""

    def __init__(self, module: Net, masks: dict[nn.Module, Tensor]) -> None:
        self.module, self.masks = module, masks

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        pass


class Prune(Way):
    """A product with the mask before every forward pass."""

    def enter(self) -> None:
        for layer, mask in self.masks.items():
            prune.custom_from_mask(layer, "weight", mask)

    def leave(self) -> None:
        for layer in self.masks:
            prune.remove(layer, "weight")


class Masking(nn.Module):
    """A parametrization by a fixed mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Parametrize(Way):
    """The same as a parametrization."""

    def enter(self) -> None:
        for layer, mask in self.masks.items():
            parametrize.register_parametrization(layer, "weight", Masking(mask))

    def leave(self) -> None:
        for layer in self.masks:
            parametrize.remove_parametrizations(layer, "weight")


class FasteraiMasks(Way):
    """A product with the mask after every step."""

    def __init__(self, module: Net, masks: dict[nn.Module, Tensor]) -> None:
        super().__init__(module, masks)
        from fasterai.core.criteria import large_final
        from fasterai.sparse.sparsifier import Sparsifier as Theirs

        self.theirs = Theirs(module.net, "weight", "global", large_final, layer_type=(nn.Conv2d, nn.Linear))
        for layer, mask in masks.items():
            layer.register_buffer("_mask", mask)

    def after_step(self) -> None:
        self.theirs._apply_masks()


class FasteraiPenalty(Way):
    """A term in the loss."""

    def __init__(self, module: Net, masks: dict[nn.Module, Tensor]) -> None:
        super().__init__(module, masks)
        from fasterai.core.criteria import large_final
        from fasterai.core.granularity import Granularities

        def term() -> Tensor:
            norms = [large_final.f(m.weight)[None].abs().sum(Granularities.get_dim(m, "weight")).sum() for m in masks]
            return 1e-4 * torch.stack(norms).sum()

        self.term = term

    def enter(self) -> None:
        self.module.term = self.term

    def leave(self) -> None:
        self.module.term = None


class TorchPruning(Way):
    """Gradients of a penalty on coupled channels, added before the step."""

    def __init__(self, module: Net, masks: dict[nn.Module, Tensor]) -> None:
        super().__init__(module, masks)
        import torch_pruning as tp

        last = [layer for layer in masks if layer.weight.shape[0] == 10]
        x = torch.rand(2, 3, 32, 32, device=module.device)
        importance = tp.importance.GroupMagnitudeImportance()
        heads = {m: m.num_heads for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
        with torch.enable_grad():
            self.pruner = tp.pruner.GroupNormPruner(
                module.net, x, importance, reg=1e-4, ignored_layers=last, num_heads=heads
            )
            self.pruner.update_regularizer()

    def before_step(self) -> None:
        self.pruner.regularize(self.module.net)


PEERS: dict[str, type[Way]] = {
    "torch.nn.utils.prune": Prune,
    "parametrize": Parametrize,
    "fasterai Sparsifier": FasteraiMasks,
    "fasterai penalty, L1": FasteraiPenalty,
    "Torch-Pruning penalty, group norm": TorchPruning,
}


def ours() -> dict[str, Sparsifier]:
    return {
        "MagnitudePruning": MagnitudePruning(SPARSITY, start=0, end=0),
        "WeightPenalty, L1": WeightPenalty(strength=1e-4, name="l1"),
        "WeightPenalty, group lasso": WeightPenalty(strength=1e-4, kind="group_lasso", name="group"),
    }


class Turns(L.Callback):
    """First of the callbacks: before each step, hands the model over to another way.

    Args:
        methods: ours.
        only: these ways instead of all.
    """

    def __init__(self, methods: dict[str, Sparsifier], only: list[str] | None = None) -> None:
        self.methods, self.only = methods, only
        self.ways: dict[str, Way] = {}
        self.left_out: dict[str, str] = {}
        self.now, self.started = "", 0.0
        self.stations: Any = None
        self.inside: Inside | None = None

    def names(self) -> list[str]:
        return [name for name in ["dense", *self.methods, *self.ways] if self.only is None or name in self.only]

    def _set_up(self, trainer: L.Trainer, module: Net) -> None:
        found = {layer: torch.rand_like(layer.weight) > SPARSITY for layer in layers(module)}
        if "MagnitudePruning" in self.methods:
            masks = self.methods["MagnitudePruning"].masks
            found = {layer: masks[f"{name}.weight"] for name, layer in module.named_modules() if layer in found}
        for name, way in PEERS.items():
            try:
                if self.only is None or name in self.only:
                    self.ways[name] = way(module, {layer: mask.float() for layer, mask in found.items()})
            except Exception as error:  # a peer that is not there, or does not take this model
                self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        for method in self.methods.values():
            self.stations = method.stations
        if self.stations is not None:
            self.inside = Inside(self.stations)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # in the first, our methods begin
            if batch_idx == 1:
                self._set_up(trainer, pl_module)
            order = self.names() if (batch_idx // len(self.names())) % 2 else self.names()[::-1]
            self._hand_over(trainer, order[batch_idx % len(order)])
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.started = perf_counter()

    def _hand_over(self, trainer: L.Trainer, name: str) -> None:
        if self.now in self.ways:
            self.ways[self.now].leave()
        if self.stations is not None:
            for handle in self.stations._handles:
                handle.remove()
            self.stations._handles.clear()
            leader = next(iter(self.methods.values()))
            leader._leads = lambda trainer: name in self.methods  # type: ignore[method-assign]
        if name in self.methods:
            self.stations.methods = [self.methods[name]]
            self.stations._handles.append(trainer.optimizers[0].register_step_post_hook(self.stations._after_step))
        elif name in self.ways:
            self.ways[name].enter()
        self.now = name

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if self.now in self.ways:
            self.ways[self.now].before_step()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.now in self.ways:
            self.ways[self.now].after_step()


class Stop(L.Callback):
    """Last of the callbacks: notes the time."""

    def __init__(self, turns: Turns, warm_up: int) -> None:
        self.turns, self.warm_up = turns, warm_up
        self.times: dict[str, list[float]] = {}
        self.inside: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - self.turns.started
        if not batch_idx:
            return
        names = self.turns.names()
        if batch_idx >= self.warm_up * len(names):
            self.times.setdefault(self.turns.now, []).append(seconds)
            if self.turns.now == "MagnitudePruning" and self.turns.inside is not None:
                self.inside.append(self.turns.inside.seconds)
        if self.turns.inside is not None:
            self.turns.inside.seconds = 0.0


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


def train(size: str, batch: int, batches: int, device: str, precision: Any, only: list[str] | None, warm_up: int) -> Stop:
    """All ways in turns, or some."""
    torch.manual_seed(0)
    turns = Turns({name: method for name, method in ours().items() if only is None or name in only}, only)
    stop = Stop(turns, warm_up)
    data = [(torch.rand(batch, 3, 32, 32), torch.randint(0, 10, (batch,)))] * batches
    runner = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[turns, *turns.methods.values(), stop],
    )
    runner.fit(Net(size), torch.utils.data.DataLoader(data, batch_size=None))
    return stop


def steps(size: str, batch: int, rounds: int, device: str, precision: Any, only: list[str] | None = None) -> dict[str, Any]:
    """Step time of every way, taking turns on one model."""
    count = len(PEERS) + len(ours()) + 1
    stop = train(size, batch, count * (rounds + 2), device, precision, only, 2)
    names = stop.turns.names()
    seen = [dict(zip(names, times, strict=True)) for times in zip(*(stop.times[name] for name in names), strict=False)]
    table: dict[str, Any] = ratios(seen, "dense")
    if stop.inside:
        dense, inside = sorted(stop.times["dense"]), sorted(stop.inside)
        middle, quarter = dense[len(dense) // 2], len(inside) // 4
        table["inside MagnitudePruning's stations"] = {
            "ratio": inside[len(inside) // 2] / middle,
            "low": inside[quarter] / middle,
            "high": inside[-1 - quarter] / middle,
            "seconds": inside[len(inside) // 2],
        }
    for name, reason in stop.turns.left_out.items():
        print(f"  left out: {name} ({reason})")
    return table


def peaks(size: str, batch: int) -> dict[str, float]:
    """Peak memory of every way as a ratio to dense, each in a process of its own."""
    found: dict[str, float] = {}
    for name in ["dense", *ours(), *PEERS]:
        command = [sys.executable, "-m", "benchmarks.overhead", "--peak", name, "--models", size, "--batches", str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[name] = float(done.stdout.split()[-1])
    return {name: value / found["dense"] for name, value in found.items()} | {"dense, MiB": found["dense"]}


def updates(weights: int, rounds: int, device: str) -> dict[str, Any]:
    """A global mask update over many weights; on a CPU the others up to 300 M: they need more than 20 bytes per weight."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(1000, weights // 5000, bias=False, device=device) for _ in range(5)])
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
        times = {"MagnitudePruning": timed(ours, device)}
        if device != "cpu" or weights <= 300_000_000:
            fresh = nn.Sequential(*[nn.Linear(1000, weights // 5000, bias=False, device=device) for _ in range(5)])
            times["prune.global_unstructured"] = timed(lambda module=fresh: theirs(module), device)
            times["cat, kthvalue, compare"] = timed(by_kthvalue, device)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the numbers to benchmarks/results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--models", nargs="*", default=["mlp", "resnet18", "vit"])
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--weights", type=int, nargs="*", default=[1_000_000, 10_000_000, 25_000_000, 100_000_000])
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times (on Linux)")
    parser.add_argument("--peak", help="print the peak memory of one way, in MiB")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.peak:
        stop = train(arguments.models[0], arguments.batches[0], 6, "cpu", "32-true", [arguments.peak], 0)
        if arguments.peak != "dense" and arguments.peak not in stop.times:
            raise SystemExit(str(stop.turns.left_out))
        status = Path("/proc/self/status").read_text()  # not getrusage, in which the parent's peak shows
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return
    if arguments.quick:
        arguments.models, arguments.batches, arguments.rounds, arguments.weights = ["quick"], [128], 12, [1_000_000]
    if arguments.memory:
        found = {}
        for model in arguments.models:
            for batch in arguments.batches:
                title = f"peak memory, {model}, batch {batch}, ratio to dense"
                found[title] = peaks(model, batch)
                print(title, *(f"  {name:34s} {value:9.3f}" for name, value in found[title].items()), sep="\n", flush=True)
        if arguments.save:
            save("overhead_memory", found)
        return
    growing: dict[str, Any] = {}
    for weights in arguments.weights:
        title = f"mask update, {weights:,} weights"
        growing[title] = updates(weights, 3 if weights > 30_000_000 else 5, arguments.device)
        show(f"{title}, ratio to ours", growing[title])
    if arguments.save and growing:
        save(f"updates_{arguments.device}", growing)
    numbers: dict[str, Any] = {"memory, bytes per weight": memory()}
    for model in arguments.models:
        for batch in arguments.batches:
            title = f"step, {model}, batch {batch}, {arguments.precision}, {arguments.device}"
            numbers[title] = steps(model, batch, arguments.rounds, arguments.device, arguments.precision)
            show(f"{title}, ratio to dense", numbers[title])
    print()
    for name, value in numbers["memory, bytes per weight"].items():
        print(f"  {name:40s} {value:.3f} bytes per weight")
    if arguments.save and arguments.models:
        save(f"overhead_{arguments.device}", numbers)


if __name__ == "__main__":
    main()
