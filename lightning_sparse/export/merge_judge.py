"""Which layers act linearly, so that they merge: certified, near, active or collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_sparse.core import BATCH_NORMS, Link, effective_pair, is_collapsed, is_linear
from lightning_sparse.export.compare_models import runner
from lightning_sparse.export.merge_report import LayerVerdict
from lightning_sparse.functional import lowest_output, negative_ratio

__all__ = ["Judge", "positive_shares"]


class Judge:
    """Decides which links merge, and records the verdicts."""

    def __init__(
        self,
        tolerance: float,
        input_range: Sequence[float] | None,
        allow_growth: bool,
        shared: set[int],
        positive: dict[str, float],
    ) -> None:
        self.tolerance, self.input_range, self.allow_growth = tolerance, input_range, allow_growth
        self.shared, self.positive = shared, positive
        self.verdicts: list[LayerVerdict] = []

    def verdict(self, link: Link) -> LayerVerdict:
        """How linear a layer is, regardless of the size of the product."""
        positive = self.positive.get(link.name)
        if not link.activated:
            return LayerVerdict(link.name, "certified", False, 0.0, positive, "no activation after it")
        wide = {name: p.detach().double() for name, p in link.parameters().items()}
        pair = effective_pair(link, wide, shifted=False)
        ratio = float(negative_ratio(effective_pair(link, wide))) if link.low > -math.inf else None
        if is_collapsed(link):
            return LayerVerdict(link.name, "collapsed", False, ratio, positive, "its weights are almost zero")
        least = lowest_output(pair[0], pair[1] if len(pair) > 1 else None, link.low, link.high)
        if bool((least >= 0).all()):
            return LayerVerdict(link.name, "certified", False, ratio, positive)
        if ratio is not None and ratio <= self.tolerance:
            return LayerVerdict(link.name, "near", False, ratio, positive)
        return LayerVerdict(link.name, "active", False, ratio, positive)

    def size(self, *layers: nn.Module | None) -> int:
        """Number of parameters that disappear with these layers."""
        own = [p for layer in layers if layer is not None for p in layer.parameters() if id(p) not in self.shared]
        return sum(p.numel() for p in own)


def positive_shares(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Fraction of non-negative outputs of every layer with its normalization."""
    if inputs is None:
        return {}
    shares: dict[str, float] = {}
    last: dict[int, tuple[str, Tensor]] = {}  # with the tensor itself, or its id could be reused
    handles = []
    for name, layer in model.named_modules():
        if is_linear(layer):

            def note(layer: Any, given: Any, output: Tensor, name: str = name) -> None:
                shares[name] = float((output >= 0).double().mean())
                last[id(output)] = (name, output)

            handles.append(layer.register_forward_hook(note))
        elif isinstance(layer, BATCH_NORMS):

            def renote(layer: Any, given: Any, output: Tensor) -> None:
                if id(given[0]) in last:
                    shares[last[id(given[0])][0]] = float((output >= 0).double().mean())

            handles.append(layer.register_forward_hook(renote))
    try:
        runner(model, inputs)()
    finally:
        for handle in handles:
            handle.remove()
    return shares
