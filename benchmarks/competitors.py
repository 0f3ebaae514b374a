"""Common implementations of masks and penalties, to be interleaved with ours on one model.

Each function takes the module that all variants train, and a mask for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from benchmarks.turns import Way

SPARSITY = 0.9

Masks = Mapping[nn.Module, Tensor]


def layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def model_pruning(module: Any, masks: Masks) -> Way:
    """Lightning's own callback: multiply by the mask before every forward pass."""
    chosen = [(layer, "weight") for layer in masks]
    callback = ModelPruning("l1_unstructured", chosen, amount=SPARSITY, use_global_unstructured=True)
    callback.setup(None, module, "fit")
    return Way(enter=lambda: callback.apply_pruning(SPARSITY), leave=lambda: callback.make_pruning_permanent(module))


def torch_prune(module: Any, masks: Masks) -> Way:
    """`torch.nn.utils.prune`: multiply by the mask before every forward pass."""
    return Way(
        enter=lambda: [prune.custom_from_mask(layer, "weight", mask) for layer, mask in masks.items()],
        leave=lambda: [prune.remove(layer, "weight") for layer in masks],
    )


class Masking(nn.Module):
    """A parametrization that multiplies by a fixed mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def parametrized(module: Any, masks: Masks) -> Way:
    """`torch.nn.utils.parametrize`: multiply by the mask whenever the weight is read."""
    return Way(
        enter=lambda: [parametrize.register_parametrization(x, "weight", Masking(mask)) for x, mask in masks.items()],
        leave=lambda: [parametrize.remove_parametrizations(layer, "weight") for layer in masks],
    )


def fasterai_masks(module: Any, masks: Masks) -> Way:
    """fasterai: multiply by the mask after every step."""
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    theirs = Sparsifier(module.net, "weight", "global", large_final, layer_type=(nn.Conv2d, nn.Linear))
    for layer, mask in masks.items():
        layer.register_buffer("_mask", mask.float())
    return Way(after_step=theirs._apply_masks)


def fasterai_penalty(module: Any, masks: Masks) -> Way:
    """fasterai: add a penalty to the loss."""
    from fasterai.core.criteria import large_final
    from fasterai.core.granularity import Granularities

    def term() -> Tensor:
        norms = [large_final.f(m.weight)[None].abs().sum(Granularities.get_dim(m, "weight")).sum() for m in masks]
        return 1e-4 * torch.stack(norms).sum()

    return Way(enter=lambda: setattr(module, "term", term), leave=lambda: setattr(module, "term", None))


def torch_pruning(module: Any, masks: Masks) -> Way:
    """Torch-Pruning: add the gradients of a penalty on coupled channels before the step."""
    import torch_pruning as tp

    last = [layer for layer in masks if layer.weight.shape[0] == 10]
    x = torch.rand(2, 3, 32, 32, device=module.device)
    importance = tp.importance.GroupMagnitudeImportance()
    heads = {m: m.num_heads for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    with torch.enable_grad():
        pruner = tp.pruner.GroupNormPruner(module.net, x, importance, reg=1e-4, ignored_layers=last, num_heads=heads)
        pruner.update_regularizer()
    return Way(before_step=lambda: pruner.regularize(module.net))


PEERS: dict[str, Callable[[Any, Masks], Way]] = {
    "ModelPruning": model_pruning,
    "torch.nn.utils.prune": torch_prune,
    "parametrize": parametrized,
    "fasterai Sparsifier": fasterai_masks,
    "fasterai penalty, L1": fasterai_penalty,
    "Torch-Pruning penalty, group norm": torch_pruning,
}
