"""Kernels by structure: time of a layer with constant fan-in, or with blocks, compared with dense and CSR layers.

python -m benchmarks kernels-fan-in        a perceptron of three layers, 2048 wide: condensed, compiled, CSR, dense
python -m benchmarks kernels-blocks        the same with blocks of 4, 8 and 16, 90% of them removed: BSR, CSR, dense
python -m benchmarks ladders-structures    the export ladder of one small network, trained with each structure
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.accuracy import have_data
from benchmarks.export import BATCH, accuracy, ladder
from benchmarks.record import Options, Parts
from benchmarks.trainers import trained
from lightning_sparse import MagnitudePruning
from lightning_sparse.data import Digits, FashionMNIST
from lightning_sparse.export import use_kernels
from lightning_sparse.export.compare_models import interleaved
from lightning_sparse.functional import block_score, expand_blocks, fan_in_mask, top_k_masks
from lightning_sparse.models import MLP, Classifier

WIDTH, LAYERS = 2048, 3


class Gathered(nn.Module):
    """The products of a condensed layer as a gather and a sum, which inductor fuses into one loop."""

    def __init__(self, layer: nn.Linear, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.layer, self.indices, self.values = layer, indices, values

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = (x[:, self.indices] * self.values).sum(-1)
        return product + self.layer.bias


def perceptron(mask: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """A perceptron with random weights and masks from random scores, the same at every call."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    for layer in layers:
        layer.weight.data.mul_(mask(torch.rand(WIDTH, WIDTH)))
    return nn.Sequential(*layers).eval()


def timed(models: Mapping[str, nn.Module], batch: int, rounds: int) -> dict[str, Any]:
    """Time all models interleaved; return milliseconds, and speed relative to dense."""
    x = torch.randn(batch, WIDTH)
    expected = models["dense"](x)
    for model in models.values():
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    times = interleaved({name: partial(model, x) for name, model in models.items()}, rounds)
    speed = {name: round(times["dense"].median / timing.median, 3) for name, timing in times.items()}
    return {"milliseconds": {name: asdict(timing) for name, timing in times.items()}, "speed": speed}


def fan_in(options: Options) -> Parts:
    """Constant fan-in at four sparsities and two batch sizes."""
    for sparsity in (0.8, 0.9, 0.95, 0.99):
        for batch in (1, 64):
            yield (f"{sparsity:g}, batch {batch}",), partial(condensed, sparsity, batch, options)


@torch.no_grad()
def condensed(sparsity: float, batch: int, options: Options) -> dict[str, Any]:
    made = partial(perceptron, partial(fan_in_mask, fan_in=round((1 - sparsity) * WIDTH)))
    models: dict[str, nn.Module] = {"dense": made()}
    for kernel in ("condensed", "csr"):
        models[kernel] = use_kernels(made(), {str(i): kernel for i in range(LAYERS)})
    if batch == 1:  # gathering a batch makes a tensor of batch x outputs x fan-in
        narrow: Any = models["condensed"]
        layers = zip(models["dense"], narrow, strict=True)  # type: ignore[call-overload]
        gathered = nn.Sequential(*(Gathered(dense, part.indices, part.values) for dense, part in layers))
        models["inductor"] = torch.compile(gathered, dynamic=False)
    return timed(models, batch, options.times(100))


def blocks(options: Options) -> Parts:
    """Blocks of three sizes at 90% and two batch sizes."""
    for size in (4, 8, 16):
        for batch in (1, 64):
            yield (f"{size}x{size}, batch {batch}",), partial(in_blocks, size, batch, options)


@torch.no_grad()
def in_blocks(size: int, batch: int, options: Options) -> dict[str, Any]:
    made = partial(perceptron, partial(tenth_of_blocks, size=size))
    models: dict[str, nn.Module] = {"dense": made()}
    for kernel in (f"bsr{size}", "csr"):
        models[kernel] = use_kernels(made(), {str(i): kernel for i in range(LAYERS)})
    return timed(models, batch, options.times(100))


def tenth_of_blocks(score: Tensor, size: int) -> Tensor:
    """The mask that keeps the tenth of the square blocks with the highest scores."""
    by_block = block_score(score, size, size)
    return expand_blocks(top_k_masks([by_block], round(0.1 * by_block.numel()))[0], size, size)


SMALL: dict[str, dict[str, Any]] = {
    "unstructured": {"sparsity": 0.9, "allocation": "erk"},
    "fan_in": {"sparsity": 0.9, "allocation": "erk"},
    "block:8x8": {"sparsity": 0.9, "allocation": "uniform", "targets": ["!:last"]},
    "2:4": {"targets": ["!:last"]},
    "coupled": {"sparsity": 0.5, "budget": "macs"},
}
"""How the network is pruned with each structure. Its last layer has ten outputs, which are not divisible by 8."""


def ladders(options: Options) -> Parts:
    """Gradual pruning by magnitude, then all rungs interleaved: speedup, bytes and accuracy of every rung."""
    for structure in SMALL:
        yield (structure,), partial(under, structure, options)


def under(structure: str, options: Options) -> dict[str, Any]:
    have_data(FashionMNIST, options)
    data: Any = Digits() if options.quick else FashionMNIST(root=options.data)
    L.seed_everything(0, verbose=False)
    module = Classifier(partial(MLP, hidden=(1024, 1024)), data.num_classes, data.in_channels, data.image_size)
    pruning = MagnitudePruning(structure=structure, **SMALL[structure])
    name = f"ladders-structures-{re.sub('[^a-z0-9]+', '-', structure)}"
    network = trained(module, data, [pruning], name, options, epochs=5)
    data.setup("test")
    inputs = next(iter(data.test_dataloader()))[0][:BATCH]
    return ladder(network, inputs, options, evaluate=lambda made: accuracy(made, data))
