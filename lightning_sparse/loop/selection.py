"""Messages about the weights that a method works on, before training begins."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_sparse.core import Selection, coverage

__all__ = ["tell_selection"]


def tell_selection(label: str, module: nn.Module, patterns: Sequence[str], selection: Selection) -> None:
    """Report what is left out: frozen weights, those that a structure does not fit, and those that no pattern can name.

    Args:
        label: label of the method.
        module: module whose weights were chosen.
        patterns: patterns that chose them.
        selection: the resulting selection.
    """
    if selection.frozen:
        entries = sum([weight.numel() for weight in selection.frozen.values()])
        tensors = "1 tensor" if len(selection.frozen) == 1 else f"{len(selection.frozen)} tensors"
        rank_zero_info(
            f"{label} leaves out frozen weights ({tensors}, {entries:,} entries). They stay dense, even "
            "if they are unfrozen later."
        )
    if selection.unfit:
        name, why = next(iter(selection.unfit.items()))
        others = f" {len(selection.unfit) - 1} more stay dense for similar reasons." if len(selection.unfit) > 1 else ""
        rank_zero_info(f"{label} keeps '{name}' dense: it {why}.{others}")
    found = {target.name for target in selection.targets}
    warning = coverage(module, patterns, found).warning
    if warning is not None:
        rank_zero_warn(f"{label} {warning}")
