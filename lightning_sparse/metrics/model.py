"""Metrics with one number per layer: its density, its cost, its number of dead outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import effective_macs, find_targets
from lightning_sparse.functional import dead_outputs, layer_density, nonzero_counts
from lightning_sparse.metrics.drawing import bars
from lightning_sparse.metrics.sparsity import MaskMetric, NamedMasks

__all__ = ["DeadUnits", "EffectiveMACs", "EffectiveParameters", "LayerDensity"]


class _ByLayer(MaskMetric):
    """One number per layer, as of the latest update.

    Args:
        dense: the number of each layer before anything is removed.
        start: the number of every layer before the first update; None means those in `dense`.
        options: options of `torchmetrics.Metric`.
    """

    number: type = float
    values: Tensor

    def __init__(self, dense: Mapping[str, float], start: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.names, self.dense = list(dense), dict(dense)
        first = [float(value) if start is None else start for value in dense.values()]
        self.add_state("values", torch.tensor(first, dtype=torch.float64))

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Return the number of each layer from its mask or weight."""

    def update(self, tensors: NamedMasks) -> None:
        """Update from masks (counts what is kept) or from weights (counts what is not zero)."""
        found = self.read({name: tensors[name] for name in self.names if name in tensors})
        self.values = torch.tensor([found[name] for name in self.names], dtype=torch.float64, device=self.device)

    def compute(self) -> dict[str, Any]:
        return {name: self.number(value) for name, value in zip(self.names, self.values.tolist(), strict=True)}

    def plot(self, val: Mapping[str, float] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw a bar for each layer in front of the bar of the dense model; needs matplotlib.

        Args:
            val: numbers to draw instead of the current ones.
            ax: axes of matplotlib to draw on.

        Returns:
            The figure and the axes.
        """
        return bars(self.compute() if val is None else val, self.label, ax, self.dense)


class LayerDensity(_ByLayer):
    """The fraction of each layer's entries that are in effect, as of the latest update.

    Pass masks to count what is kept, or weights to count what is not zero.

    Args:
        masks: masks of the layers.
        options: options of `torchmetrics.Metric`.

    Example:
        >>> masks = {"fc": torch.tensor([True, True, False, False])}
        >>> density = LayerDensity(masks)
        >>> density.update(masks)
        >>> density.compute()
        {'fc': 0.5}
    """

    label = "density"

    def __init__(self, masks: NamedMasks, **options: Any) -> None:
        super().__init__(dict.fromkeys(masks, 1.0), **options)

    def read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        return layer_density(tensors)


class EffectiveMACs(_ByLayer):
    """Multiply-accumulates per sample and layer if multiplications by zero are skipped.

    Layers without a mask count as dense. `dense` holds the numbers of the dense model; totals are sums over layers.

    Args:
        macs: multiply-accumulates of the dense model, from `core.count_macs`.
        options: options of `torchmetrics.Metric`.

    Example:
        >>> metric = EffectiveMACs({"fc": 100, "head": 10})
        >>> metric.update({"fc": torch.tensor([True, False, False, False])})
        >>> metric.compute(), sum(metric.compute().values())
        ({'fc': 25, 'head': 10}, 35)
    """

    label = "MACs"
    number = int

    def __init__(self, macs: Mapping[str, int], **options: Any) -> None:
        super().__init__(macs, **options)

    def read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        return effective_macs({name: int(value) for name, value in self.dense.items()}, tensors)


class EffectiveParameters(EffectiveMACs):
    """The number of parameters left, by name; those without a mask, such as biases and norms, count in full.

    Args:
        module: the module whose parameters are counted.
        options: options of `torchmetrics.Metric`.

    Example:
        >>> metric = EffectiveParameters(nn.Linear(2, 2))
        >>> metric.update({"weight": torch.tensor([[True, False], [False, False]])})
        >>> metric.compute()
        {'weight': 1, 'bias': 2}
    """

    label = "parameters"

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__({name: parameter.numel() for name, parameter in module.named_parameters()}, **options)


class DeadUnits(_ByLayer):
    """The number of neurons or filters in each layer that have lost all their incoming weights.

    Layers without a mask count as having none. `dense` holds the number of all neurons or filters, dead and alive.

    Args:
        module: the module that holds the layers.
        targets: patterns that select the weights; see `core.find_targets`.
        options: options of `torchmetrics.Metric`.

    Example:
        >>> metric = DeadUnits(nn.Sequential(nn.Linear(2, 2)))
        >>> metric.update({"0.weight": torch.tensor([[True, False], [False, False]])})
        >>> metric.compute()
        {'0.weight': 1}
    """

    label = "dead outputs"
    number = int

    def __init__(self, module: nn.Module, targets: str | Sequence[str] = ("*",), **options: Any) -> None:
        found = find_targets(module, targets, frozen=True)
        self.dims = {target.name: target.output_dims for target in found}
        super().__init__({target.name: target.outputs for target in found}, start=0.0, **options)

    def read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, float]:
        dead = {name: dead_outputs(tensor, self.dims[name]) for name, tensor in tensors.items()}
        return {**dict.fromkeys(self.names, 0), **nonzero_counts(dead)}
