"""Figures of metrics; needs matplotlib, and changes none of its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ["bars", "curve", "figure_of"]


def figure_of(ax: Any, width: float, height: float) -> tuple[Any, Any]:
    """The figure of the given axes, or a new one of this size in inches.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plot() draws with matplotlib, which is not installed; `pip install matplotlib`.")
    if ax is not None:
        return ax.figure, ax
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def bars(values: Mapping[str, float], label: str, ax: Any, behind: Mapping[str, float] | None = None) -> tuple[Any, Any]:
    """One horizontal bar per layer, the first on top.

    Args:
        values: values by layer.
        label: label of the value axis.
        ax: axes to draw on; None creates new ones.
        behind: values drawn in a pale color behind them, such as those of the dense model.
    """
    figure, ax = figure_of(ax, 6.0, 1.0 + 0.22 * len(values))
    names = list(values)
    if behind is not None:
        ax.barh(names, [behind[name] for name in names], color="C0", alpha=0.25)
    ax.barh(names, list(values.values()), color="C0")
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize="x-small")
    ax.set_xlabel(label)
    return figure, ax


def curve(values: Any, label: str, ax: Any) -> tuple[Any, Any]:
    """A single value, or a list of values over the readings."""
    figure, ax = figure_of(ax, 6.0, 3.5)
    readings = [float(value) for value in values] if isinstance(values, Sequence) else [float(values)]
    ax.plot(range(1, len(readings) + 1), readings, marker="." if len(readings) > 1 else "o")
    ax.set_xlabel("reading")
    ax.set_ylabel(label)
    return figure, ax
