"""Ways of masking and penalizing, ours and those of others, that can take turns on one model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning as L
import torch
import torchvision
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from lightning_sparse import MagnitudePruning, WeightPenalty
from lightning_sparse.loop import Sparsifier

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


class Way:
    """One way of masking or penalizing: what is done before it takes its turn, in a step, and after its turn.

    Args:
        module: that all ways train.
        masks: what each layer is to keep.
    """

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


class LightningPruning(Way):
    """Lightning's own callback: a product with the mask before every forward pass."""

    def __init__(self, module: Net, masks: dict[nn.Module, Tensor]) -> None:
        super().__init__(module, masks)
        chosen = [(layer, "weight") for layer in masks]
        self.callback = ModelPruning("l1_unstructured", chosen, amount=SPARSITY, use_global_unstructured=True)
        self.callback.setup(None, module, "fit")  # type: ignore[arg-type]

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


class Parametrize(Way):
    """The same as a parametrization."""

    def enter(self) -> None:
        for layer, mask in self.masks.items():
            parametrize.register_parametrization(layer, "weight", Masking(mask.float()))

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
            layer.register_buffer("_mask", mask.float())

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
    "ModelPruning": LightningPruning,
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
