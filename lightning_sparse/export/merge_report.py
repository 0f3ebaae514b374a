"""The effect of a merge: depth, size, work, time, and outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_sparse.core import is_linear

__all__ = ["LayerVerdict", "MergeReport", "count_depth", "count_parameters"]


@dataclass(frozen=True)
class LayerVerdict:
    """The verdict on one layer.

    Args:
        layer: its name before the merge.
        level: `certified` (linear for all inputs, the merge is exact), `near` (negative part within the tolerance, the merge
            changes outputs a little), `active`, or `collapsed` (weights close to zero: the signal is cut off, which is not a
            success).
        merged: whether it was merged.
        ratio: ratio of the negative part to the whole; None where inputs have no lower bound.
        positive: fraction of positive pre-activations on the given inputs; None without inputs.
        note: the layer it was merged into, or why it was not merged.
    """

    layer: str
    level: str
    merged: bool
    ratio: float | None = None
    positive: float | None = None
    note: str = ""


@dataclass
class MergeReport:
    """Before and after a merge; prints as a table.

    Args:
        depth: number of layers with weights.
        parameters: number of parameters in them.
        macs: multiplications per sample of linear layers and convolutions; None without inputs.
        milliseconds: median time of a forward pass, both networks interleaved; None without inputs.
        change: the largest difference of any output on the given inputs, and the largest output; None without inputs.
        layers: one verdict per layer.
    """

    depth: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None = None
    milliseconds: tuple[float, float] | None = None
    change: tuple[float, float] | None = None
    layers: list[LayerVerdict] = field(default_factory=list)

    @property
    def merged(self) -> list[str]:
        """The layers that were merged."""
        return [verdict.layer for verdict in self.layers if verdict.merged]

    @property
    def collapsed(self) -> list[str]:
        """Layers whose weights are almost zero."""
        return [verdict.layer for verdict in self.layers if verdict.level == "collapsed"]

    def __str__(self) -> str:
        rows = [("layer", "level", "ratio", "positive", "")]
        for v in self.layers:
            numbers = ("" if v.ratio is None else f"{v.ratio:.1e}", "" if v.positive is None else f"{v.positive:.1%}")
            rows.append((v.layer, v.level, *numbers, v.note))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows
        ]
        lines += ["", f"depth         {self.depth[0]:,} -> {self.depth[1]:,}"]
        lines.append(f"parameters    {self.parameters[0]:,} -> {self.parameters[1]:,}")
        if self.macs:
            lines.append(f"MACs          {self.macs[0]:,} -> {self.macs[1]:,} per sample")
        if self.milliseconds:
            lines.append(f"latency       {self.milliseconds[0]:.3g} ms -> {self.milliseconds[1]:.3g} ms")
        if self.change:
            lines.append(f"outputs       differ by at most {self.change[0]:.2g}; the largest is {self.change[1]:.3g}")
        if self.collapsed:
            lines.append(
                f"collapsed     {', '.join(self.collapsed)}: weights near zero cut off the signal; use a smaller strength"
            )
        return "\n".join(lines)


def count_depth(module: nn.Module) -> int:
    """The number of layers with weights: linear layers and convolutions."""
    return sum(map(is_linear, module.modules()))


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, trainable or frozen, with shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
