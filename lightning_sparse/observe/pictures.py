"""Corners of masks, as plain values for a report and as pictures."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional import pack, unpack

__all__ = ["bits", "corner", "describe_corner", "picture"]

ROWS, COLUMNS = 64, 128


def corner(mask: Tensor) -> Tensor:
    """The part of a mask that a picture shows: outputs down, inputs across."""
    return mask.flatten(1)[:ROWS, :COLUMNS].contiguous()


def picture(mask: Tensor) -> dict[str, Any]:
    """A corner of a mask as plain values."""
    flat = corner(mask)
    packed = base64.b64encode(pack(flat).cpu().numpy().tobytes()).decode()
    return {"shape": list(mask.shape), "rows": len(flat), "columns": flat.shape[1], "bits": packed}


def describe_corner(saved: Mapping[str, Any]) -> str:
    """The size of a layer, and how much of it the picture shows."""
    outputs, inputs = saved["shape"][0], math.prod(saved["shape"][1:])
    whole = (outputs, inputs) == (saved["rows"], saved["columns"])
    return f"{outputs} by {inputs}" + ("" if whole else f", the first {saved['rows']} by {saved['columns']}")


def bits(saved: Mapping[str, Any]) -> str:
    """A picture of a corner as SVG: one square per entry, filled if kept."""
    packed = torch.frombuffer(bytearray(base64.b64decode(saved["bits"])), dtype=torch.uint8)
    rows: Sequence[Sequence[bool]] = unpack(packed, (saved["rows"], saved["columns"])).tolist()
    strokes, width = [], len(rows[0])
    for i, row in enumerate(rows):
        start = None
        for j in range(width + 1):
            kept = j < width and row[j]
            if kept and start is None:
                start = j
            elif not kept and start is not None:
                strokes.append(f"M{start} {i + 0.5:g}h{j - start}")
                start = None
    return (
        f'<svg class="bits" viewBox="0 0 {width} {len(rows)}" role="img" aria-label="mask" '
        f'preserveAspectRatio="xMinYMin" shape-rendering="crispEdges">'
        f'<rect width="{width}" height="{len(rows)}"/><path d="{"".join(strokes)}"/></svg>'
    )
