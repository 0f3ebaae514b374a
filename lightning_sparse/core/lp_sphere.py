"""Which weights lie on unit Lp spheres, and with which p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lightning_sparse.core.patterns import as_patterns, matches_name
from lightning_sparse.core.target import Target
from lightning_sparse.core.targets import describe, find_targets
from lightning_sparse.functional import check_exponent, check_vectors
from lightning_sparse.functional.dims import Dims

__all__ = ["FREE", "Exponents", "Sphere", "check_exponents", "find_spheres"]

Exponents = float | Sequence[float] | Mapping[str, float]
"""One p, or one per constrained weight in the order of the module, or globs over names -> p; the first match counts."""

FREE = (":last", "*shortcut*", "*downsample*")
"""Weights that stay off the spheres by default: the last layer, and the projections around residual blocks."""


class Sphere(NamedTuple):
    """A weight whose outputs each lie on a unit Lp sphere.

    Args:
        target: the weight.
        p: exponent of the sphere.
    """

    target: Target
    p: float

    @property
    def dim(self) -> Dims:
        """The dimension that indexes the vectors; more than one where matrices are stacked."""
        dims = self.target.output_dims
        return dims[0] if len(dims) == 1 else dims


def find_spheres(
    module: nn.Module, p: Exponents, targets: str | Sequence[str] = ("*",), free: str | Sequence[str] | None = None
) -> list[Sphere]:
    """The weights that the patterns choose and `free` does not exclude, each with its p, in the order of the module.

    Args:
        module: the network.
        p: see `Exponents`.
        targets: patterns; see `find_targets`.
        free: patterns of weights that stay off the spheres; None uses those of `FREE` that match something.

    Raises:
        ValueError: if nothing is left, p does not fit, or a weight cannot be put on a sphere.
    """
    if free is None:
        free = [pattern for pattern in FREE if any(candidate.chosen for candidate in describe(module, [pattern]))]
    free = [free] if isinstance(free, str) else free
    found = find_targets(module, [*as_patterns(targets), *(f"!{pattern}" for pattern in free)])
    for target in found:
        if target.shares_rows:
            raise ValueError(
                f"'{target.name}' is a grouped transposed convolution, where one row serves several outputs; keep it free "
                f"with free=[..., '{target.name}']."
            )
        if target.parts_outputs:
            raise ValueError(
                f"'{target.name}' is sharded along its inputs, and a sphere needs all inputs of an output on one "
                f"rank; keep it free with free=[..., '{target.name}'], or cut it along its outputs."
            )
        check_vectors(
            target.weight if target.layout is None else torch.empty(target.shape, device="meta"),
            f"'{target.name}'",
            f"keep it free with free=[..., '{target.name}']",
            target.output_dims,
        )
    return [Sphere(target, value) for target, value in zip(found, _per_layer(p, found), strict=True)]


def check_exponents(p: Exponents) -> None:
    """Reject values of p that no layer could have.

    Raises:
        ValueError: naming the value.
    """
    if isinstance(p, Mapping):
        for pattern, value in p.items():
            check_exponent(value, f"p['{pattern}']")
    elif isinstance(p, list | tuple):
        for position, value in enumerate(p):
            check_exponent(value, f"p[{position}]")
    else:
        check_exponent(p)


def _per_layer(p: Exponents, targets: Sequence[Target]) -> list[float]:
    names = [target.name for target in targets]
    if isinstance(p, Mapping):
        for pattern in p:
            if not any(matches_name(pattern, name) for name in names):
                raise ValueError(f"p: the glob '{pattern}' matches none of the constrained weights ({_few(names)}).")
        values = []
        for name in names:
            hits = [value for pattern, value in p.items() if matches_name(pattern, name)]
            if not hits:
                raise ValueError(f"p={dict(p)} has no entry for '{name}'; add '*' for all others.")
            values.append(float(hits[0]))
        return values
    if isinstance(p, list | tuple):
        if len(p) != len(names):
            raise ValueError(f"p lists {len(p)} values for {len(names)} constrained weights ({_few(names)}).")
        return [float(value) for value in p]
    return [float(p)] * len(names)  # type: ignore[arg-type]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
