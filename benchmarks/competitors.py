"""Ways of masking and penalizing that people use now; they can take turns with ours on one model."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from benchmarks.turns import Way

SPARSITY = 0.9


def layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


class Competitor(Way):
    """A way of masking or penalizing a model that all ways train.

    Args:
        module: that holds it.
        masks: what each layer is to keep.
    """

    def __init__(self, module: Any, masks: dict[nn.Module, Tensor]) -> None:
        super().__init__()
        self.module, self.masks = module, masks


class Prune(Competitor):
    """A product with the mask before every forward pass."""

    def enter(self) -> None:
        for layer, mask in self.masks.items():
            prune.custom_from_mask(layer, "weight", mask)

    def leave(self) -> None:
        for layer in self.masks:
            prune.remove(layer, "weight")


class LightningPruning(Competitor):
    """Lightning's own callback: a product with the mask before every forward pass."""

    def __init__(self, module: Any, masks: dict[nn.Module, Tensor]) -> None:
        super().__init__(module, masks)
        chosen = [(layer, "weight") for layer in masks]
        self.callback = ModelPruning("l1_unstructured", chosen, amount=SPARSITY, use_global_unstructured=True)
        self.callback.setup(None, module, "fit")

    def enter(self) -> None:
        self.callback.apply_pruning(SPARSITY)

    def leave(self) -> None:
        self.callback.make_pruning_permanent(self.module)


class Masking(nn.Module):
    """A parametrization by a fixed mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Parametrize(Competitor):
    """The same as a parametrization."""

    def enter(self) -> None:
        for layer, mask in self.masks.items():
            parametrize.register_parametrization(layer, "weight", Masking(mask.float()))

    def leave(self) -> None:
        for layer in self.masks:
            parametrize.remove_parametrizations(layer, "weight")


class FasteraiMasks(Competitor):
    """A product with the mask after every step."""

    def __init__(self, module: Any, masks: dict[nn.Module, Tensor]) -> None:
        super().__init__(module, masks)
        from fasterai.core.criteria import large_final
        from fasterai.sparse.sparsifier import Sparsifier as Theirs

        self.theirs = Theirs(module.net, "weight", "global", large_final, layer_type=(nn.Conv2d, nn.Linear))
        for layer, mask in masks.items():
            layer.register_buffer("_mask", mask.float())

    def after_step(self) -> None:
        self.theirs._apply_masks()


class FasteraiPenalty(Competitor):
    """A term in the loss."""

    def __init__(self, module: Any, masks: dict[nn.Module, Tensor]) -> None:
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


class TorchPruning(Competitor):
    """Gradients of a penalty on coupled channels, added before the step."""

    def __init__(self, module: Any, masks: dict[nn.Module, Tensor]) -> None:
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


PEERS: dict[str, type[Competitor]] = {
    "ModelPruning": LightningPruning,
    "torch.nn.utils.prune": Prune,
    "parametrize": Parametrize,
    "fasterai Sparsifier": FasteraiMasks,
    "fasterai penalty, L1": FasteraiPenalty,
    "Torch-Pruning penalty, group norm": TorchPruning,
}
